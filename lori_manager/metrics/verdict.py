"""Did a task get worse by more than its margin? Three verdicts, and what each may get wrong.

All differences here are gains: after - before where higher is better, before - after where
lower is, so that a drop is negative whichever way the scorer points.

- `safe`: the lower bound of the difference, one-sided at `confidence`, is above -margin.
  Each task on its own: with a true drop of exactly the margin it is said with probability
  at most 1 - confidence (non-inferiority).
- else `regressed`: the one-sided test against "no drop" has a p of at most 1 - confidence
  after Holm's step-down over all tasks judged together. Where no task has changed, a
  family of any size is told that something regressed with probability at most
  1 - confidence. The test alone decides, because it is exact: for right/wrong outcomes
  the upper bound then is below 0 as well, for others a bootstrap's may reach just above.
- else `undecided`, with the rows that would decide it.

No verdict spends the other's error: `safe` uses the lower tail of one task, `regressed` the
upper tail over the family.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lori_manager.metrics.bounds import (
    CONFIDENCE,
    FEW,
    RESAMPLES,
    Bounds,
    graded_bounds,
    score_bounds,
)
from lori_manager.metrics.multiple import holm
from lori_manager.metrics.paired import (
    MCNEMAR,
    PairedDifference,
    mcnemar_exact,
    paired_difference,
    sign_flip,
)
from lori_manager.metrics.power import POWER, rows_to_decide, rows_to_decide_mean

Verdict = Literal["safe", "regressed", "undecided"]
SAFE: Verdict = "safe"
REGRESSED: Verdict = "regressed"
UNDECIDED: Verdict = "undecided"


@dataclass(frozen=True)
class Compared:
    """One task's outcomes before and after, and what drop is tolerated."""

    before: ArrayLike  # (rows,), NaN where not measured
    after: ArrayLike  # (rows,) the same rows in the same order
    margin: float  # in the outcomes' units (nats for perplexity), at least 0
    weights: ArrayLike | None = None  # (rows,), token counts for perplexity
    higher_is_better: bool = True
    confidence: float = CONFIDENCE


@dataclass(frozen=True)
class Judged:
    """A verdict with all that it rests on; numbers are NaN where no row has both outcomes."""

    verdict: Verdict
    difference: float  # mean gain on the rows measured in both; negative is a drop
    lower: float  # one-sided bounds of it, each at `confidence`
    upper: float
    p: float  # one-sided, against no drop
    p_holm: float  # the same over the family
    margin: float
    confidence: float
    rows: int  # measured in both
    rows_needed: int | None  # where undecided; None where no number of rows would do
    test: str  # of p: "mcnemar-exact" or "sign-flip"
    note: str
    bounds: str = ""  # of lower and upper: "tango-score", "bca", "gaffke"
    rows_only_before: int = 0  # left out: measured on one side alone
    rows_only_after: int = 0


@dataclass(frozen=True)
class Measured:
    """What one task says by itself, before the family is looked at."""

    paired: PairedDifference  # of the gain
    bounds: Bounds
    p: float  # one-sided, against no drop
    margin: float
    fall: float  # how far the row falls that the lower bound imagines
    changed: float  # share of rows that differ


def judge(
    before: ArrayLike,
    after: ArrayLike,
    margin: float,
    *,
    weights: ArrayLike | None = None,
    higher_is_better: bool = True,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Judged:
    """The verdict on a single task: `judge_family` of one.

    >>> judge([1, 1, 1, 0] * 50, [1, 1, 1, 0] * 50, margin=0.02).verdict
    'safe'
    >>> judge([1, 1, 1, 0] * 50, [1, 1, 0, 0] * 50, margin=0.02).verdict
    'regressed'
    """
    task = Compared(before, after, margin, weights, higher_is_better, confidence)
    return judge_family([task], resamples=resamples, seed=seed)[0]


def judge_family(
    tasks: Sequence[Compared], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Judged]:
    """The verdict on every task of a release.

    Args:
        tasks: outcomes are not modified. Right/wrong outcomes of equal weight are judged by
            McNemar's exact test and `score_bounds`, all else by `sign_flip` and
            `graded_bounds`.
        resamples, seed: of the bootstrap; the same seed gives the same verdicts.
    Returns:
        One Judged a task, in order. A task without a row measured on both sides is
        undecided and is no member of the family.
    Raises:
        ValueError: shapes that differ, infinite outcomes, weights that are negative, a
            margin that is negative or not finite, a confidence outside (.5, 1).
    """
    return decide([measure(task, resamples=resamples, seed=seed) for task in tasks])


def decide(family: Sequence[Measured]) -> list[Judged]:
    """The verdicts of tasks that were measured one by one: Holm over all of them."""
    adjusted = holm([m.p for m in family])
    tests = sum(not math.isnan(m.p) for m in family)
    return [_judged(m, float(p), tests) for m, p in zip(family, adjusted, strict=True)]


def measure(task: Compared, *, resamples: int = RESAMPLES, seed: int = 0) -> Measured:
    """The difference, its bounds and p of one task; raises as `judge_family`."""
    if not (math.isfinite(task.margin) and task.margin >= 0):
        raise ValueError(f"`margin` must be a finite number of at least 0, got {task.margin}")
    if not 0.5 < task.confidence < 1:
        raise ValueError(f"`confidence` must be above .5 and below 1, got {task.confidence}")
    a, b = np.asarray(task.before, dtype=np.float64), np.asarray(task.after, dtype=np.float64)
    paired = paired_difference(a, b, task.weights)
    if not task.higher_is_better:  # a lower outcome is a gain: the sides change places
        only_before, only_after = paired.rows_only_a, paired.rows_only_b
        a, b = b, a
        paired = paired_difference(a, b, task.weights)
        paired = replace(paired, rows_only_a=only_before, rows_only_b=only_after)
    if paired.rows == 0:
        nothing = Bounds(math.nan, math.nan, task.confidence, "")
        return Measured(paired, nothing, math.nan, task.margin, math.nan, math.nan)
    lost, gained = paired.only_a_right, paired.only_b_right
    if paired.test == MCNEMAR and lost is not None and gained is not None:
        bounds = score_bounds(lost, gained, paired.rows, task.confidence)
        p, changed = mcnemar_exact(lost, gained, "less"), (lost + gained) / paired.rows
        return Measured(paired, bounds, p, task.margin, 1.0, changed)
    x, y, w = _common(a, b, task.weights)
    bounds = graded_bounds(x, y, w, confidence=task.confidence, resamples=resamples, seed=seed)
    p = sign_flip(y - x if w is None else w * (y - x), "less")
    moved = int(np.count_nonzero(x != y))
    reach, worst = float(np.ptp(np.concatenate([x, y]))), float(np.min(y - x))
    fall = reach if moved < FEW else max(0.0, -worst)
    return Measured(paired, bounds, p, task.margin, fall, moved / paired.rows)


def _common(
    a: NDArray[np.float64], b: NDArray[np.float64], weights: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]:
    """The rows measured on both sides, and those of them that have a weight."""
    both = ~np.isnan(a) & ~np.isnan(b)
    if weights is None:
        return a[both], b[both], None
    w = np.asarray(weights, dtype=np.float64)
    both &= w > 0
    return a[both], b[both], w[both]


def _judged(m: Measured, p_holm: float, tests: int) -> Judged:
    paired, bounds = m.paired, m.bounds
    verdict, needed, notes = UNDECIDED, None, [bounds.note]
    if paired.rows == 0:
        notes = ["no row was measured on both sides"]
    elif bounds.lower > -m.margin:
        verdict = SAFE
    elif p_holm <= 1 - bounds.confidence:
        verdict = REGRESSED
        if bounds.upper >= 0:
            notes.append("the bootstrap's upper bound reaches 0, the exact test does not")
    else:
        needed, words = _rows_needed(m, tests)
        notes.append(words)
    return Judged(
        verdict,
        paired.difference,
        bounds.lower,
        bounds.upper,
        m.p,
        p_holm,
        m.margin,
        bounds.confidence,
        paired.rows,
        needed,
        paired.test,
        "; ".join(filter(None, notes)),
        bounds.method,
        paired.rows_only_a,
        paired.rows_only_b,
    )


def _rows_needed(m: Measured, tests: int) -> tuple[int | None, str]:
    """Rows for a verdict with the difference and the spread that were seen, and that in words."""
    paired, confidence = m.paired, m.bounds.confidence
    if math.isnan(paired.error):
        return None, "a single row shows no spread"
    if paired.only_a_right is not None and paired.only_b_right is not None:
        lost, gained = paired.only_a_right / paired.rows, paired.only_b_right / paired.rows
        needed = rows_to_decide(lost, gained, m.margin, confidence=confidence, tests=tests)
    else:
        needed = rows_to_decide_mean(
            paired.difference,
            paired.error * math.sqrt(paired.rows),
            m.margin,
            confidence=confidence,
            tests=tests,
            changed=m.changed,
            fall=m.fall,
        )
    if needed is None:
        return None, "more rows like these would not decide it"
    needed = max(needed, paired.rows + 1)
    if m.changed == 0:
        return needed, f"{needed} rows would decide it if still none changed"
    return needed, (
        f"{needed} rows would decide it with probability {POWER:g}, "
        f"if the difference and the share of changed rows, {m.changed:.1%}, stay as seen"
    )
