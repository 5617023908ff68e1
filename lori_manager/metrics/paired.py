"""Two versions scored on the same rows: by how much do they differ, and is it noise?

Rows are shared, so the error is that of the per-row difference, which is often far
smaller than what the two scores' own errors suggest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lori_manager.metrics.summary import as_outcomes, as_weights, is_binary, mean_and_error

MCNEMAR = "mcnemar-exact"
SIGN_FLIP = "sign-flip"
ENUMERATED = 12  # up to so many rows that differ, all 2^12 signs are enumerated
REACH = 8.5  # standard deviations of a sum that its lattice spans on either side
BLUR = 0.006  # standard deviations by which rounding to that lattice moves a sum, about
BATCH = 16  # sizes of differences taken together
GONE = -40.0  # a log below which a factor of a distribution no longer counts

Alternative = Literal["two-sided", "less"]


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


def _at_most(k: int, n: int) -> float:
    """P(X <= k) of n fair coins, in full digits for k below n / 2.

    From its largest term down with that term in logarithms, so that thousands of coins
    neither overflow nor lose digits.
    """
    if k < 0:
        return 0.0
    if 2 * k >= n:
        return 1.0 - _at_most(n - k - 1, n)
    if n <= 50:  # whole numbers, hence exact
        return sum(math.comb(n, i) for i in range(k + 1)) / float(2**n)
    log_largest = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    i = np.arange(k, 0, -1, dtype=np.float64)
    relative = 1.0 + float(np.cumprod(i / (n - i + 1)).sum())  # C(n, i - 1) / C(n, i), chained
    return math.exp(log_largest - n * math.log(2.0) + math.log(relative))


def mcnemar_exact(
    only_a_right: int, only_b_right: int, alternative: Alternative = "two-sided"
) -> float:
    """Exact p-value of McNemar's test, from the discordant pairs alone.

    Two-sided: the binomial probability, at 1/2, of a split at least as uneven as the one
    seen. "less" (b is worse than a): that of at least `only_a_right` among the discordant
    pairs. 1 where there is no discordant pair.
    Raises:
        ValueError: a negative count.
    Source: McNemar 1947, in the exact form of Agresti, Categorical Data Analysis, 11.1.

    >>> mcnemar_exact(1, 5), mcnemar_exact(5, 1, "less")
    (0.21875, 0.109375)
    """
    if only_a_right < 0 or only_b_right < 0:
        raise ValueError(f"counts must be at least 0, got {only_a_right} and {only_b_right}")
    n = only_a_right + only_b_right
    if alternative == "less":
        return _at_most(only_b_right, n)
    if only_a_right == only_b_right:
        return 1.0
    return min(1.0, 2.0 * _at_most(min(only_a_right, only_b_right), n))


def sign_flip(differences: ArrayLike, alternative: Alternative = "two-sided") -> float:
    """p-value of the sign-flip (Fisher's randomisation) test of a sum.

    Without a difference between the versions, each row's d is as likely as -d; p is the
    share of the 2^n sign patterns whose sum is at least as far from 0, or for "less" at
    most as large, as the one seen. Up to 12 rows that differ are enumerated. More are
    rounded to a lattice so fine that their sum moves by about a hundredth of its
    standard deviation, and its distribution is exact for the rounded differences: the
    level holds at any n, with ties or without, and nothing is random.

    Args:
        differences: (n,) finite; weighted ones are w * d.
    Returns:
        p, not resolved below 1e-14; 1 where nothing differs, also for n = 0.

    >>> sign_flip([1.0, 2.0, 3.0]), sign_flip([-1.0, -2.0, -3.0], "less")
    (0.25, 0.125)
    """
    d = as_outcomes(differences, "differences")
    d = d[d != 0]
    if d.size == 0:
        return 1.0
    d = d / float(np.abs(d).max())
    one_sided = alternative == "less"
    observed = float(d.sum()) if one_sided else -abs(float(d.sum()))
    sides = 1.0 if one_sided else 2.0
    if d.size <= ENUMERATED:
        sums = np.zeros(1)
        for step in d:
            sums = np.concatenate([sums + step, sums - step])
        # Ties between patterns are common; rounding must not split them.
        return min(1.0, sides * float(np.mean(sums <= observed + 1e-9)))
    points = 1 << math.ceil(math.log2(2 * REACH / BLUR * math.sqrt(d.size / 12)))
    steps = np.rint(d * (points / (2 * REACH * math.sqrt(float(np.sum(d**2))))))
    seen = int(steps.sum()) if one_sided else -abs(int(steps.sum()))
    shares = _sums_of_random_signs(np.abs(steps).astype(np.int64), points)
    below = shares[: max(0, min(points, points // 2 + seen + 1))]
    least = max(1e-14, math.ldexp(1.0, -d.size))  # what was seen is itself one pattern
    return min(1.0, sides * max(least, float(below.sum())))


def _sums_of_random_signs(steps: NDArray[np.int64], points: int) -> NDArray[np.float64]:
    """P(sum of +-steps = s) for s = -points / 2, .., points / 2 - 1, what is beyond wrapped.

    By the inverse Fourier transform of prod cos(t step). Factors of equal steps are taken
    together, and a frequency whose product has vanished is taken no further.
    """
    sizes, counts = np.unique(steps, return_counts=True)
    cosines = np.cos(np.arange(points) * (2.0 * math.pi / points))
    with np.errstate(divide="ignore"):
        logs, minus = np.log(np.abs(cosines)), cosines < 0
    frequencies = points // 2 + 1
    total, negative = np.zeros(frequencies), np.zeros(frequencies, dtype=np.bool_)
    alive = np.arange(frequencies)
    for i in range(sizes.size - 1, -1, -BATCH):  # the largest vanish first
        some = slice(max(0, i + 1 - BATCH), i + 1)
        turns = alive[:, None] * sizes[some] & (points - 1)
        total[alive] += logs[turns] @ counts[some].astype(np.float64)
        odd = minus[turns[:, counts[some] % 2 == 1]]
        negative[alive] ^= np.bitwise_xor.reduce(odd, axis=1)
        alive = alive[total[alive] > GONE]
    factor = np.where(total > GONE, np.exp(total), 0.0)
    return np.roll(np.fft.irfft(np.where(negative, -factor, factor), points), points // 2)


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
