import math

import pytest
from scipy import stats

from lori_manager.reporting.intervals import Z, change_interval, holm, score_interval


@pytest.mark.parametrize(("right", "rows"), [(0, 20), (1, 20), (10, 20), (199, 200), (20, 20)])
def test_a_share_of_right_rows_has_wilsons_interval(right, rows):
    p = right / rows
    found = score_interval(p, math.sqrt(p * (1 - p) / rows), rows)
    reference = stats.binomtest(right, rows).proportion_ci(method="wilson")
    assert found == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_other_scores_have_the_normal_interval():
    assert score_interval(2.5, 0.1, 50) == pytest.approx((2.5 - Z * 0.1, 2.5 + Z * 0.1))
    assert pytest.approx(stats.norm.ppf(0.975)) == Z


def test_a_change_without_a_discordant_row_is_not_certain():
    low, high = change_interval(0.0, 0.0, 100, 0, 0)
    assert low == -high
    assert 0.01 < high < 0.03


def test_a_change_always_lies_in_its_interval_and_the_interval_in_one_unit():
    for rows in (1, 2, 30, 1000):
        for lost in range(0, rows + 1, max(1, rows // 7)):
            for gained in range(0, rows - lost + 1, max(1, rows // 7)):
                change = (gained - lost) / rows
                low, high = change_interval(change, 0.0, rows, lost, gained)
                assert -1 <= low <= change <= high <= 1
                assert low < high


def test_the_interval_of_a_change_holds_the_truth_about_95_times_in_100():
    import numpy as np

    rng = np.random.default_rng(0)
    rows, lost, gained = 200, 0.06, 0.02
    held = 0
    for counts in rng.multinomial(rows, [lost, gained, 1 - lost - gained], size=4000):
        change = (counts[1] - counts[0]) / rows
        low, high = change_interval(change, 0.0, rows, int(counts[0]), int(counts[1]))
        held += low <= gained - lost <= high
    assert 0.94 < held / 4000 < 0.965


def test_outcomes_that_are_not_right_or_wrong_have_the_normal_interval_of_their_change():
    assert change_interval(-0.3, 0.1, 40, None, None) == pytest.approx(
        (-0.3 - Z / 10, -0.3 + Z / 10)
    )


def test_holm_is_what_its_steps_say():
    assert holm([0.01, 0.04, math.nan, 0.03]) == pytest.approx(
        [0.03, 0.06, math.nan, 0.06], nan_ok=True
    )
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
