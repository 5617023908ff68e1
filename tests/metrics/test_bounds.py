"""Bounds of paired differences: published values, scipy, exact levels, edges."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from lori_manager.metrics.bounds import (
    bca_bounds,
    gaffke_bounds,
    graded_bounds,
    score_bounds,
)

TWO_SIDED_95 = 0.975  # one-sided confidence of either end


@st.composite
def counts(draw):
    rows = draw(st.integers(1, 300))
    lost = draw(st.integers(0, rows))
    return lost, draw(st.integers(0, rows - lost)), rows


def test_without_its_correction_the_score_interval_is_tangos():
    # Airway hyper-responsiveness before and after transplantation, 1 + 1 + 7 + 12 children:
    # (-.517, -.026) in Fagerland, Lydersen and Laake 2014, BMC Med. Res. Methodology 14.
    b = score_bounds(7, 1, 21, TWO_SIDED_95, correction=0.0)
    assert (round(b.lower, 3), round(b.upper, 3)) == (-0.517, -0.026)


@pytest.mark.parametrize(("lost", "gained", "rows"), [(7, 1, 21), (40, 20, 160), (3, 9, 500)])
def test_the_score_bound_is_where_the_constrained_likelihood_puts_it(lost, gained, rows):
    def statistic(delta):  # the nuisance by a numerical maximum, not by its quadratic
        def minus_likelihood(p10):
            p01, same = p10 + delta, 1 - 2 * p10 - delta
            terms = (
                lost * np.log(p10),
                gained * np.log(p01),
                (rows - lost - gained) * np.log(same),
            )
            return -sum(terms)

        edge = 1e-12
        found = optimize.minimize_scalar(
            minus_likelihood,
            bounds=(max(0.0, -delta) + edge, (1 - delta) / 2 - edge),
            method="bounded",
            options={"xatol": 1e-13},
        )
        variance = (2 * found.x + delta - delta**2) / rows
        return ((gained - lost - 0.5) / rows - delta) / math.sqrt(variance)

    z = stats.norm.ppf(0.95)
    difference = (gained - lost) / rows
    expected = optimize.brentq(lambda d: statistic(d) - z, difference - 0.4, difference - 1e-3)
    correct = score_bounds(lost, gained, rows, correction=0.5)
    assert correct.lower == pytest.approx(expected, abs=1e-5)


def test_where_no_row_changed_the_bound_is_the_exact_binomial_one():
    for rows in (1, 20, 200, 1000):
        b = score_bounds(0, 0, rows)
        exact = stats.binomtest(0, rows).proportion_ci(0.90, method="exact").high
        assert b.upper == -b.lower == pytest.approx(exact)
        assert b.note
    assert score_bounds(0, 0, 150).lower > -0.02 > score_bounds(0, 0, 148).lower


def levels(rows, confidence, drops, gains):
    """Largest P(lower bound > truth) over the truths, by enumeration of every count."""
    lost, gained = np.meshgrid(np.arange(rows + 1), np.arange(rows + 1), indexing="ij")
    fits = lost + gained <= rows
    lost, gained = lost[fits], gained[fits]
    lower = np.array(
        [score_bounds(b, c, rows, confidence).lower for b, c in zip(lost, gained, strict=True)]
    )
    worst = 0.0
    for drop in drops:
        for c in gains:
            p = [c + drop, c, 1 - 2 * c - drop]
            chance = stats.multinomial.pmf(
                np.stack([lost, gained, rows - lost - gained], -1), rows, p
            )
            worst = max(worst, float(chance[lower > -drop].sum()))
    return worst


@pytest.mark.parametrize(
    ("rows", "confidence"), [(8, 0.95), (19, 0.9), (20, 0.95), (60, 0.95), (60, 0.99)]
)
def test_the_score_bound_is_above_the_truth_no_oftener_than_it_says(rows, confidence):
    gains = (0.0, 0.002, 0.01, 0.03, 0.08, 0.15, 0.25, 0.35)
    drops = (0.005, 0.01, 0.02, 0.05, 0.1, 1 - (1 - confidence) ** (1 / rows) + 1e-9)
    assert levels(rows, confidence, drops, gains) <= 1 - confidence + 1e-9


def test_tangos_own_bound_would_be_above_the_truth_too_often():
    # Why there is a correction: one true drop of 3% without any gain, 200 rows.
    lower = [score_bounds(b, 0, 200, correction=0.0).lower for b in range(30)]
    chance = stats.binom.pmf(range(30), 200, 0.03)
    assert chance[np.array(lower) > -0.03].sum() > 0.055


@given(counts(), st.floats(0.6, 0.99))
def test_score_bounds_hold_the_difference_mirror_and_widen_with_confidence(rows, confidence):
    lost, gained, n = rows
    b, mirrored = (
        score_bounds(lost, gained, n, confidence),
        score_bounds(gained, lost, n, confidence),
    )
    assert -1 <= b.lower <= (gained - lost) / n <= b.upper <= 1
    assert b.lower < b.upper
    assert (mirrored.lower, mirrored.upper) == (-b.upper, -b.lower)
    wider = score_bounds(lost, gained, n, 0.995)
    assert wider.lower <= b.lower + 1e-12
    assert wider.upper >= b.upper - 1e-12


@given(counts())
def test_a_lost_row_more_never_raises_the_score_bounds(rows):
    lost, gained, n = rows
    if lost + gained < n and lost + gained > 0:
        fewer, more = score_bounds(lost, gained, n), score_bounds(lost + 1, gained, n)
        assert more.lower <= fewer.lower + 1e-9
        assert more.upper <= fewer.upper + 1e-9


@pytest.mark.parametrize(
    "call",
    [
        lambda: score_bounds(-1, 0, 5),
        lambda: score_bounds(3, 3, 5),
        lambda: score_bounds(0, 0, 0),
        lambda: score_bounds(1, 1, 5, 0.5),
        lambda: bca_bounds([]),
        lambda: bca_bounds([0.1, math.nan]),
        lambda: bca_bounds([0.1, 0.2], confidence=1.0),
        lambda: bca_bounds([0.1, 0.2], [1.0]),
        lambda: gaffke_bounds([0.5], -0.2, 0.2),
        lambda: graded_bounds([0.5], [0.5, 0.6]),
        lambda: graded_bounds([0.5, 0.5], [0.5, 0.5], confidence=0.4),
    ],
)
def test_what_makes_no_sense_is_refused(call):
    with pytest.raises(ValueError, match="must"):
        call()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows", [25, 60])
def test_bca_is_scipys_to_the_last_digits_on_the_same_resamples(rows, seed):
    random = np.random.default_rng(seed)
    before = random.normal(size=rows)
    after = before + random.exponential(size=rows) - 0.9
    ours = bca_bounds(after - before, resamples=2000, seed=5, expand=False)
    theirs = stats.bootstrap(
        (before, after),
        lambda a, b, axis: np.mean(b - a, axis=axis),
        paired=True,
        confidence_level=0.9,  # .95 on either side
        n_resamples=2000,
        method="BCa",
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert ours.lower == pytest.approx(theirs.low, abs=1e-12)
    assert ours.upper == pytest.approx(theirs.high, abs=1e-12)


def test_weighted_bca_is_scipys_of_the_ratio():
    random = np.random.default_rng(3)
    d, w = random.gamma(2, size=40) - 2.2, random.integers(1, 30, 40).astype(float)
    ours = bca_bounds(d, w, resamples=2000, seed=5, expand=False)
    theirs = stats.bootstrap(
        (d, w),
        lambda x, y, axis: np.sum(x * y, axis=axis) / np.sum(y, axis=axis),
        paired=True,
        confidence_level=0.9,
        n_resamples=2000,
        method="BCa",
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert ours.lower == pytest.approx(theirs.low, abs=1e-12)
    assert ours.upper == pytest.approx(theirs.high, abs=1e-12)


def test_the_expansion_gives_few_rows_students_width():
    random = np.random.default_rng(0)
    widths = []
    for seed in range(40):
        d = random.normal(size=10)
        b = bca_bounds(d, resamples=2000, seed=seed)
        t = stats.t.ppf(0.95, 9) * d.std(ddof=1) / math.sqrt(10)
        widths.append((b.upper - b.lower) / (2 * t))
    assert np.mean(widths) == pytest.approx(1.0, abs=0.05)


def test_resamples_in_blocks_are_the_same_resamples(monkeypatch):
    d = np.random.default_rng(1).normal(size=30)
    whole = bca_bounds(d, resamples=500), gaffke_bounds(d, -5, 5, resamples=500)
    monkeypatch.setattr("lori_manager.metrics.bounds._CELLS", 1000)
    parts = bca_bounds(d, resamples=500), gaffke_bounds(d, -5, 5, resamples=500)
    for one, other in zip(whole, parts, strict=True):
        assert (one.lower, one.upper) == pytest.approx((other.lower, other.upper), abs=1e-12)


def test_a_bootstrap_without_spread_says_so():
    for d in ([0.3], [0.3] * 9):
        b = bca_bounds(d)
        assert b.lower == b.upper == pytest.approx(0.3)
        assert "no spread" in b.note


@pytest.mark.parametrize(("right", "rows"), [(0, 30), (3, 50), (25, 50), (50, 50)])
def test_gaffkes_bound_of_right_answers_is_clopper_pearsons(right, rows):
    b = gaffke_bounds([1.0] * right + [0.0] * (rows - right), 0.0, 1.0, resamples=40_000)
    exact = stats.binomtest(right, rows).proportion_ci(0.90, method="exact")
    assert b.lower == pytest.approx(exact.low, abs=0.003)
    assert b.upper == pytest.approx(exact.high, abs=0.003)


def test_gaffkes_bound_keeps_its_level_where_a_bootstrap_fails():
    # One row in fifty falls by 1: most samples of 50 hold none or one such row.
    random = np.random.default_rng(2)
    missed, fooled = 0, 0
    for seed in range(300):
        d = -(random.random(50) < 0.02).astype(float)
        if d.any():  # otherwise a bootstrap has no bound at all
            fooled += bca_bounds(d, resamples=300, seed=seed).lower > -0.02
        missed += gaffke_bounds(d, -1.0, 1.0, resamples=300, seed=seed).lower > -0.02
    assert missed == 0
    assert fooled > 0.05 * 300 or fooled == 0  # the bootstrap is no yardstick here


def test_equal_weights_and_their_scale_change_nothing():
    random = np.random.default_rng(4)
    a, b = random.normal(size=40), random.normal(size=40)
    w = random.integers(1, 9, 40).astype(float)
    assert graded_bounds(a, b, np.full(40, 7.0)) == graded_bounds(a, b)
    one, other = graded_bounds(a, b, w), graded_bounds(a, b, 3 * w)
    assert one.lower == pytest.approx(other.lower, abs=1e-12)
    assert one.lower != graded_bounds(a, b).lower


def test_where_few_rows_differ_the_others_may_still_fall_as_far_as_scores_reach():
    before = np.tile([0.0, 0.5, 1.0, 0.5], 50)
    after = before.copy()
    after[:3] += [0.5, 0.25, -0.25]
    b = graded_bounds(before, after)
    assert b.method == "gaffke"
    assert "3 rows differ" in b.note
    # Not less careful than about the one row in 200 that a rule of three allows.
    assert b.lower < b_of_none(before).lower + 0.005
    assert b.lower < bca_bounds(after - before).lower


def b_of_none(outcomes):
    return graded_bounds(outcomes, outcomes)


def test_where_no_row_differs_the_bound_has_a_width():
    outcomes = np.tile([0.0, 0.5, 1.0, 0.5], 50)
    b = b_of_none(outcomes)
    assert b.upper == -b.lower == pytest.approx(1 - 0.05 ** (1 / 200))
    constant = graded_bounds([0.5] * 9, [0.5] * 9)
    assert (constant.lower, constant.upper) == (-math.inf, math.inf)
    assert "same number" in constant.note
    assert -1 < graded_bounds([0.2], [0.9]).lower < 0


def test_dense_differences_are_bounded_no_less_carefully_than_by_bca():
    random = np.random.default_rng(6)
    for n in (20, 100):
        a = random.normal(size=n)
        b = a + random.normal(0, 0.3, n)
        both, bca = graded_bounds(a, b), bca_bounds(b - a)
        assert both.lower <= bca.lower
        assert both.upper == bca.upper


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=40), st.integers(0, 3))
@example([0.0, 5e-222, 0.0], 0)
def test_graded_bounds_are_ordered_and_the_same_for_the_same_seed(d, seed):
    before = np.linspace(-1, 1, len(d))
    after = before + np.array(d)
    b = graded_bounds(before, after, resamples=200, seed=seed)
    assert b == graded_bounds(before, after, resamples=200, seed=seed)
    assert b.lower <= b.upper
    assert b.lower <= float(np.mean(after - before)) + 1e-9
