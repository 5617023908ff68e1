"""One number, and its standard error, out of one outcome per row.

An outcome is 1 or 0 for right or wrong, a mean negative log-likelihood per token
in nats for perplexity, or any other number; NaN means that the row was not measured.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lori_manager.metrics.shares import share_and_error


class Summary(NamedTuple):
    """A score: `value` with its standard `error`, over `rows` measured rows."""

    value: float
    error: float
    rows: int


def as_outcomes(values: ArrayLike, name: str = "outcomes") -> NDArray[np.float64]:
    """`values` as a float64 vector (rows,), finite or NaN.

    Raises:
        ValueError: not one-dimensional, or infinite somewhere.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1:
        raise ValueError(f"`{name}` must have one number per row, got shape {x.shape}")
    infinite = np.flatnonzero(np.isinf(x))
    if infinite.size:
        raise ValueError(
            f"`{name}` must be finite, or NaN where not measured: "
            f"{infinite.size} infinite, the first in row {int(infinite[0])}"
        )
    return x


def as_weights(
    weights: ArrayLike | None, measured: NDArray[np.bool_]
) -> tuple[NDArray[np.float64] | None, NDArray[np.bool_]]:
    """The weights of the measured rows, and those rows; rows of weight 0 count as not measured.

    Returns:
        (None, measured) where all weights are equal: they change nothing.
    Raises:
        ValueError: another shape, or negative or not finite where a row was measured.
    """
    if weights is None:
        return None, measured
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != measured.shape:
        raise ValueError(
            f"`weights` must have one number per row: got shape {w.shape} for {measured.shape} rows"
        )
    if not bool(np.all(np.isfinite(w[measured]) & (w[measured] >= 0))):
        raise ValueError("`weights` must be finite and at least 0 wherever a row was measured")
    kept = measured & (w > 0)
    w = w[kept]
    return (None if w.size == 0 or bool(np.all(w == w[0])) else w), kept


def is_binary(x: NDArray[np.float64]) -> bool:
    """Whether every value is 0 or 1."""
    return bool(np.all((x == 0) | (x == 1)))


def mean_and_error(
    x: NDArray[np.float64], w: NDArray[np.float64] | None, *, population: bool = False
) -> tuple[float, float]:
    """The (weighted) mean of measured values and its standard error; (NaN, NaN) for no rows.

    Args:
        x: (n,) measured values.
        w: (n,) positive weights, or None.
        population: divide the variance by n, as for proportions, instead of n - 1.
    Formula: with m = sum w x / sum w, the delta-method (linearised) error of a ratio
        of sums is sqrt(c sum w^2 (x - m)^2) / sum w, with c = n / (n - 1) or 1. For equal
        weights this is the usual s / sqrt(n). NaN for one row unless `population`.
    """
    n = x.size
    if n == 0:
        return math.nan, math.nan
    share = np.full(n, 1.0 / n) if w is None else w / w.sum()
    mean = float(x.sum() / n if w is None else share @ x)
    spread = float(np.sum((share * (x - mean)) ** 2))
    if population:
        return mean, math.sqrt(spread)
    return mean, math.sqrt(spread * n / (n - 1)) if n > 1 else math.nan


def summarize(outcomes: ArrayLike, weights: ArrayLike | None = None) -> Summary:
    """Mean outcome over the measured rows, its standard error, and how many rows.

    Args:
        outcomes: (rows,) one number per row, NaN where not measured. Not modified.
        weights: (rows,) or None; token counts for perplexity, so that the mean of the
            rows' means is the mean negative log-likelihood per token, in nats.
    Returns:
        Summary(value, error, rows), unpackable. No measured row: (NaN, NaN, 0).
        Right/wrong outcomes of equal weight: error = sqrt(p (1 - p) / n), which is 0
        where all rows agree; that is a limit of the formula, not certainty. All else:
        the delta-method error of `mean_and_error`, NaN for a single row. Rows are taken
        as independent.
    Raises:
        ValueError: shapes differ, infinite outcomes, negative weights.

    >>> summarize([1, 0, 1, 1, float("nan")])
    Summary(value=0.75, error=0.21650635094610965, rows=4)
    """
    x = as_outcomes(outcomes)
    w, measured = as_weights(weights, ~np.isnan(x))
    x = x[measured]
    if w is None and x.size and is_binary(x):
        value, error = share_and_error(int(x.sum()), x.size)
    else:
        value, error = mean_and_error(x, w)
    return Summary(value, error, int(x.size))


def perplexity(value: float, error: float) -> tuple[float, float]:
    """Perplexity and its delta-method error from a mean negative log-likelihood in nats.

    exp is not linear, so compare two models by the difference in nats, not of perplexities.

    >>> perplexity(0.0, 0.1)
    (1.0, 0.1)
    """
    try:
        ppl = math.exp(value)
    except OverflowError:
        ppl = math.inf
    return ppl, ppl * error
