"""Quantiles against scipy."""

import pytest
from scipy import stats

from lori_manager.metrics.quantiles import normal_below, normal_quantile, student_quantile


@pytest.mark.parametrize("level", [0.001, 0.05, 0.5, 0.8, 0.975, 0.9999])
def test_normal_quantiles_are_scipys(level):
    assert normal_quantile(level) == pytest.approx(stats.norm.ppf(level), abs=1e-9)
    assert normal_below(normal_quantile(level)) == pytest.approx(level, abs=1e-9)


@pytest.mark.parametrize(("degrees", "within"), [(3, 0.01), (5, 1e-3), (15, 1e-4), (300, 1e-6)])
@pytest.mark.parametrize("level", [0.01, 0.05, 0.2, 0.9, 0.95, 0.99])
def test_students_quantiles_are_scipys_within_what_is_said(level, degrees, within):
    expected = stats.t.ppf(level, degrees)
    assert student_quantile(level, degrees) == pytest.approx(expected, rel=within)


def test_no_degrees_of_freedom_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        student_quantile(0.9, 0)
