"""Paired differences by hand, by property and against scipy."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats import contingency_tables as contingency

from lori_manager.metrics.paired import mcnemar_exact, paired_difference, sign_flip
from lori_manager.metrics.summary import summarize

NAN = math.nan
right_wrong = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def test_right_wrong_by_hand():
    # 10 rows: 4 both right, 3 only a, 1 only b, 2 both wrong.
    a = [1] * 4 + [1] * 3 + [0] + [0] * 2
    b = [1] * 4 + [0] * 3 + [1] + [0] * 2
    d = paired_difference(a, b)
    assert d.difference == pytest.approx(-0.2)
    assert d.error == pytest.approx(math.sqrt(0.4 - 0.04) / math.sqrt(10))
    assert (d.both_right, d.only_a_right, d.only_b_right, d.rows) == (4, 3, 1, 10)
    assert d.p == pytest.approx(2 * (1 + 4) / 16)
    assert d.test == "mcnemar-exact"


@pytest.mark.parametrize("n", [1, 2, 7, 49, 50, 51, 200, 1001])
def test_mcnemar_is_the_two_sided_binomial_test(n):
    for k in sorted({0, 1, n // 4, n // 2, n - n // 3, n}):
        expected = stats.binomtest(k, n, 0.5).pvalue
        assert mcnemar_exact(k, n - k) == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize(("a", "b"), [(4600, 5400), (9900, 10_100), (0, 1000), (30_000, 31_000)])
def test_mcnemar_keeps_its_digits_over_thousands_of_pairs(a, b):
    expected = stats.binomtest(a, a + b, 0.5).pvalue
    assert 0 < mcnemar_exact(a, b) == pytest.approx(expected, rel=1e-9, abs=0)


def test_mcnemar_of_a_hopeless_split_underflows_to_zero_and_does_not_fail():
    assert mcnemar_exact(0, 100_000) == 0.0
    assert mcnemar_exact(250_000, 250_000) == 1.0


def test_mcnemar_refuses_negative_counts():
    with pytest.raises(ValueError, match="at least 0, got -1 and 3"):
        mcnemar_exact(-1, 3)


def test_pairing_finds_what_two_separate_errors_hide():
    # 220 rows, 14 lost and 2 gained: hardly a difference of two shares, a clear paired one.
    a = np.array([1] * 150 + [1] * 14 + [0] * 2 + [0] * 54)
    b = np.array([1] * 150 + [0] * 14 + [1] * 2 + [0] * 54)
    d = paired_difference(a, b)
    unpaired = math.hypot(summarize(a).error, summarize(b).error)
    assert abs(d.difference) / unpaired < 1.96
    assert d.p < 0.005


def test_one_row_is_never_significant():
    assert paired_difference([0], [1]).p == 1.0
    d = paired_difference([0.2], [0.9])
    assert d.difference == pytest.approx(0.7)
    assert d.p == 1.0
    assert math.isnan(d.error)


def test_no_discordant_row_has_p_one_and_no_error():
    d = paired_difference([1, 0, 1], [1, 0, 1])
    assert (d.difference, d.error, d.p, d.only_a_right, d.only_b_right) == (0, 0, 1, 0, 0)
    assert paired_difference([0.3, 0.4], [0.3, 0.4]).p == 1.0


def test_nothing_in_common_is_nan_and_not_zero():
    d = paired_difference([1, NAN, NAN, 0], [NAN, 1, NAN, NAN])
    assert math.isnan(d.difference)
    assert math.isnan(d.error)
    assert math.isnan(d.p)
    assert (d.rows, d.rows_only_a, d.rows_only_b) == (0, 2, 1)
    assert d.both_right is None
    assert d.test == ""


def test_rows_of_one_side_are_told_and_left_out():
    d = paired_difference([1, 1, NAN, 0, 1], [0, NAN, 1, 0, 1])
    assert (d.rows, d.rows_only_a, d.rows_only_b) == (3, 1, 1)
    assert d.difference == pytest.approx(-1 / 3)


def test_unequal_sizes_are_refused_with_both_sizes():
    with pytest.raises(ValueError, match="`a` has 3 rows, `b` has 4 rows"):
        paired_difference([1, 0, 1], [1, 0, 1, 1])
    with pytest.raises(ValueError, match=r"got shape \(2,\) for \(3,\) rows"):
        paired_difference([1, 0, 1], [1, 0, 1], [1, 1])


def test_graded_outcomes_have_the_error_of_a_paired_t_test():
    random = np.random.default_rng(2)
    a = random.normal(size=40)
    b = a + random.normal(0.1, 0.3, size=40)
    d = paired_difference(a, b)
    t = stats.ttest_rel(b, a)
    assert d.difference / d.error == pytest.approx(t.statistic)
    assert d.p == pytest.approx(t.pvalue, abs=0.01)
    assert d.test == "sign-flip"
    assert d.both_right is None


def test_weights_give_the_difference_of_the_weighted_means():
    random = np.random.default_rng(3)
    a, b, w = random.gamma(2, size=30), random.gamma(2, size=30), random.integers(1, 50, 30)
    d = paired_difference(a, b, w)
    assert d.difference == pytest.approx(summarize(b, w).value - summarize(a, w).value)
    # The heteroscedasticity-consistent (HC1) error of a weighted least-squares constant.
    residual = (b - a) - d.difference
    expected = math.sqrt(30 / 29 * np.sum((w * residual) ** 2)) / w.sum()
    assert d.error == pytest.approx(expected)


def test_the_sign_flips_of_weighted_rows_are_those_of_their_weighted_differences():
    d = paired_difference([0.0, 0.0, 0.0], [1.0, 1.0, -1.0], [3, 4, 1])
    assert d.difference == pytest.approx(6 / 8)
    assert d.p == 4 / 8  # 3 + 4 - 1 = 6: of 8, 6, 2, 0 and their mirrors, four are as far


def test_sign_flip_enumerates_every_pattern_of_few_rows():
    random = np.random.default_rng(4)
    for n in (1, 2, 5, 9, 12):
        d = random.normal(0.5, 1.0, size=n)
        patterns = np.array(list(itertools.product((1, -1), repeat=n)))
        expected = np.mean(np.abs(patterns @ d) >= abs(d.sum()) - 1e-12)
        assert sign_flip(d) == pytest.approx(expected, abs=1e-12)


def test_sign_flip_is_never_below_the_share_of_what_was_seen():
    # All 13 one way: that and its mirror, of 2^13 patterns.
    assert sign_flip([1.0] * 13) == pytest.approx(2 / 2**13, rel=1e-9)


def test_sign_flip_of_ties_counts_them_as_extreme():
    assert sign_flip([0.1] * 5) == 2 / 32
    assert sign_flip([0.1, 0.1, 0.1, -0.1]) == 10 / 16
    assert sign_flip([]) == sign_flip([0.0, 0.0]) == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_sign_flip_agrees_with_scipys_permutation_test_on_many_rows(seed):
    random = np.random.default_rng(seed)
    d = random.standard_t(3, size=60) + 0.3
    expected = stats.permutation_test(
        (d,),
        np.sum,
        permutation_type="samples",
        n_resamples=20_000,
        vectorized=True,
        rng=np.random.default_rng(5),
    ).pvalue
    assert sign_flip(d) == pytest.approx(expected, abs=0.012)


def test_a_few_rows_that_dominate_cannot_pass_for_many():
    # Four large changes one way: a normal test of all 44 rows would call them real.
    d = np.array([1.0] * 4 + [1e-4, -1e-4] * 20)
    z = d.sum() / math.sqrt(np.sum(d**2))
    assert 2 * stats.norm.sf(z) < 0.05 < 0.06 < sign_flip(d)


def test_p_of_equal_models_is_below_a_twentieth_at_most_so_often():
    random = np.random.default_rng(6)
    graded = np.mean(
        [
            sign_flip(random.exponential(size=25) * random.choice([-1, 1], 25)) < 0.05
            for _ in range(800)
        ]
    )
    assert 0.025 < graded < 0.075
    exact = np.mean([mcnemar_exact(k, 20 - k) <= 0.05 for k in random.binomial(20, 0.5, 4000)])
    assert exact <= 0.05


@given(right_wrong)
def test_swapping_sides_turns_the_sign_and_nothing_else(rows):
    a, b = np.array(rows, dtype=float).T
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert there.difference == -back.difference
    assert (there.error, there.p) == (back.error, back.p)
    assert (there.only_a_right, there.only_b_right) == (back.only_b_right, back.only_a_right)


@given(right_wrong)
def test_the_right_wrong_error_is_that_of_the_counts(rows):
    a, b = np.array(rows, dtype=float).T
    d = paired_difference(a, b)
    lost, gained = d.only_a_right, d.only_b_right
    variance = (lost + gained) / d.rows - ((gained - lost) / d.rows) ** 2
    assert d.error == pytest.approx(math.sqrt(max(0.0, variance) / d.rows), abs=1e-9)
    assert 0 < d.p <= 1


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40), st.floats(0.01, 100))
def test_sign_flip_is_a_probability_that_ignores_scale_and_order(d, scale):
    p = sign_flip(d)
    assert 0 <= p <= 1
    assert sign_flip([scale * x for x in d]) == pytest.approx(p, abs=1e-6)
    assert sign_flip(d[::-1]) == pytest.approx(p, abs=1e-6)
    assert sign_flip([-x for x in d]) == pytest.approx(p, abs=1e-6)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (5, 0), (7, 3), (3, 7), (40, 20), (700, 640)])
def test_one_sided_mcnemar_is_the_one_sided_binomial_test(lost, gained):
    n = lost + gained
    expected = stats.binomtest(lost, n, 0.5, alternative="greater").pvalue if n else 1.0
    assert mcnemar_exact(lost, gained, "less") == pytest.approx(expected, rel=1e-9)


def test_mcnemar_is_that_of_statsmodels():
    for lost, gained in ((1, 5), (12, 3), (30, 31), (0, 9)):
        theirs = contingency.mcnemar([[100, lost], [gained, 50]], exact=True).pvalue
        assert mcnemar_exact(lost, gained) == pytest.approx(theirs, rel=1e-9)


def test_one_sided_sign_flip_enumerates_few_rows_and_mirrors():
    random = np.random.default_rng(7)
    for n in (1, 4, 12):
        d = random.normal(-0.3, 1.0, size=n)
        patterns = np.array(list(itertools.product((1, -1), repeat=n)))
        expected = np.mean(patterns @ np.abs(d) <= d.sum() + 1e-12)
        assert sign_flip(d, "less") == pytest.approx(expected, abs=1e-12)
    d = random.normal(-0.3, 1.0, size=60)
    assert sign_flip(d) == pytest.approx(2 * sign_flip(d, "less"), rel=1e-9)
    assert sign_flip(d, "less") + sign_flip(-d, "less") == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("n", [13, 20, 51, 400, 3000])
def test_sign_flip_of_equal_sizes_is_the_binomial_test(n):
    # Every sum lies on a lattice, where a normal limit is too sure of itself.
    d = np.ones(n)
    d[: n // 2 + int(math.sqrt(n))] = -1
    lost = int(np.sum(d < 0))
    expected = mcnemar_exact(lost, n - lost, "less")
    assert sign_flip(d, "less") == pytest.approx(expected, rel=1e-6)
    assert sign_flip(0.3 * d) == pytest.approx(mcnemar_exact(lost, n - lost), rel=1e-6)


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 30])
def test_sign_flip_of_scores_with_levels_keeps_its_level(alpha):
    random = np.random.default_rng(8)
    sizes = random.choice([0.25, 0.5, 1.0, 1 / 3], 40, p=[0.2, 0.2, 0.5, 0.1])
    signs = random.choice([-1.0, 1.0], (40_000, 40))
    # The critical sum by bisection over p, then how often chance alone goes beyond it.
    sums = np.sort(signs @ sizes)
    critical = next(s for s in np.unique(sums.round(9)) if p_of_sum(sizes, s) > alpha)
    share = np.mean(sums < critical - 1e-6)
    assert share <= alpha + 4 * math.sqrt(alpha / 40_000)


def p_of_sum(sizes, wanted):
    """p of differences of these sizes whose signs add up near a wanted sum."""
    signs, left = np.ones(sizes.size), (sizes.sum() - wanted) / 2
    for i in np.argsort(-sizes):
        if sizes[i] <= left + 1e-9:
            signs[i], left = -1.0, left - sizes[i]
    return sign_flip(signs * sizes, "less")


def test_sign_flip_of_thousands_of_rows_is_its_normal_limit():
    d = np.random.default_rng(9).normal(-0.01, 1.0, size=20_000)
    limit = stats.norm.cdf(d.sum() / math.sqrt(np.sum(d**2)))
    assert sign_flip(d, "less") == pytest.approx(limit, abs=0.005)
    assert 0 < sign_flip(np.full(2000, -1.0), "less") <= 1e-14
    assert sign_flip(np.full(2000, 1.0), "less") == pytest.approx(1.0)
