"""The paired difference as diff and blame tell it."""

import numpy as np
import pytest

from lori_manager.comparing import difference_of
from lori_manager.metrics.bounds import graded_bounds, score_bounds
from lori_manager.metrics.paired import paired_difference

NAN = float("nan")
RIGHT = np.array([1, 1, 1, 0, 0, 1, NAN, 1], float)
THEN = np.array([1, 0, 0, 0, 1, 1, 1, NAN], float)
NATS = np.linspace(0.5, 2.0, 30)
MORE = NATS + np.linspace(-0.2, 0.1, 30) ** 2 * 9


def test_right_and_wrong_are_counted_with_the_bounds_of_two_shares():
    found = difference_of(RIGHT, THEN)
    assert (found.rows, found.rows_only_before, found.rows_only_after) == (6, 1, 1)
    assert (found.gained, found.lost) == (1, 2)
    assert found.change == pytest.approx(-1 / 6)
    assert found.worse
    bounds = score_bounds(2, 1, 6, 0.975)
    assert (found.low, found.high) == (bounds.lower, bounds.upper)
    paired = paired_difference(RIGHT, THEN)
    assert (found.p, found.error, found.test) == (paired.p, paired.error, paired.test)


def test_where_lower_is_better_what_became_wrong_was_gained():
    found = difference_of(RIGHT, THEN, higher_is_better=False)
    assert (found.gained, found.lost, found.worse) == (2, 1, False)
    assert found.change == pytest.approx(-1 / 6)


def test_numbers_are_bounded_as_the_gain_is_and_told_as_the_change():
    up = difference_of(NATS, MORE)
    gain = graded_bounds(NATS, MORE, confidence=0.975)
    assert (up.low, up.high, up.worse) == (gain.lower, gain.upper, False)
    down = difference_of(NATS, MORE, higher_is_better=False)
    gain = graded_bounds(MORE, NATS, confidence=0.975)
    assert (down.low, down.high, down.worse) == (-gain.upper, -gain.lower, True)
    assert (up.gained, up.lost) == (None, None)
    assert up.change == down.change == pytest.approx(float(np.mean(MORE - NATS)))
    assert (up.low, up.high) != (down.low, down.high)


def test_rows_of_no_weight_and_rows_of_one_side_do_not_count():
    weights = np.arange(30.0)
    later = MORE.copy()
    later[4] = NAN
    found = difference_of(NATS, later, None, weights)
    kept = np.array([n for n in range(1, 30) if n != 4])
    alone = difference_of(NATS[kept], MORE[kept], weights[kept], weights[kept])
    assert (found.change, found.low, found.high, found.p) == pytest.approx(
        (alone.change, alone.low, alone.high, alone.p)
    )
    assert found.rows == 28


def test_other_weights_of_common_rows_forbid_a_comparison():
    weights = np.arange(1.0, 31.0)
    other = weights.copy()
    other[3] += 1
    assert difference_of(NATS, MORE, weights, other) is None
    later = MORE.copy()
    later[3] = NAN
    assert difference_of(NATS, later, weights, other).rows == 29


def test_without_a_common_row_nothing_is_known():
    found = difference_of(np.array([1.0, NAN]), np.array([NAN, 1.0]))
    assert found.rows == 0
    assert np.isnan([found.change, found.low, found.high, found.p]).all()
    assert not found.real
