"""Power: exact sums against scipy, promises against simulations."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from lori_manager.metrics.bounds import score_bounds
from lori_manager.metrics.paired import mcnemar_exact, sign_flip
from lori_manager.metrics.power import (
    mcnemar_power,
    rows_to_decide,
    rows_to_decide_mean,
    smallest_drop,
    smallest_mean_drop,
)
from lori_manager.metrics.verdict import judge


def power_by_scipy(rows, lost, gained, alpha):
    total = 0.0
    for k in range(rows + 1):
        fewest = next((b for b in range(k + 1) if stats.binom.sf(b - 1, k, 0.5) <= alpha), k + 1)
        found = stats.binom.sf(fewest - 1, k, lost / (lost + gained))
        total += stats.binom.pmf(k, rows, lost + gained) * found
    return total


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 30])
@pytest.mark.parametrize(
    ("rows", "lost", "gained"), [(60, 0.2, 0.05), (120, 0.06, 0.01), (20, 0.5, 0.5), (30, 0.3, 0.0)]
)
def test_power_is_the_sum_over_all_splits(rows, lost, gained, alpha):
    expected = power_by_scipy(rows, lost, gained, alpha)
    assert mcnemar_power(rows, lost, gained, alpha) == pytest.approx(expected, abs=1e-8)


def test_the_normal_limit_meets_the_sum_where_it_takes_over():
    for lost, gained in ((0.21, 0.18), (0.22, 0.17), (0.207, 0.183)):
        exact = mcnemar_power(1000, lost, gained)
        limit = mcnemar_power(1030, lost, gained)
        assert exact - 0.01 < limit < exact + 0.03  # thirty rows more are a little power


def test_power_of_equal_models_is_below_the_level():
    for rows in (10, 50, 200, 5000):
        for changed in (0.02, 0.3):
            assert mcnemar_power(rows, changed / 2, changed / 2) <= 0.05
    assert mcnemar_power(100, 0.0, 0.0) == 0.0
    assert mcnemar_power(0, 0.3, 0.0) == 0.0
    assert mcnemar_power(4, 1.0, 0.0) == 0.0
    assert mcnemar_power(5, 1.0, 0.0) == 1.0


@pytest.mark.parametrize("rows", [20, 50, 200, 1000, 4000])
@pytest.mark.parametrize("discordance", [0.0, 0.02, 0.1, 0.4])
@pytest.mark.parametrize("tasks", [1, 30])
def test_a_planted_drop_of_the_promised_size_is_found_as_often_as_promised(
    rows, discordance, tasks
):
    d = smallest_drop(rows, discordance, alpha=0.05 / tasks)
    assert d.discordance == pytest.approx(max(discordance, d.drop))
    random = np.random.default_rng(rows)
    lost = (d.discordance + d.drop) / 2
    counts = random.multinomial(rows, [lost, d.discordance - lost, 1 - d.discordance], 5000)
    splits, times = np.unique(counts[:, :2], axis=0, return_counts=True)
    found = [mcnemar_exact(int(b), int(c), "less") <= d.alpha for b, c in splits]
    assert float(times @ np.array(found)) / 5000 == pytest.approx(d.power, abs=0.02)


def test_more_rows_or_less_change_show_smaller_drops():
    drops = [smallest_drop(rows, 0.1).drop for rows in (50, 100, 200, 400, 1000)]
    assert drops == sorted(drops, reverse=True)
    drops = [smallest_drop(300, changed).drop for changed in (0.02, 0.05, 0.1, 0.3)]
    assert drops == sorted(drops)
    assert smallest_drop(300, 0.1, alpha=0.005).drop > smallest_drop(300, 0.1).drop


def test_too_few_rows_show_nothing():
    assert smallest_drop(4, 0.5).drop == smallest_mean_drop(4, 0.5).drop == math.inf
    assert "too few" in smallest_drop(4, 0.5).assumption
    assert smallest_drop(5, 0.5).drop < 1
    assert smallest_drop(5, 0.5, alpha=0.001).drop == math.inf


def test_what_is_assumed_is_said():
    assert smallest_drop(200, 0.1).assumption == "10.0% of the rows change"
    few = smallest_drop(200, 0.0)
    assert few.assumption == f"{few.drop:.1%} of the rows change, all for the worse"


@pytest.mark.parametrize("rows", [10, 50, 500])
def test_the_drop_of_a_mean_is_that_of_the_paired_t_test(rows):
    d = smallest_mean_drop(rows, 0.4)
    theirs = TTestPower().power(d.drop / 0.4, rows, 0.05, alternative="larger")
    assert theirs == pytest.approx(0.8, abs=0.01)


def test_a_planted_drop_of_a_mean_is_found_as_often_as_promised():
    random = np.random.default_rng(1)
    d = smallest_mean_drop(50, 0.4)
    found = sum(sign_flip(random.normal(-d.drop, 0.4, 50), "less") <= 0.05 for _ in range(1200))
    assert found / 1200 == pytest.approx(0.8, abs=0.035)


@pytest.mark.parametrize(
    ("lost", "gained", "margin"),
    [(0.05, 0.05, 0.02), (0.03, 0.02, 0.03), (0.07, 0.03, 0.02), (0.1, 0.2, 0.01)],
)
def test_the_rows_said_do_decide(lost, gained, margin):
    rows = rows_to_decide(lost, gained, margin)
    random = np.random.default_rng(2)
    decided = 0
    for b, c, _ in random.multinomial(rows, [lost, gained, 1 - lost - gained], 1500).tolist():
        safe = score_bounds(b, c, rows).lower > -margin
        decided += safe or mcnemar_exact(b, c, "less") <= 0.05
    assert decided / 1500 == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize(("difference", "margin"), [(0.0, 0.1), (-0.1, 0.05)])
def test_the_rows_said_decide_means_too(difference, margin):
    rows = rows_to_decide_mean(difference, 0.4, margin, fall=1.2)
    random = np.random.default_rng(3)
    undecided = 0
    for seed in range(300):
        before = random.normal(size=rows)
        after = before + difference + random.normal(0, 0.4, rows)
        judged = judge(before, after, margin, resamples=400, seed=seed)
        undecided += judged.verdict == "undecided"
    assert 1 - undecided / 300 == pytest.approx(0.8, abs=0.07)


def test_rows_where_nothing_changed_are_those_of_the_exact_bound():
    for margin in (0.01, 0.02, 0.05):
        rows = rows_to_decide(0.0, 0.0, margin)
        assert score_bounds(0, 0, rows).lower > -margin >= score_bounds(0, 0, rows - 1).lower
    assert rows_to_decide(0.0, 0.0, 0.0) is None
    assert rows_to_decide(0.1, 0.1, 0.0) is None
    assert rows_to_decide_mean(0.0, 0.0, 0.5, changed=0.0, fall=0.2) == 1
    assert rows_to_decide_mean(0.0, 0.0, 0.5, changed=0.0, fall=0.0) is None


def test_a_family_needs_more_rows_to_call_a_drop_real():
    one, many = (rows_to_decide(0.08, 0.02, 0.01, tests=t) for t in (1, 30))
    assert many > one
    assert rows_to_decide(1.0, 0.0, 0.1) == 5  # all lost: five coins
    assert rows_to_decide(0.02, 0.0, 0.02) > 5 / 0.02 / 2  # a drop of the margin regresses


@pytest.mark.parametrize(
    "call",
    [
        lambda: mcnemar_power(10, 0.8, 0.4),
        lambda: mcnemar_power(10, 0.1, 0.1, 0.7),
        lambda: smallest_drop(10, 1.2),
        lambda: smallest_drop(-1, 0.2),
        lambda: smallest_mean_drop(10, -0.1),
        lambda: smallest_mean_drop(10, 0.1, power=1.0),
        lambda: rows_to_decide(0.0, 0.1, -0.1),
        lambda: rows_to_decide(0.0, 0.0, -0.1),
        lambda: rows_to_decide(0.8, 0.4, 0.1),
        lambda: rows_to_decide(0.1, 0.1, 0.1, power=1.0),
        lambda: rows_to_decide_mean(0.0, -0.1, 0.1),
    ],
)
def test_what_makes_no_sense_is_refused(call):
    with pytest.raises(ValueError, match="must be"):
        call()
