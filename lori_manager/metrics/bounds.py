"""How far the true paired difference may lie from the one that was measured.

Every bound here is one-sided: the true difference is below `lower` with probability at
most 1 - confidence, and above `upper` likewise; together they are an interval of
confidence 2 confidence - 1 (.90 for .95), as in two one-sided tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lori_manager.metrics.quantiles import normal_below, normal_quantile, student_quantile
from lori_manager.metrics.summary import as_outcomes, as_weights

CONFIDENCE = 0.95
RESAMPLES = 5000
SCORE = "tango-score"
BCA = "bca"
GAFFKE = "gaffke"
FEW = 20  # rows that differ; with fewer a bootstrap cannot know what the others may do
SMALL = 20  # rows; on fewer the score bounds take a whole pair of correction, else half a pair
_CELLS = 2**20  # numbers drawn at once
_KEPT = 2**23  # numbers that are kept for the next comparison on as many rows


@dataclass(frozen=True)
class Bounds:
    """One-sided bounds of a mean difference, each at `confidence`."""

    lower: float
    upper: float
    confidence: float
    method: str  # of the lower bound where the two differ
    note: str = ""  # what was special; "" for nothing


def _level(confidence: float) -> float:
    if not 0.5 < confidence < 1:
        raise ValueError(f"`confidence` must be above .5 and below 1, got {confidence}")
    return 1.0 - confidence


def score_bounds(
    lost: int,
    gained: int,
    rows: int,
    confidence: float = CONFIDENCE,
    *,
    correction: float | None = None,
) -> Bounds:
    """Bounds of the difference of two paired shares of right answers.

    Tango's score bounds with a continuity correction of half a pair (a whole one below 20
    rows); where no row changed, the exact binomial bound 1 - (1 - confidence)^(1/rows),
    about 3 / rows at .95. So they have a width at any outcome. By enumeration the chance
    of a lower bound above the true difference never exceeds 1 - confidence for
    confidences from .8 to .99, except where more than nine rows in ten change (up to
    .058 at .95) and at .99 for fewer than 5 rows.

    Args:
        lost: rows right before and wrong after.
        gained: rows wrong before and right after.
        rows: all rows, at least 1.
        correction: of continuity, in pairs, in place of those; 0 gives Tango's own bounds.
    Raises:
        ValueError: counts that are negative or do not fit; confidence outside (.5, 1).
    Source: Tango 1998, Statistics in Medicine 17, 891-908. Differs: the correction, and
    the bound without discordant pairs, which Tango's would put at 2.7 / rows.

    >>> b = score_bounds(lost=7, gained=1, rows=21)
    >>> round(b.lower, 3), round(b.upper, 3)
    (-0.504, -0.047)
    >>> round(score_bounds(0, 0, 200).lower, 4)
    -0.0149
    """
    level = _level(confidence)
    if min(lost, gained) < 0 or rows < max(1, lost + gained):
        raise ValueError(
            "`lost` and `gained` must be at least 0 and together at most `rows`, at least 1: "
            f"got {lost}, {gained} and {rows}"
        )
    if correction is None and lost == gained == 0:
        reach = 1.0 - level ** (1.0 / rows)
        return Bounds(-reach, reach, confidence, SCORE, "no row changed: the exact binomial bound")
    z = normal_quantile(confidence)
    if correction is None:
        correction = 1.0 if rows < SMALL else 0.5
    return Bounds(
        _score_lower(lost, gained, rows, z, correction),
        -_score_lower(gained, lost, rows, z, correction),
        confidence,
        SCORE,
    )


def score_deviation(lost: float, gained: float, delta: float) -> float:
    """Standard deviation of a row's difference if its mean were delta.

    Args:
        lost, gained: the shares of rows that were seen to change.
    Returns:
        sqrt(2 q + delta (1 - delta)), q being the share of lost rows that is most likely
        given the mean, the root of a quadratic.
    Source: Tango 1998.

    >>> round(score_deviation(0.1, 0.1, 0.0), 4)
    0.4472
    """
    linear = (2 - gained + lost) * delta - lost - gained
    root = math.sqrt(max(0.0, linear**2 + 8 * lost * delta * (1 - delta)))
    return math.sqrt(max(0.0, (root - linear) / 2 + delta * (1 - delta)))


def _score_lower(lost: int, gained: int, rows: int, z: float, correction: float) -> float:
    """The difference below the observed one whose score statistic is z, by bisection."""
    low, high = -1.0, (gained - lost) / rows
    while high - low > 1e-12:
        delta = (low + high) / 2
        deviation = score_deviation(lost / rows, gained / rows, delta) * math.sqrt(rows)
        if gained - lost - rows * delta - correction > z * deviation:
            low = delta
        else:
            high = delta
    return low


def bca_bounds(
    differences: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
    expand: bool = True,
) -> Bounds:
    """Bounds of a (weighted) mean by the bias-corrected and accelerated bootstrap of its rows.

    Pairs are resampled as pairs, their weights with them.

    Args:
        differences: (n,) finite, one per pair. Not modified.
        weights: (n,) positive, or None.
        resamples: how many; quantiles of 5000 wander by .003 in level.
        expand: widen the level for few rows as Student's distribution asks, without which
            20 normal differences miss .065 instead of .05; False is the textbook's BCa.
    Returns:
        Bounds. Without spread (one row, or all differences equal) a bootstrap has nothing
        to say: both bounds are the mean, and `note` tells.
    Raises:
        ValueError: no row, NaN, weights that do not fit, confidence outside (.5, 1).
    Source: Efron 1987, JASA 82, 171-185; the expansion is Hesterberg 2015, The American
    Statistician 69, 371-386, section 3.4.

    >>> b = bca_bounds([0.1, 0.2, -0.1, 0.4, 0.3, 0.0, 0.2, 0.1])
    >>> b.lower < 0.15 < b.upper
    True
    """
    level = _level(confidence)
    d, w = _rows(differences, weights)
    n = d.size
    mean = _mean(d, w)
    if n == 1 or float(np.ptp(d)) == 0:
        note = "one row" if n == 1 else "all differences are equal"
        return Bounds(mean, mean, confidence, BCA, f"{note}: a bootstrap sees no spread")
    drawn = _drawn("rows", n, resamples, seed)
    if w is None:
        means = np.concatenate([counts @ d / n for counts in drawn])
    else:
        means = np.concatenate([counts @ (w * d) / (counts @ w) for counts in drawn])
    hair = 1e-12 * float(np.abs(d).max())  # equal sums added up in another order
    under = float(np.mean(means < mean - hair) + np.mean(means <= mean + hair)) / 2
    bias = normal_quantile(min(max(under, 0.5 / resamples), 1 - 0.5 / resamples))
    left = (d.sum() - d) / (n - 1) if w is None else (w @ d - w * d) / (w.sum() - w)
    u = left.mean() - left  # jackknife influences
    u = u / (float(np.abs(u).max()) or 1.0)  # tiny ones would vanish when squared
    acceleration = float(np.sum(u**3)) / (6 * (float(np.sum(u**2)) or 1.0) ** 1.5)
    if expand:
        widened = math.sqrt(n / (n - 1)) * student_quantile(level, n - 1)
        level = max(normal_below(widened), 1e-300)

    def quantile(z: float) -> float:
        shifted = bias + z
        stretch = 1 - acceleration * shifted
        if stretch <= 0:
            return float(shifted > 0)
        return normal_below(bias + shifted / stretch)

    z = normal_quantile(level)
    lower, upper = np.quantile(means, [quantile(z), quantile(-z)]).tolist()
    return Bounds(lower, upper, confidence, BCA)


def gaffke_bounds(
    differences: ArrayLike,
    worst: float,
    best: float,
    weights: ArrayLike | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Bounds:
    """Bounds of a (weighted) mean from its rows and one more, the worst (best) that can be.

    Every row, and that imagined one, gets a random exponential weight; the bound is the
    quantile of the weighted mean so drawn. For right or wrong answers it is the exact
    binomial (Clopper-Pearson) bound, for any differences in [worst, best] no case is known
    where it fails, and it has a width where all rows are equal.

    Args:
        differences: (n,) finite, one per pair. Not modified.
        worst: the smallest that a difference can be; no more than any.
        best: the largest.
        weights: (n,) positive, or None; the imagined row weighs their mean.
    Raises:
        ValueError: as `bca_bounds`; or a difference outside [worst, best].
    Source: Gaffke 2005, Mathematical Methods of Statistics 14, 451-467; Learned-Miller
    and Thomas 2019, arXiv:1905.06208.

    >>> b = gaffke_bounds([0.0] * 200, -1.0, 1.0)
    >>> round(b.lower, 4)
    -0.0149
    """
    level = _level(confidence)
    d, w = _rows(differences, weights)
    if not worst <= float(d.min()) <= float(d.max()) <= best:
        raise ValueError(
            f"`differences` must lie between `worst` and `best`, [{worst}, {best}]: "
            f"they reach from {float(d.min())} to {float(d.max())}"
        )
    if float(np.ptp(d)) == 0:  # one weight against all others: a beta distribution
        rows = d.size if w is None else float(w.sum() ** 2 / np.sum(w**2))
        share, value = 1.0 - level ** (1.0 / rows), float(d[0])
        lower, upper = value + share * (worst - value), value + share * (best - value)
        return Bounds(lower, upper, confidence, GAFFKE)
    weight = np.ones(d.size) if w is None else w / w.mean()
    lows, highs = [], []
    for drawn in _drawn("exponentials", d.size + 1, resamples, seed):
        one, rest = drawn[:, 0], drawn[:, 1:]
        total, sums = one + rest @ weight, rest @ (weight * d)
        lows.append((sums + one * worst) / total)
        highs.append((sums + one * best) / total)
    lower = float(np.quantile(np.concatenate(lows), level))
    upper = float(np.quantile(np.concatenate(highs), 1 - level))
    return Bounds(lower, upper, confidence, GAFFKE)


def graded_bounds(
    before: ArrayLike,
    after: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Bounds:
    """Bounds of the mean of after - before, for outcomes that are not just right or wrong.

    The upper bound is BCa's. A release rests on the lower one, and a bootstrap does not
    know what rows may do that it has not seen, so that is the lower of BCa's and
    Gaffke's. Its imagined row falls as far as the worst row that was seen; or, where
    fewer than 20 rows differ, as far as the outcomes reach from smallest to largest.
    Where no row differs, both bounds are Gaffke's.

    Args:
        before, after: (n,) finite, the same rows in the same order. Not modified.
        weights: (n,) positive, or None.
    Returns:
        Bounds. Where all outcomes are one number nothing says how far a row can move:
        the bounds are infinite, and `note` tells.
    Raises:
        ValueError: shapes differ, no row, NaN, weights that do not fit.
    """
    a, b = as_outcomes(before, "before"), as_outcomes(after, "after")
    if a.shape != b.shape:
        raise ValueError(f"`before` has {a.size} rows, `after` has {b.size}: they must be the same")
    d, w = _rows(b - a, weights)
    both = np.concatenate([a, b])
    reach = float(np.ptp(both))
    if reach == 0:
        _level(confidence)
        note = "every outcome is the same number: nothing says how far a row can move"
        return Bounds(-math.inf, math.inf, confidence, GAFFKE, note)
    moved = int(np.count_nonzero(d))
    few = moved < FEW
    worst, best = (-reach, reach) if few else (float(d.min()), float(d.max()))
    careful = gaffke_bounds(
        d, worst, best, w, confidence=confidence, resamples=resamples, seed=seed
    )
    if moved == 0 or d.size == 1:
        return replace(careful, note=f"no spread to see: a further row may move by {reach:.3g}")
    bca = bca_bounds(d, w, confidence=confidence, resamples=resamples, seed=seed)
    note = f"only {moved} rows differ: a further row may fall by {reach:.3g}" if few else ""
    if careful.lower < bca.lower:
        return replace(careful, upper=bca.upper, note=note)
    return replace(bca, note=note)


def _rows(
    differences: ArrayLike, weights: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Differences and weights of the rows that count, checked."""
    d = as_outcomes(differences, "differences")
    if np.isnan(d).any():
        raise ValueError("`differences` must be measured in every row: drop the NaN first")
    w, kept = as_weights(weights, np.ones(d.shape, dtype=bool))
    if not kept.any():
        raise ValueError("`differences` must have at least one row that counts, got none")
    return d[kept], w


def _mean(d: NDArray[np.float64], w: NDArray[np.float64] | None) -> Any:
    """Weighted means along the last axis."""
    return d.mean(-1) if w is None else (w * d).sum(-1) / w.sum(-1)


def _drawn(
    what: Literal["rows", "exponentials"], n: int, resamples: int, seed: int
) -> Iterable[NDArray[np.float64]]:
    """Blocks (k, n) of random numbers, `resamples` lines in all.

    "rows": how often each of n rows was drawn in n draws; "exponentials": standard
    exponential numbers. Those of few rows are kept, as one test set meets many comparisons.
    """
    if resamples * n <= _KEPT:
        return _kept(what, n, resamples, seed)
    return _blocks(what, n, resamples, seed)


@lru_cache(maxsize=2)  # one of each kind
def _kept(what: str, n: int, resamples: int, seed: int) -> tuple[NDArray[np.float64], ...]:
    return tuple(_blocks(what, n, resamples, seed))


def _blocks(what: str, n: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    random = np.random.default_rng(seed)
    size = max(1, _CELLS // n)
    while resamples > 0:
        k = min(size, resamples)
        if what == "rows":
            places = random.integers(0, n, (k, n)) + np.arange(k)[:, None] * n
            counts = np.bincount(places.ravel(), minlength=k * n)
            yield counts.reshape(k, n).astype(np.float64)
        else:
            yield random.standard_exponential((k, n))
        resamples -= k
