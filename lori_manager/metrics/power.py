"""What a test set can show: the smallest drop it would find, and the rows that would decide.

A drop counts as found where the one-sided test of `verdict` has p <= alpha.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lori_manager.metrics.bounds import CONFIDENCE, score_deviation
from lori_manager.metrics.quantiles import normal_below, normal_quantile, student_quantile

POWER = 0.8
ALPHA = 0.05
_MANY = 10**9  # rows; more are as good as never
_EXACT = 400  # changed rows expected; with more the normal limit is within half a point


@dataclass(frozen=True)
class Detectable:
    """The smallest drop that is found with probability `power`, and what that assumes."""

    drop: float  # a positive number, in the score's own units; inf where no drop would be found
    power: float
    alpha: float  # one-sided; Holm's first step for a family of m is .05 / m
    rows: int
    assumption: str
    discordance: float = math.nan  # share of rows that change, at that drop; right/wrong only
    deviation: float = math.nan  # of the rows' differences; all else only


def mcnemar_power(rows: int, lost: float, gained: float, alpha: float = ALPHA) -> float:
    """Chance that McNemar's exact one-sided test finds a drop.

    Args:
        rows: how many are scored on both sides.
        lost, gained: true shares of rows that turn wrong, and that turn right.
    Returns:
        P(p <= alpha). Summed over all splits while at most 400 rows are expected to
        change, beyond that its normal limit with a continuity correction.
    Raises:
        ValueError: shares that are negative or over 1 together; alpha outside (0, .5).

    >>> round(mcnemar_power(200, 0.10, 0.03), 3)
    0.847
    """
    _check(rows, alpha)
    if min(lost, gained) < 0 or lost + gained > 1 + 1e-12:
        raise ValueError(f"`lost` and `gained` must be shares of all rows, got {lost} and {gained}")
    changed = min(1.0, lost + gained)
    if changed == 0 or rows == 0:
        return 0.0
    if rows * changed > _EXACT:
        drop, z = lost - gained, normal_quantile(1 - alpha)
        spread = math.sqrt(max(rows * (changed - drop * drop), 1e-12))
        return normal_below((rows * drop - 1.0 - z * math.sqrt(rows * changed)) / spread)
    pairs, chance = _likely(rows, changed)
    most = int(pairs[-1])
    least = _fewest_lost(64 * math.ceil(most / 64), alpha)[pairs]  # in steps: it is kept
    losses = np.arange(most + 1)
    logs = _log_factorials(most)
    share = min(1.0, lost / changed)
    kept = pairs[:, None] - losses
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = (
            logs[pairs][:, None] - logs[losses] - logs[np.maximum(kept, 0)]
            + np.where(losses > 0, losses * np.log(share), 0.0)
            + np.where(kept > 0, kept * np.log1p(-share), 0.0)
        )  # fmt: skip
    counted = (kept >= 0) & (losses >= least[:, None])
    return float(np.minimum(1.0, np.exp(np.where(counted, terms, -np.inf)).sum(1)) @ chance)


@lru_cache(maxsize=4096)
def smallest_drop(
    rows: int, discordance: float, *, alpha: float = ALPHA, power: float = POWER
) -> Detectable:
    """The smallest drop in the share of right answers that a test set would have shown.

    Args:
        rows: how many are scored on both sides.
        discordance: share of them that change, either way; taken as it is while the drop
            fits into it. A larger drop needs more: then only losses are assumed, and the
            discordance told is the drop itself.
        alpha: one-sided level.
    Returns:
        Detectable; drop = inf where even losing every row would not be found.
    Raises:
        ValueError: discordance outside [0, 1], alpha outside (0, .5), power outside (0, 1).

    >>> d = smallest_drop(200, 0.10)
    >>> round(d.drop, 3), d.assumption
    (0.058, '10.0% of the rows change')
    """
    _check(rows, alpha, power)
    if not 0 <= discordance <= 1:
        raise ValueError(f"`discordance` must be a share in [0, 1], got {discordance}")

    def found(drop: float) -> float:
        changed = max(discordance, drop)
        return mcnemar_power(rows, (changed + drop) / 2, (changed - drop) / 2, alpha)

    if found(1.0) < power:
        note = f"{rows} rows are too few for any drop"
        return Detectable(math.inf, power, alpha, rows, note, discordance)
    low, high = 0.0, 1.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if found(middle) < power else (low, middle)
    told = max(discordance, high)
    note = f"{told:.1%} of the rows change" + (", all for the worse" if high >= discordance else "")
    return Detectable(high, power, alpha, rows, note, told)


def smallest_mean_drop(
    rows: int, deviation: float, *, alpha: float = ALPHA, power: float = POWER
) -> Detectable:
    """The smallest drop of a mean that a test set would have shown.

    Args:
        rows: how many are scored on both sides.
        deviation: standard deviation of the rows' differences; for weighted rows the
            standard error of their mean times sqrt(rows).
    Returns:
        Detectable, by the power of the paired t test on normal differences, which the
        sign-flip test shares (with heavy tails it finds more); drop = inf below 5 rows at
        .05, where no sign pattern is rare enough.
    Raises:
        ValueError: a negative deviation, alpha outside (0, .5), power outside (0, 1).
    Source: the noncentral t by Abramowitz and Stegun 26.7.10.

    >>> round(smallest_mean_drop(100, 0.4).drop, 4)
    0.1001
    """
    _check(rows, alpha, power)
    if not deviation >= 0:
        raise ValueError(f"`deviation` must be at least 0, got {deviation}")
    if 2.0**-rows > alpha:
        note = f"{rows} rows are too few for any drop"
        return Detectable(math.inf, power, alpha, rows, note, deviation=deviation)
    t, degrees = student_quantile(1 - alpha, rows - 1), rows - 1
    shift = t * (1 - 1 / (4 * degrees))
    shift += normal_quantile(power) * math.sqrt(1 + t * t / (2 * degrees))
    note = f"the rows' differences are near normal, with a standard deviation of {deviation:.3g}"
    drop = shift * deviation / math.sqrt(rows)
    return Detectable(drop, power, alpha, rows, note, deviation=deviation)


@lru_cache(maxsize=4096)
def rows_to_decide(
    lost: float,
    gained: float,
    margin: float,
    *,
    confidence: float = CONFIDENCE,
    tests: int = 1,
    power: float = POWER,
) -> int | None:
    """Rows with which right/wrong outcomes get a verdict, `safe` or `regressed`.

    Args:
        lost, gained: shares of rows that turn wrong, and right, taken as the true ones.
        margin: the drop that is tolerated.
        tests: tasks in the family: the level of `regressed` is Holm's first step.
    Returns:
        The fewest rows that decide with probability `power`, by the normal limit; where
        nothing changes, those that are sure to give `safe` if still nothing does. None
        where no number would do.
    Raises:
        ValueError: shares or a margin that are negative, a confidence or power out of range.

    >>> rows_to_decide(0.05, 0.05, 0.02)
    1454
    >>> rows_to_decide(0.0, 0.0, 0.02)
    149
    """
    changed, difference = lost + gained, gained - lost
    if min(lost, gained) < 0 or changed > 1 + 1e-9:
        raise ValueError(f"`lost` and `gained` must be shares of all rows, got {lost} and {gained}")
    if changed == 0:
        return _rows_without_change(margin, 1.0, confidence)
    deviation = math.sqrt(max(0.0, changed - difference * difference))
    return _fewest_rows(
        _Course(
            difference, deviation, margin, confidence, tests, changed,
            under_margin=score_deviation(lost, gained, -margin) if margin < 1 else deviation,
            under_none=math.sqrt(changed), falls=0.5, rises=1.0,
        ),
        power,
    )  # fmt: skip


def rows_to_decide_mean(
    difference: float,
    deviation: float,
    margin: float,
    *,
    confidence: float = CONFIDENCE,
    tests: int = 1,
    changed: float = 1.0,
    fall: float = 0.0,
    power: float = POWER,
) -> int | None:
    """Rows with which outcomes that are not just right or wrong get a verdict.

    Args:
        difference, deviation: mean gain of a row (negative for a drop) and its standard
            deviation, taken as the true ones.
        margin, tests: as in `rows_to_decide`.
        changed: share of rows that differ.
        fall: how far the row falls that the lower bound imagines.
    Returns:
        As `rows_to_decide`.
    Raises:
        ValueError: a negative deviation or margin, a confidence or power out of range.

    >>> rows_to_decide_mean(0.0, 0.3, 0.02)
    1211
    """
    if not deviation >= 0 or not 0 <= changed <= 1:
        raise ValueError(
            "`deviation` must be at least 0 and `changed` a share of the rows, "
            f"got {deviation} and {changed}"
        )
    if changed == 0:
        return _rows_without_change(margin, fall, confidence)
    around_none = math.hypot(deviation, difference)  # the sign-flip test's own deviation
    return _fewest_rows(
        _Course(
            difference, deviation, margin, confidence, tests, changed,
            under_margin=deviation, under_none=around_none, falls=fall, rises=0.0,
        ),
        power,
    )  # fmt: skip


@dataclass(frozen=True)
class _Course:
    """How the sum of the rows' differences grows with the rows, and what it is held against."""

    difference: float
    deviation: float
    margin: float
    confidence: float
    tests: int
    changed: float
    under_margin: float  # a row's deviation were the drop the margin
    under_none: float  # were there none
    falls: float  # continuity, or the imagined row, taken off for `safe`
    rises: float  # and added for `regressed`

    def __post_init__(self) -> None:
        if not self.margin >= 0 or not 0.5 < self.confidence < 1 or self.tests < 1:
            raise ValueError(
                "`margin` must be at least 0, `confidence` in (.5, 1) and `tests` at least 1: "
                f"got {self.margin}, {self.confidence} and {self.tests}"
            )

    def decided(self, rows: int) -> float:
        """Chance of a verdict, in the normal limit of the sum."""
        alpha, root = 1 - self.confidence, math.sqrt(rows)
        middle, spread = rows * self.difference, max(root * self.deviation, 1e-12)
        safe = (
            self.falls - rows * self.margin + normal_quantile(1 - alpha) * root * self.under_margin
        )
        chance = normal_below((middle - safe) / spread)
        level = alpha / self.tests
        if rows * self.changed >= -math.log2(level):  # else no split is rare enough
            worse = min(safe, -self.rises - normal_quantile(1 - level) * root * self.under_none)
            chance += normal_below((worse - middle) / spread)
        return chance


def _fewest_rows(course: _Course, power: float) -> int | None:
    if not 0 < power < 1:
        raise ValueError(f"`power` must be in (0, 1), got {power}")
    high = 1
    while course.decided(high) < power:
        high *= 2
        if high > _MANY:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if course.decided(middle) < power else (low, middle)
    return high


def _rows_without_change(margin: float, reach: float, confidence: float) -> int | None:
    """Rows on which none changes until the exact bound says `safe`."""
    if not margin >= 0 or not 0.5 < confidence < 1:
        raise ValueError(
            "`margin` must be at least 0 and `confidence` in (.5, 1): "
            f"got {margin} and {confidence}"
        )
    if margin == 0 or reach == 0:
        return None
    if margin >= reach:
        return 1
    rows = math.log(1 - confidence) / math.log1p(-margin / reach)
    return math.floor(rows) + 1 if rows < _MANY else None


def _check(rows: int, alpha: float, power: float = POWER) -> None:
    if rows < 0 or not 0 < alpha < 0.5 or not 0 < power < 1:
        raise ValueError(
            "`rows` must be at least 0, `alpha` in (0, .5) and `power` in (0, 1): "
            f"got {rows}, {alpha} and {power}"
        )


def _log_factorials(n: int) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])


def _likely(n: int, share: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The counts out of n that matter when each comes with `share`, and their chances."""
    if share >= 1:
        return np.array([n]), np.ones(1)
    spread = 8 * math.sqrt(n * share * (1 - share)) + 8
    k = np.arange(max(0, math.floor(n * share - spread)), min(n, math.ceil(n * share + spread)) + 1)
    logs = _log_factorials(n)
    chance = np.exp(
        logs[n] - logs[k] - logs[n - k] + k * math.log(share) + (n - k) * math.log1p(-share)
    )
    return k, chance


@lru_cache(maxsize=64)
def _fewest_lost(most: int, alpha: float) -> NDArray[np.int64]:
    """For every number of changed rows up to `most`, the fewest losses with p <= alpha.

    One more than all of them where none would do.
    """
    fewest = np.empty(most + 1, dtype=np.int64)
    logs = _log_factorials(most)
    for k in range(most + 1):
        fair = np.exp(logs[k] - logs[: k + 1] - logs[k::-1] - k * math.log(2))
        tail = np.cumsum(fair[::-1])  # of at least k, k - 1, .. losses
        fewest[k] = k + 1 - int(np.searchsorted(tail, alpha * (1 + 1e-9), side="right"))
    return fewest
