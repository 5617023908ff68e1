"""Two versions' outcomes on the same rows: the paired difference, told in one record."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lori_manager.metrics.bounds import Bounds, graded_bounds, score_bounds
from lori_manager.metrics.paired import MCNEMAR, PairedDifference, paired_difference

SIGNIFICANCE = 0.05  # of one comparison, uncorrected
ONE_SIDED = 0.975  # confidence of each end of a 95% interval


@dataclass(frozen=True)
class Difference:
    """How `after` differs from `before` on the rows that both have.

    Attributes:
        change: after - before in the score's own units; `worse` says what that means.
        error: standard error of that paired difference.
        low, high: the 95% interval of the change, by `score_bounds` of right/wrong outcomes
            and `graded_bounds` of others.
        p: two-sided, against no difference; of this comparison alone.
        rows: measured in both; rows_only_before, rows_only_after: in one of them.
        gained, lost: rows that became right, or were; None unless outcomes are right/wrong.
    """

    change: float
    error: float
    low: float
    high: float
    p: float
    test: str
    rows: int
    rows_only_before: int
    rows_only_after: int
    gained: int | None
    lost: int | None
    worse: bool
    real: bool  # p < SIGNIFICANCE


def difference_of(
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    weights_before: NDArray[np.float64] | None = None,
    weights_after: NDArray[np.float64] | None = None,
    *,
    higher_is_better: bool = True,
) -> Difference | None:
    """The paired difference of two versions.

    Args:
        before, after: (rows,) outcomes in the same order, NaN where not measured.
        weights_before, weights_after: (rows,) or None, such as token counts.
        higher_is_better: what `worse` goes by.
    Returns:
        None where the two weight a row differently, so that no mean is of both.
    """
    weights = weights_before if weights_after is None else weights_after
    if weights_before is not None and weights_after is not None:
        common = ~(np.isnan(before) | np.isnan(after))
        if not np.array_equal(weights_before[common], weights_after[common]):
            return None
    d = paired_difference(before, after, weights)
    low, high = _interval(before, after, weights, d, higher_is_better)
    return Difference(
        d.difference,
        d.error,
        low,
        high,
        d.p,
        d.test,
        d.rows,
        d.rows_only_a,
        d.rows_only_b,
        gained=d.only_b_right if higher_is_better else d.only_a_right,
        lost=d.only_a_right if higher_is_better else d.only_b_right,
        worse=d.difference < 0 if higher_is_better else d.difference > 0,
        real=d.p < SIGNIFICANCE,
    )


def _interval(
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    weights: NDArray[np.float64] | None,
    d: PairedDifference,
    higher_is_better: bool,
) -> tuple[float, float]:
    """The change's two-sided interval, of two one-sided bounds."""
    if d.rows == 0:
        return math.nan, math.nan
    if d.test == MCNEMAR and d.only_a_right is not None and d.only_b_right is not None:
        bounds = score_bounds(d.only_a_right, d.only_b_right, d.rows, ONE_SIDED)
    else:
        bounds = graded_change(before, after, weights, higher_is_better)
    return bounds.lower, bounds.upper


def graded_change(
    before: NDArray[Any],
    after: NDArray[Any],
    weights: NDArray[Any] | None,
    higher_is_better: bool,
) -> Bounds:
    """The 95% interval of after - before, of outcomes that are not right or wrong.

    Args:
        before, after: (rows,), NaN where not measured; at least one row is in both.
        weights: (rows,) or None; rows of weight 0 do not count.
        higher_is_better: the lower bound is the careful one, and has to be that of a gain.
    """
    both = ~(np.isnan(before) | np.isnan(after))
    if weights is not None:
        both &= weights > 0
        weights = weights[both]
    x, y = before[both], after[both]
    if higher_is_better:
        return graded_bounds(x, y, weights, confidence=ONE_SIDED)
    gain = graded_bounds(y, x, weights, confidence=ONE_SIDED)
    return replace(gain, lower=-gain.upper, upper=-gain.lower)
