"""Many pairs compared at once say what `paired_difference` says of each."""

import math
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lori_manager.auditing.comparing import Comparer, Loaded, differences
from lori_manager.auditing.groups import Group
from lori_manager.metrics.bounds import graded_bounds, score_bounds
from lori_manager.metrics.paired import paired_difference
from lori_manager.records import Score, Split, Task

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Outcomes:
    """A store of arrays alone."""

    def __init__(self, arrays):
        self.arrays, self.readings = arrays, []

    def outcomes_of(self, scores):
        self.readings.append(len(scores))
        return [self.arrays[s.id] for s in scores]


def scored(i, rows, **changes):
    fields = {"subject": f"m@{i}", "digest": "", "task": "t", "task_revision": 1,
              "scorer": "s", "scorer_version": "1", "precision": "fp32", "value": 0.0,
              "error": 0.0, "rows": rows, "id": i, "created_at": NOW}  # fmt: skip
    return Score(**(fields | changes))


def outcomes(random, kind, rows):
    x = (random.random(rows) < 0.6).astype(np.float32)
    if kind == "some":
        x[random.random(rows) < 0.3] = np.nan
    if kind == "graded":
        x = np.round(random.random(rows), 1).astype(np.float32)
    return x, random.integers(0, 5, rows).astype(np.float32) if kind == "weighted" else None


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["bits", "some", "graded", "weighted"]), min_size=2, max_size=7),
    rows=st.integers(1, 40),
    seed=st.integers(0, 10**6),
)
def test_bits_floats_and_weights_say_what_one_pair_alone_says(kinds, rows, seed):
    random = np.random.default_rng(seed)
    arrays = [outcomes(random, kind, rows) for kind in kinds]
    weights = next((w for _, w in arrays if w is not None), None)
    arrays = [(x, None if w is None else weights) for x, w in arrays]  # one task, one set
    scores = [scored(i, rows) for i in range(len(kinds))]
    pairs = [(a, b) for a in scores for b in scores]
    store = Outcomes(arrays)
    for (a, b), told in zip(pairs, differences(Loaded(store), pairs), strict=True):
        w = arrays[a.id][1] if arrays[b.id][1] is None else arrays[b.id][1]
        expected = paired_difference(arrays[a.id][0], arrays[b.id][0], w)
        for name in ("difference", "error", "p"):
            assert getattr(told, name) == pytest.approx(getattr(expected, name), nan_ok=True)
        for name in ("test", "rows", "rows_only_a", "rows_only_b", "both_right", "only_a_right",
                     "only_b_right"):  # fmt: skip
            assert getattr(told, name) == getattr(expected, name)
    assert store.readings == [len(scores)]


def test_tasks_of_different_sizes_are_compared_in_one_go():
    arrays = [
        (np.array(x, dtype=np.float32), None) for x in ([1, 1, 0], [1, 0, 0], [1] * 20, [0] * 20)
    ]
    small, large = [scored(i, 3) for i in (0, 1)], [scored(i, 20) for i in (2, 3)]
    told = differences(Loaded(Outcomes(arrays)), [tuple(small), tuple(large)])
    assert [d.difference for d in told] == [pytest.approx(-1 / 3), -1.0]


def comparer(arrays, *, higher=True):
    rows = len(arrays[0][0])
    facts = {"higher_is_better": higher}
    scores = [scored(i, rows, facts=facts) for i in range(len(arrays))]
    group = Group("t", 1, "s", "1", {s.subject: [s] for s in scores})
    task = Task("t", 1, "s", "1", "", {"eval": Split("", rows)}, {}, NOW)
    return Comparer(Loaded(Outcomes(arrays)), group, task), scores


def test_the_interval_of_right_and_wrong_is_the_score_interval_at_95_percent():
    before, after = np.ones(100, np.float32), np.ones(100, np.float32)
    after[:9], before[95:] = 0, 0
    ours, (a, b) = comparer([(before, None), (after, None)])
    (told,) = ours.compare([(a, b)])
    expected = score_bounds(lost=9, gained=5, rows=100, confidence=0.975)
    assert (told.low, told.high) == (expected.lower, expected.upper)
    assert told.change == pytest.approx(-0.04)
    assert told.low < told.change < told.high
    assert told.interval == "tango-score"


@pytest.mark.parametrize("higher", [True, False])
def test_the_interval_of_graded_outcomes_has_its_careful_side_where_a_loss_is(higher):
    random = np.random.default_rng(3)
    a, b = random.random((2, 60)).astype(np.float32)
    b[:2] = np.nan
    ours, (x, y) = comparer([(a, None), (b, None)], higher=higher)
    (told,) = ours.compare([(x, y)])
    if higher:
        expected = graded_bounds(a[2:], b[2:], confidence=0.975)
        assert (told.low, told.high) == (expected.lower, expected.upper)
    else:
        expected = graded_bounds(b[2:], a[2:], confidence=0.975)
        assert (told.low, told.high) == (-expected.upper, -expected.lower)
    assert told.low < told.change < told.high
    assert (told.rows, told.rows_only_before, told.rows_only_after) == (58, 2, 0)


def test_rows_of_weight_nothing_are_no_rows_of_the_interval():
    a, b = np.array([[1, 2, 3, 4.0], [2, 3, 5, 9.0]], np.float32)
    w = np.array([1, 2, 3, 0], np.float32)
    ours, (x, y) = comparer([(a, w), (b, w)])
    (told,) = ours.compare([(x, y)])
    assert told.rows == 3
    expected = graded_bounds(a[:3], b[:3], w[:3], confidence=0.975)
    assert (told.low, told.high) == (expected.lower, expected.upper)


def test_no_common_row_has_no_interval_and_a_row_without_change_a_wide_one():
    nothing = np.array([np.nan, 1], np.float32), np.array([0, np.nan], np.float32)
    ours, (a, b) = comparer([(x, None) for x in nothing])
    (told,) = ours.compare([(a, b)])
    assert math.isnan(told.low)
    assert told.interval == ""
    ours, (a, b) = comparer([(np.ones(50, np.float32), None)] * 2)
    (told,) = ours.compare([(a, b)])
    assert told.low < -0.05 < 0 < 0.05 < told.high
    assert told.note == ""
    ours, (a, b) = comparer([(np.full(50, 0.5, np.float32), None)] * 2)
    (told,) = ours.compare([(a, b)])
    assert (told.low, told.high) == (-math.inf, math.inf)
    assert "nothing says how far a row can move" in told.note
