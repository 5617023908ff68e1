import math

import pytest
from scipy import stats

from lori_manager.reporting.intervals import Z, score_interval


@pytest.mark.parametrize(("right", "rows"), [(0, 20), (1, 20), (10, 20), (199, 200), (20, 20)])
def test_a_share_of_right_rows_has_wilsons_interval(right, rows):
    p = right / rows
    found = score_interval(p, math.sqrt(p * (1 - p) / rows), rows)
    reference = stats.binomtest(right, rows).proportion_ci(method="wilson")
    assert found == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_other_scores_have_the_normal_interval():
    assert score_interval(2.5, 0.1, 50) == pytest.approx((2.5 - Z * 0.1, 2.5 + Z * 0.1))
    assert pytest.approx(stats.norm.ppf(0.975)) == Z
