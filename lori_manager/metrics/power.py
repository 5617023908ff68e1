"""What a test set can show: the smallest drop it would find, and the rows that would decide.

A drop counts as found where the one-sided test of `verdict` has p <= alpha.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lori_manager.metrics.quantiles import normal_below, normal_quantile, student_quantile

POWER = 0.8
ALPHA = 0.05
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
        Detectable, by the power of the paired t test, which the sign-flip test shares;
        drop = inf below 5 rows at .05, where no sign pattern is rare enough.
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
    note = f"the rows' differences have a standard deviation of {deviation:.3g}"
    drop = shift * deviation / math.sqrt(rows)
    return Detectable(drop, power, alpha, rows, note, deviation=deviation)


def rows_to_decide(
    difference: float,
    deviation: float,
    margin: float,
    *,
    confidence: float = 0.95,
    tests: int = 1,
    changed: float = 1.0,
    reach: float = 1.0,
    correction: float = 0.5,
    power: float = POWER,
) -> int | None:
    """Rows with which a verdict falls with probability `power`, were all else to stay as seen.

    Args:
        difference: mean gain a row (negative for a drop), taken as the true one.
        deviation: standard deviation of the rows' differences.
        margin: the drop that is tolerated.
        tests: tasks in the family: the level of `regressed` is Holm's first step.
        changed: share of rows that differ. For none: the rows with which `safe` is sure to
            follow if still none does.
        reach: how far a row can fall, used where none differs.
        correction: what a bound adds, in rows' differences: .5 for right/wrong.
    Returns:
        The fewer of the rows for `safe` and for `regressed`; None where neither would come.
    Raises:
        ValueError: a negative margin, a confidence or power outside (0, 1).

    >>> rows_to_decide(-0.01, 0.3, 0.03)
    1441
    >>> rows_to_decide(0.0, 0.0, 0.02, changed=0.0)
    149
    """
    if not margin >= 0 or not 0 < confidence < 1 or not 0 < power < 1 or tests < 1:
        raise ValueError(
            "`margin` must be at least 0, `confidence` and `power` in (0, 1), `tests` at least 1: "
            f"got {margin}, {confidence}, {power} and {tests}"
        )
    alpha = 1.0 - confidence
    if changed == 0:
        if not 0 < margin < reach:
            return 1 if margin >= reach > 0 else None
        return math.floor(math.log(alpha) / math.log1p(-margin / reach)) + 1
    beta, wanted = normal_quantile(power), []
    for gap, level in ((difference + margin, alpha), (-difference, alpha / tests)):
        if gap > 0:
            spread = (normal_quantile(1 - level) + beta) * deviation
            # The root of: gap rows - correction = spread sqrt(rows).
            root = (spread + math.sqrt(spread * spread + 4 * gap * correction)) / (2 * gap)
            # Below so many changed rows no split of them is rare enough.
            fewest = math.ceil(-math.log2(level)) / changed if gap == -difference else 0.0
            wanted.append(math.ceil(max(root * root, fewest)))
    return min(wanted, default=None)


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
