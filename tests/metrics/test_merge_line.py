"""Figures of a line of merges, worked by hand and against those of a sequence."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lori_manager.metrics.continual import continual_figures
from lori_manager.metrics.merge_line import merge_line_figures

NAN = math.nan


def by_symbol(figures):
    return {f.symbol: f for f in figures}


def test_a_line_worked_by_hand():
    # a and b come with the first version, c with the third; d is only scored.
    R = [
        [0.8, 0.6, 0.1, 0.5],
        [0.7, 0.9, 0.2, 0.5],
        [0.6, 0.7, 0.9, 0.3],
        [0.5, 0.8, 0.7, 0.4],
    ]
    figures = by_symbol(merge_line_figures(R, [0, 0, 2], [0.0, 0.1, 0.05, 0.6], [0.9, 0.9, 0.9]))
    expected = {
        "ACC": ((0.5 + 0.8 + 0.7) / 3, 3),
        "LA": ((0.8 + 0.6 + 0.9) / 3, 3),
        "BWT": ((-0.3 + 0.2 - 0.2) / 3, 3),
        "BWT_TRACE": ((-0.3 + 0.2 - 0.2) / 3, 3),
        "FWT": (0.2 - 0.05, 1),
        "F": ((0.3 + 0.1 + 0.2) / 3, 3),
        "I": ((0.1 + 0.3 + 0.0) / 3, 3),
        "DELTA": (0.4 - 0.6, 1),
    }
    assert {s: (f.value, f.denominator) for s, f in figures.items()} == {
        s: (pytest.approx(value), of) for s, (value, of) in expected.items()
    }


def test_a_task_that_the_last_version_brought_in_has_not_been_forgotten_yet():
    figures = by_symbol(merge_line_figures([[0.8, 0.1], [0.6, 0.9]], [0, 1], [0, 0], [1, 1]))
    assert (figures["BWT"].value, figures["BWT"].denominator) == (pytest.approx(-0.2), 1)
    assert (figures["F"].value, figures["F"].denominator) == (pytest.approx(0.2), 1)


def test_tasks_that_all_come_with_the_last_version_leave_nothing_to_lose():
    figures = by_symbol(merge_line_figures([[0.1, 0.1], [0.6, 0.9]], [1, 1], [0, 0], [1, 1]))
    for symbol in ("BWT", "BWT_TRACE", "F"):
        assert math.isnan(figures[symbol].value)
    assert figures["FWT"].value == pytest.approx(0.1)


def test_what_was_not_measured_makes_nan_of_what_needs_it():
    figures = by_symbol(merge_line_figures([[0.8, NAN], [0.6, 0.9]], [0, 1], [0, 0], [1, 1]))
    assert {s for s, f in figures.items() if math.isnan(f.value)} == {"FWT"}


@pytest.mark.parametrize("up", [True, False])
@given(T=st.integers(1, 5), extra=st.integers(0, 2), seed=st.integers(0, 999))
def test_with_one_new_task_a_version_they_are_those_of_a_sequence(up, T, extra, seed):
    random = np.random.default_rng(seed)
    R, base, own = random.random((T, T + extra)), random.random(T + extra), random.random(T)
    ours = merge_line_figures(R, range(T), base, own, higher_is_better=up)
    theirs = continual_figures(R, base, own, higher_is_better=up)
    assert [f.symbol for f in ours] == [f.symbol for f in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.value == pytest.approx(other.value, nan_ok=True)
        assert mine.higher_is_better == other.higher_is_better


@pytest.mark.parametrize(
    ("R", "introduced", "base", "own"),
    [
        ([[1.0]], [], [0], []),
        ([[1.0]], [1], [0], [1]),
        ([[1.0]], [-1], [0], [1]),
        ([[1.0]], [0, 0], [0], [1, 1]),
        ([1.0], [0], [0], [1]),
        ([[1.0]], [0], [0, 0], [1]),
        ([[1.0]], [0], [0], [1, 1]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(R, introduced, base, own):
    with pytest.raises(ValueError, match=r"expected|must be"):
        merge_line_figures(R, introduced, base, own)
