"""Two versions scored on the same rows: by how much do they differ, and is it noise?

Rows are shared, so the error is that of the per-row difference, which is often far
smaller than what the two scores' own errors suggest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lori_manager.metrics.summary import as_outcomes, as_weights, is_binary, mean_and_error

MCNEMAR = "mcnemar-exact"
SIGN_FLIP = "sign-flip"
ENUMERATED = 12  # the largest differences, whose 2^12 signs are enumerated


@dataclass(frozen=True)
class PairedDifference:
    """b - a on the rows that both have; all of it NaN or 0 where there is none."""

    difference: float  # mean of b - a, weighted where weights were given
    error: float  # standard error of that paired difference
    p: float  # two-sided, against no difference
    test: str  # "mcnemar-exact" or "sign-flip"; "" without common rows
    rows: int  # measured in both
    rows_only_a: int
    rows_only_b: int
    both_right: int | None = None  # the three counts are None unless outcomes are right/wrong
    only_a_right: int | None = None
    only_b_right: int | None = None


def mcnemar_exact(only_a_right: int, only_b_right: int) -> float:
    """Two-sided exact p-value of McNemar's test, from the discordant pairs alone.

    The binomial probability, at 1/2, of a split at least as uneven as the one seen;
    1 where there is no discordant pair. Summed from its largest term down with that
    term in logarithms, so that thousands of pairs neither overflow nor lose digits.
    Raises:
        ValueError: a negative count.
    Source: McNemar 1947, in the exact form of Agresti, Categorical Data Analysis, 11.1.

    >>> mcnemar_exact(1, 5)
    0.21875
    """
    if only_a_right < 0 or only_b_right < 0:
        raise ValueError(f"counts must be at least 0, got {only_a_right} and {only_b_right}")
    n, fewer = only_a_right + only_b_right, min(only_a_right, only_b_right)
    if only_a_right == only_b_right:
        return 1.0
    if n <= 50:  # whole numbers, hence exact
        as_uneven = 2 * sum(math.comb(n, k) for k in range(fewer + 1))
        return min(1.0, as_uneven / float(2**n))
    log_largest = (
        math.lgamma(n + 1) - math.lgamma(fewer + 1) - math.lgamma(n - fewer + 1) - n * math.log(2.0)
    )
    k = np.arange(fewer, 0, -1, dtype=np.float64)
    relative = 1.0 + float(np.cumprod(k / (n - k + 1)).sum())  # C(n, k - 1) / C(n, k), chained
    return min(1.0, 2.0 * math.exp(log_largest + math.log(relative)))


def sign_flip(differences: ArrayLike) -> float:
    """Two-sided p-value of the sign-flip (Fisher's randomisation) test of a sum.

    Without a difference between the versions, each row's d is as likely as -d; p is the
    share of the 2^n sign patterns whose sum is at least as far from 0. The signs of the
    12 largest |d| are enumerated, the rest enter by their normal limit, with variance
    sum d^2: exact up to 12 rows that differ, no randomness above, and a few rows that
    dominate cannot pass for many.

    Args:
        differences: (n,) finite; weighted ones are w * d.
    Returns:
        p; 1 where nothing differs, also for n = 0.

    >>> sign_flip([1.0, 2.0, 3.0])
    0.25
    """
    d = as_outcomes(differences, "differences")
    size = float(np.abs(d).sum())
    if size == 0:
        return 1.0
    d = d[np.argsort(-np.abs(d), kind="stable")] / size
    observed = abs(float(d.sum()))
    sums = np.zeros(1)
    for largest in d[:ENUMERATED]:
        sums = np.concatenate([sums + largest, sums - largest])
    deviation = math.sqrt(float(np.sum(d[ENUMERATED:] ** 2)))
    if deviation < 1e-9:
        # Ties between patterns are common; rounding must not split them.
        return float(np.mean(np.abs(sums) >= observed - 1e-9))
    z = (observed - sums) / (deviation * math.sqrt(2.0))
    # The distribution is symmetric: twice one tail, which is erfc / 2. What was seen and
    # its mirror image are two of the patterns, so p cannot be less than their share.
    least = 2.0 ** (1 - np.count_nonzero(d))
    return float(min(1.0, max(least, math.fsum(map(math.erfc, z.tolist())) / z.size)))


def paired_difference(
    a: ArrayLike, b: ArrayLike, weights: ArrayLike | None = None
) -> PairedDifference:
    """How far `b` is from `a` on the rows measured in both.

    Args:
        a: (rows,) outcomes of the one version, NaN where not measured. Not modified.
        b: (rows,) outcomes of the other, on the same rows in the same order.
        weights: (rows,) or None; token counts for perplexity.
    Returns:
        PairedDifference with difference = b - a. Right/wrong outcomes of equal weight:
        error = sqrt(f - difference^2) / sqrt(n), f being the share of discordant pairs,
        and p by `mcnemar_exact`. All else: the delta-method error of the mean of b - a,
        and p by `sign_flip`. p is for one comparison; many need a correction (Holm).
    Raises:
        ValueError: shapes differ, infinite outcomes, negative weights.

    >>> paired_difference([1, 1, 0, 1], [1, 0, 0, float("nan")]).difference
    -0.3333333333333333
    """
    x, y = as_outcomes(a, "a"), as_outcomes(b, "b")
    if x.shape != y.shape:
        raise ValueError(
            "`a` and `b` must hold the same rows in the same order: "
            f"`a` has {x.size} rows, `b` has {y.size} rows"
        )
    w, common = as_weights(weights, ~np.isnan(x) & ~np.isnan(y))
    rows_only_a = int(np.sum(~np.isnan(x) & np.isnan(y)))
    rows_only_b = int(np.sum(np.isnan(x) & ~np.isnan(y)))
    x, y = x[common], y[common]
    if x.size == 0:
        return PairedDifference(math.nan, math.nan, math.nan, "", 0, rows_only_a, rows_only_b)
    d: NDArray[np.float64] = y - x
    binary = w is None and is_binary(x) and is_binary(y)
    difference, error = mean_and_error(d, w, population=binary)
    counts = (int(x.size), rows_only_a, rows_only_b)
    if not binary:
        p = sign_flip(d if w is None else d * w)
        return PairedDifference(difference, error, p, SIGN_FLIP, *counts)
    only_a, only_b = int(np.sum(d < 0)), int(np.sum(d > 0))
    both = int(np.sum((x == 1) & (y == 1)))
    p = mcnemar_exact(only_a, only_b)
    return PairedDifference(difference, error, p, MCNEMAR, *counts, both, only_a, only_b)
