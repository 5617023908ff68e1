"""A mean over seeds and rows at once: what it is worth for other seeds and other rows.

Every seed's adapter is scored on the same rows, so the two are crossed: an outcome is a
mean + an effect of its row + one of its seed + what is left. Seeds and rows are both taken
as random draws, so that a result speaks of the method and not of the adapters at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lori_manager.metrics.quantiles import student_two_sided, student_two_sided_quantile

MOST_DEGREES = 2000  # Student's distribution with more is a normal one to three digits


@dataclass(frozen=True)
class CrossedMean:
    """A mean over (seeds, rows) with its 95% interval.

    Attributes:
        error: standard error over seeds and rows; NaN where there is one seed or row.
        degrees: of freedom of that error, by Satterthwaite; NaN likewise.
        p: two-sided, against a mean of 0.
        seed_spread: standard deviation of a seed's mean beyond what rows explain.
    """

    mean: float
    error: float
    degrees: float
    low: float
    high: float
    p: float
    seed_spread: float


def crossed_mean(
    values: ArrayLike, weights: ArrayLike | None = None, *, confidence: float = 0.95
) -> CrossedMean:
    """The mean of values crossed by two random factors, without replication.

    Args:
        values: (seeds, rows) finite. Not modified.
        weights: (rows,) positive, or None; the mean is then sum w x / sum w for every seed,
            and its error that of the linearised ratio.
        confidence: of the interval.
    Returns:
        With the mean squares of rows, seeds and the remainder: error^2 = (MSr + MSs - MSe)
        / (seeds rows), unbiased; it is taken as no less than either factor alone gives.
        Student's distribution has (MSr + MSs - MSe)^2 / (MSr^2 / (rows - 1) + MSs^2 /
        (seeds - 1) + MSe^2 / ((rows - 1)(seeds - 1))) degrees of freedom, rounded down.
        One seed or one row: mean alone. No spread at all: an error of 0 and p of 1 for a
        mean of 0, else 0, of which the caller must know that it is no certainty.
    Raises:
        ValueError: not two-dimensional, empty, not finite, or weights that do not fit.
    Source: Cornfield and Tukey 1956, Annals of Mathematical Statistics 27, 907-949;
    Satterthwaite 1946, Biometrics Bulletin 2, 110-114.

    >>> round(crossed_mean([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]]).mean, 3)
    0.5
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 2 or 0 in x.shape or not np.isfinite(x).all():
        raise ValueError(f"`values` must be (seeds, rows) of finite numbers, got {x.shape}")
    seeds, rows = x.shape
    mean = float(x.mean())
    if weights is not None:
        w = np.asarray(weights, dtype=np.float64)
        if w.shape != (rows,) or not (np.isfinite(w).all() and (w > 0).all()):
            raise ValueError(f"`weights` must be {rows} positive numbers, got shape {w.shape}")
        mean = float((x @ w).mean() / w.sum())
        x = mean + (x - mean) * (w / w.mean())
    if min(seeds, rows) < 2:
        nan = math.nan
        return CrossedMean(mean, nan, nan, nan, nan, nan, nan)
    by_row, by_seed, rest = _mean_squares(x)
    spread = math.sqrt(max(0.0, by_seed - rest) / rows)
    total = max(by_row + by_seed - rest, by_row, by_seed)
    error = math.sqrt(total / (seeds * rows))
    if error <= 1e-12 * max(1.0, float(np.abs(x).max())):
        p = 1.0 if abs(mean) <= 1e-12 else 0.0
        return CrossedMean(mean, 0.0, math.nan, mean, mean, p, spread)
    degrees = total**2 / (
        by_row**2 / (rows - 1) + by_seed**2 / (seeds - 1) + rest**2 / ((rows - 1) * (seeds - 1))
    )
    whole = min(max(1, math.floor(degrees)), MOST_DEGREES)
    half = student_two_sided_quantile(confidence, whole) * error
    p = student_two_sided(mean / error, whole)
    return CrossedMean(mean, error, degrees, mean - half, mean + half, p, spread)


def _mean_squares(x: NDArray[np.float64]) -> tuple[float, float, float]:
    """Of rows, of seeds, and of what neither explains."""
    seeds, rows = x.shape
    grand, of_row, of_seed = x.mean(), x.mean(0), x.mean(1)
    rest = x - of_row - of_seed[:, None] + grand
    return (
        seeds * float(np.sum((of_row - grand) ** 2)) / (rows - 1),
        rows * float(np.sum((of_seed - grand) ** 2)) / (seeds - 1),
        float(np.sum(rest**2)) / ((rows - 1) * (seeds - 1)),
    )
