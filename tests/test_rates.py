"""The search of a learning rate, as a pure function of what was tried."""

import math

import pytest

from lori_manager.rates import at_edge, best_rate, next_full_rate, next_rate


def searched(loss, usual, points, factor=3.0):
    tried = {}
    for _ in range(points):
        rate = next_rate(tried, usual, factor)
        assert rate not in tried
        tried[rate] = loss(rate)
    return tried


def bowl(best):
    return lambda rate: abs(math.log(rate / best))


def test_it_begins_at_the_usual_rate_and_its_neighbours():
    assert list(searched(bowl(1e-3), 1e-3, 3)) == [1e-3, 3e-3, 3.33e-4]


def test_it_goes_on_past_an_edge_that_is_best():
    assert list(searched(bowl(1.0), 1e-3, 5))[3:] == [9e-3, 2.7e-2]
    assert list(searched(bowl(1e-9), 1e-3, 4, 2.0))[3:] == [2.5e-4]


def test_it_halves_the_gap_to_the_better_neighbour_where_the_best_lies_within():
    tried = searched(bowl(1.5e-3), 1e-3, 4)
    assert list(tried)[3] == pytest.approx(math.sqrt(3) * 1e-3, rel=5e-3)
    assert best_rate(tried) == list(tried)[3]


@pytest.mark.parametrize("best", [1e-5, 2e-4, 1e-3, 7e-3, 0.3])
def test_more_points_end_nearer_to_the_best(best):
    tried = searched(bowl(best), 1e-3, 9)
    assert abs(math.log(best_rate(tried) / best)) <= math.log(3) / 2


def test_a_rate_that_diverged_is_never_the_best_and_bounds_the_search():
    tried = searched(lambda rate: math.inf if rate > 1e-3 else -rate, 1e-3, 5)
    assert best_rate(tried) == 1e-3
    assert max(tried) == 3e-3
    assert min(tried) == 3.33e-4
    assert best_rate({1e-3: math.nan, 1e-2: math.inf}) == 1e-3


def settled(loss, start, most):
    tried = {}
    while (rate := next_full_rate(tried, start, most)) is not None:
        assert rate not in tried
        tried[rate] = loss(rate)
    return tried


def test_at_full_length_it_goes_down_until_that_is_worse():
    assert list(settled(bowl(1.0), 1.0, 5)) == [1.0, 0.333]
    found = settled(bowl(0.1), 1.0, 5)
    assert list(found) == [1.0, 0.333, 0.111, 0.037]
    assert best_rate(found) == 0.111
    assert list(settled(bowl(1e-9), 1.0, 3)) == [1.0, 0.333, 0.111]
    assert settled(bowl(1.0), 1.0, 0) == {}


def test_at_full_length_what_diverges_is_left_for_a_lower_rate():
    found = settled(lambda rate: math.inf if rate > 0.2 else -rate, 1.0, 9)
    assert best_rate(found) == 0.111


def test_an_edge_at_full_length_is_told():
    short = {1.0: 0.3, 3.0: 0.2, 9.0: 0.4}
    assert not at_edge(short, {3.0: 0.1, 1.0: 0.2})
    assert at_edge(short, {3.0: 0.2, 1.0: 0.1})  # lower ones were not tried
    assert at_edge({1.0: 0.3, 3.0: 0.2}, {3.0: 0.1, 1.0: 0.2})  # nor higher ones


def test_an_edge_is_told():
    assert at_edge({1.0: 0.1, 2.0: 0.2})
    assert not at_edge({0.5: 0.2, 1.0: 0.1, 2.0: 0.2})
    assert not at_edge({})


@pytest.mark.parametrize("best", [1e-5, 2e-4, 1.23e-3, 0.3])
@pytest.mark.parametrize("factor", [1.05, 3.0, 10.0])
def test_no_rate_is_tried_twice(best, factor):
    for loss in (bowl(best), lambda rate: math.log(rate / best) ** 2):
        assert len(searched(loss, 1e-3, 20, factor)) == 20


@pytest.mark.parametrize(("usual", "factor"), [(0.0, 3.0), (1.0, 1.0)])
def test_a_search_that_cannot_move_is_refused(usual, factor):
    with pytest.raises(ValueError, match="above"):
        next_rate({}, usual, factor)
