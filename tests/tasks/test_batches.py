"""Batches: a pinned order, every row once a pass, padding that reaches nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lori_manager.tasks.batches import (
    IGNORED,
    MEGABATCH,
    Sizes,
    collate,
    length_batches,
    pack,
    permutation,
    training_order,
)
from lori_manager.tasks.encoding import Encoded

PINNED = (
    [6, 4, 1, 5, 9, 3, 2, 0, 8, 7],
    [5, 7, 9, 6, 1, 0, 2, 4, 3, 8],
    [1, 4, 5, 3, 2, 9, 8, 6, 0, 7],
)
PINNED_ORDER = [[5], [1, 4, 3], [0, 6, 2], [5]]


def test_permutations_are_the_pinned_ones():
    """Stored runs are gone on with and repeated by them: they must never change."""
    assert permutation(10, 0, "rows 0").tolist() == PINNED[0]
    assert permutation(10, 0, "rows 1").tolist() == PINNED[1]
    assert permutation(10, 7, "calibration").tolist() == PINNED[2]


def test_the_order_of_training_is_the_pinned_one():
    order = training_order([5, 9, 2, 7, 7, 1, 3], 3, 4, seed=0)
    assert [batch.tolist() for batch in order] == PINNED_ORDER


def test_a_permutation_is_one_for_every_size_and_differs_by_seed_and_label():
    for n in (0, 1, 2, 100):
        assert sorted(permutation(n, 3, "x").tolist()) == list(range(n))
    orders = {tuple(permutation(50, s, label)) for s in (0, 1) for label in ("rows 0", "rows 1")}
    assert len(orders) == 4


def test_every_place_is_about_equally_likely():
    places = np.array([permutation(4, seed, "x").tolist().index(0) for seed in range(400)])
    assert np.bincount(places, minlength=4).min() > 70


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=120), st.integers(1, 9), st.integers(0, 5))
def test_every_pass_holds_every_row_once_in_batches_no_larger_than_asked(lengths, batch, seed):
    mega = batch * MEGABATCH
    sizes = [min(mega, len(lengths) - start) for start in range(0, len(lengths), mega)]
    once = sum(-(-size // batch) for size in sizes)
    order = training_order(lengths, batch, 2 * once, seed)
    assert len(order) == 2 * once
    for part in (order[:once], order[once:]):
        assert sorted(np.concatenate(part).tolist()) == list(range(len(lengths)))
        assert all(1 <= len(b) <= batch for b in part)


def test_as_many_steps_as_the_passes_take_are_those_passes():
    """`steps_for` counts ceil(rows / batch) a pass."""
    for rows in (1, 7, 8, 64, 65, 100):
        once = -(-rows // 4)
        order = training_order([3] * rows, 4, once, 0)
        assert sorted(np.concatenate(order).tolist()) == list(range(rows))


def test_a_batch_holds_rows_of_like_length():
    lengths = [int(x) for x in permutation(256, 0, "lengths")]
    spread = np.mean([np.ptp([lengths[i] for i in b]) for b in training_order(lengths, 8, 32, 0)])
    blind = np.mean([np.ptp([lengths[i] for i in range(s, s + 8)]) for s in range(0, 256, 8)])
    assert spread < 0.3 * blind


def test_more_steps_only_append():
    lengths = list(range(1, 30))
    short, long = training_order(lengths, 4, 5, 1), training_order(lengths, 4, 40, 1)
    assert [b.tolist() for b in long[:5]] == [b.tolist() for b in short]
    assert training_order(lengths, 4, 0, 1) == []


def test_no_rows_are_a_value_error():
    with pytest.raises(ValueError, match="`lengths` is empty"):
        training_order([], 4, 3, 0)


def test_batches_for_scoring_hold_every_row_once_longest_first():
    batches = length_batches([3, 9, 1, 9, 4], 2)
    assert [b.tolist() for b in batches] == [[1, 3], [4, 0], [2]]
    assert length_batches([], 4) == []


ROWS = [Encoded([1, 2, 3, 4], 2), Encoded(np.array([5, 6], np.int32), 1), Encoded([7, 8, 9], 2)]


def test_a_batch_is_padded_and_marked_as_worked_out_by_hand():
    batch = collate(ROWS, pad=0)
    assert batch.ids.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0], [7, 8, 9, 0]]
    assert batch.wanted.tolist() == [1, 2, 4, 9]
    assert batch.targets.tolist() == [3, 4, 6, 9]
    assert batch.counts.tolist() == [2, 1, 1]
    assert batch.bounds is None
    assert {a.dtype for a in (batch.ids, batch.wanted, batch.targets)} == {np.dtype(np.int64)}


def test_a_packed_batch_is_as_worked_out_by_hand():
    batch = pack(ROWS)
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert batch.wanted.tolist() == [1, 2, 4, 7]
    assert batch.targets.tolist() == [3, 4, 6, 9]
    bounds = batch.bounds
    assert bounds.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]
    assert bounds.slots.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10]
    assert bounds.starts.tolist() == [0, 4, 6, 9, 9]
    assert (bounds.rows, bounds.longest) == (3, 4)


def test_a_batch_filled_up_keeps_its_rows_and_adds_what_counts_nothing():
    batch = pack(ROWS, pad=0, sizes=Sizes(tokens=12, wanted=6, rows=5, longest=6))
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0]]
    assert batch.wanted.tolist() == [1, 2, 4, 7, 0, 0]
    assert batch.targets.tolist() == [3, 4, 6, 9, IGNORED, IGNORED]
    assert batch.bounds.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 1, 2]
    assert batch.bounds.slots.tolist() == [0, 1, 2, 3, 6, 7, 12, 13, 14, 30, 30, 30]
    assert batch.bounds.starts.tolist() == [0, 4, 6, 9, 9, 9, 12]


@pytest.mark.parametrize(
    "sizes",
    [Sizes(8, 9, 9, 9), Sizes(12, 3, 9, 9), Sizes(12, 9, 2, 9), Sizes(12, 9, 9, 3),
     Sizes(20, 9, 9, 10)],
)  # fmt: skip
def test_rows_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="do not fit"):
        pack(ROWS, sizes=sizes)


@pytest.mark.parametrize("form", [collate, pack])
def test_without_a_prompt_the_first_token_is_context_and_no_target(form):
    batch = form([Encoded([1, 2, 3], 0)])
    assert batch.wanted.tolist() == [0, 1]
    assert batch.targets.tolist() == [2, 3]


@pytest.mark.parametrize("form", [collate, pack])
def test_a_pad_token_inside_a_row_is_learnt_and_padding_is_not(form):
    batch = form([Encoded([1, 2, 0], 1), Encoded([1, 3, 3, 3, 0], 1)], pad=0)
    assert batch.targets.tolist() == [2, 0, 3, 3, 3, 0]
    assert batch.counts.tolist() == [2, 4]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 12), st.integers(0, 11)), min_size=1, max_size=6))
def test_targets_are_the_tokens_behind_the_marked_places(sizes):
    rows = [Encoded(list(range(1, n + 1)), min(p, n - 1)) for n, p in sizes]
    for batch in (collate(rows), pack(rows)):
        assert batch.ids.ravel()[batch.wanted + 1].tolist() == batch.targets.tolist()
        assert len(batch.targets) == sum(len(r.ids) - max(r.prompt_length, 1) for r in rows)
        assert batch.counts.sum() == len(batch.targets)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=6), st.integers(0, 9), st.integers(0, 2))
def test_slots_put_every_token_of_a_packed_batch_where_padding_puts_it(lengths, gap, more):
    rows = [Encoded(list(range(1, n + 1)), 1) for n in lengths]
    whole, longest = sum(lengths), max(*lengths, gap)
    sizes = Sizes(whole + gap, whole, len(rows) + more, longest)
    batch = pack(rows, pad=99, sizes=sizes)
    padded = np.zeros(sizes.rows * longest + 1, np.int64)
    padded[batch.bounds.slots] = batch.ids[0]
    grid = padded[:-1].reshape(sizes.rows, longest)
    for row, encoded in zip(grid, rows, strict=False):
        assert row[: len(encoded.ids)].tolist() == list(encoded.ids)
    assert grid.sum() == sum(sum(r.ids) for r in rows)
    starts = batch.bounds.starts
    assert (np.diff(starts) >= 0).all()
    assert starts[-1] == whole + gap
    assert len(starts) == sizes.rows + 2
