"""Means over seeds and rows: against scipy, statsmodels, values by hand and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from lori_manager.metrics.crossed import crossed_mean
from lori_manager.metrics.quantiles import student_two_sided, student_two_sided_quantile


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 10, 31, 200, 2000])
def test_students_distribution_is_scipys(degrees):
    for t in (0.0, 0.3, -1.0, 2.5, 6.0):
        expected = 2 * stats.t.sf(abs(t), degrees)
        assert student_two_sided(t, degrees) == pytest.approx(expected, abs=1e-13)
    expected = stats.t.ppf(0.975, degrees)
    assert student_two_sided_quantile(0.95, degrees) == pytest.approx(expected, rel=1e-7)


def test_no_degrees_of_freedom_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        student_two_sided(1.0, 0)


def test_a_table_worked_by_hand():
    # Rows' means 1, 3, 5; seeds' means 2, 4; nothing left: MSr = 2*8/2, MSs = 3*2/1, MSe = 0.
    found = crossed_mean([[0.0, 2.0, 4.0], [2.0, 4.0, 6.0]])
    assert found.mean == 3
    assert found.error == pytest.approx(math.sqrt((8 + 6) / 6))
    assert found.degrees == pytest.approx(14**2 / (8**2 / 2 + 6**2 / 1))
    assert found.seed_spread == pytest.approx(math.sqrt(6 / 3))
    half = stats.t.ppf(0.975, 2) * found.error
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half))
    assert found.p == pytest.approx(2 * stats.t.sf(3 / found.error, 2))


def test_mean_squares_are_those_of_statsmodels():
    import pandas
    from statsmodels.api import stats as sm
    from statsmodels.formula.api import ols

    x = np.random.default_rng(1).normal(size=(3, 7)) + np.arange(3)[:, None]
    frame = pandas.DataFrame(
        [(s, r, x[s, r]) for s in range(3) for r in range(7)], columns=["seed", "row", "value"]
    )
    table = sm.anova_lm(ols("value ~ C(seed) + C(row)", frame).fit())
    squares = table["sum_sq"] / table["df"]
    total = squares["C(row)"] + squares["C(seed)"] - squares["Residual"]
    assert crossed_mean(x).error == pytest.approx(math.sqrt(total / 21))


def test_seeds_that_agree_say_what_the_rows_alone_say():
    rows = np.random.default_rng(2).normal(0.1, 1, 400)
    found = crossed_mean(np.stack([rows, rows, rows]))
    assert found.error == pytest.approx(rows.std(ddof=1) / 20)
    assert found.p == pytest.approx(stats.ttest_1samp(rows, 0).pvalue, rel=1e-6)


def test_rows_that_agree_say_what_the_seeds_alone_say():
    seeds = np.array([0.2, 0.5, 0.35])
    found = crossed_mean(np.repeat(seeds[:, None], 50, axis=1))
    assert found.p == pytest.approx(stats.ttest_1samp(seeds, 0).pvalue)


@pytest.mark.parametrize("seed_spread", [0.0, 0.02, 0.1])
def test_the_level_holds_for_other_seeds_and_rows(seed_spread):
    rng = np.random.default_rng(3)
    missed = []
    for _ in range(1500):
        x = rng.normal(0, 0.5, 100) + rng.normal(0, seed_spread, (3, 1))
        missed.append(crossed_mean(x + rng.normal(0, 0.3, (3, 100))).p < 0.05)
    assert 0.02 < np.mean(missed) < 0.08


def test_rows_taken_as_all_there_is_would_miss_far_more_often():
    """Why seeds count: the rows' test alone, on the same draws."""
    rng = np.random.default_rng(3)
    missed = []
    for _ in range(300):
        x = rng.normal(0, 0.5, 100) + rng.normal(0, 0.1, (3, 1)) + rng.normal(0, 0.3, (3, 100))
        missed.append(stats.ttest_1samp(x.mean(0), 0).pvalue < 0.05)
    assert np.mean(missed) > 0.12


def test_weights_are_those_of_rows_repeated():
    rng = np.random.default_rng(4)
    x, w = rng.normal(1, 1, (3, 40)), rng.integers(1, 5, 40).astype(float)
    assert crossed_mean(x, w).mean == pytest.approx(np.average(x, axis=1, weights=w).mean())
    assert crossed_mean(x, np.full(40, 2.0)) == crossed_mean(x)


def test_one_seed_has_a_mean_and_no_error():
    found = crossed_mean([[1.0, 0.0, 1.0]])
    assert found.mean == pytest.approx(2 / 3)
    assert math.isnan(found.error)


def test_no_spread_is_told_apart_from_no_difference():
    assert crossed_mean(np.zeros((2, 5))).p == 1
    assert crossed_mean(np.ones((2, 5))).p == 0


@pytest.mark.parametrize("bad", [[1.0, 2.0], [[]], [[1.0, math.nan]]])
def test_values_that_are_no_table_are_refused(bad):
    with pytest.raises(ValueError, match="values"):
        crossed_mean(bad)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="weights"):
        crossed_mean([[1.0, 2.0], [2.0, 2.0]], [1.0])
