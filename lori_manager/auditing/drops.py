"""Drops beyond what the caller allows, by value alone; significance is told, not required."""

from __future__ import annotations

import math

from lori_manager.auditing.comparing import Comparer
from lori_manager.auditing.families import BEST, Families
from lori_manager.auditing.groups import Group, alike
from lori_manager.auditing.lineage import Lineage
from lori_manager.auditing.results import Comparison
from lori_manager.metrics.paired import PairedDifference
from lori_manager.records import Adapter, Finding, Score

_ROUNDING = 1e-9  # means of outcomes carry float error: .90 - .85 is not more than .05


def drop(
    adapter: Adapter,
    group: Group,
    lineage: Lineage,
    comparer: Comparer,
    families: Families,
    max_drop: float,
) -> list[Finding]:
    """At most one finding: the adapter's largest drop on this task within its line's history."""
    now = group.score(adapter.ref)
    if now is None:
        return []
    largest, best = 0.0, None
    before = (lineage.history(adapter) - {adapter.ref}) & group.scores.keys()
    for subject in lineage.in_time(before):
        for then in alike(now, group.scores[subject]):
            fell = _fell(then, now, comparer)
            if fell > largest:
                largest, best = fell, then
    if best is None or largest <= max_drop + _ROUNDING:
        return []
    paired = families.correct(BEST, best, now, comparer.compare([(best, now)])[0])
    return [_finding(adapter, group, best, now, largest, max_drop, paired)]


def _fell(then: Score, now: Score, comparer: Comparer) -> float:
    """How much worse `now` is."""
    fell = comparer.goodness(then) - comparer.goodness(now)
    if not (comparer.complete(then) and comparer.complete(now)):
        # On different rows the two values alone could show or hide a drop.
        (d,) = comparer.differences([(then, now)])
        if isinstance(d, PairedDifference) and not math.isnan(d.difference):
            return -d.difference if comparer.higher_is_better else d.difference
    return fell


def _finding(
    adapter: Adapter,
    group: Group,
    best: Score,
    now: Score,
    largest: float,
    max_drop: float,
    paired: Comparison,
) -> Finding:
    p = f"paired p = {paired.p:.2g} on {paired.rows} rows; " if paired.rows else ""
    note = f"{paired.note}; " if paired.note else ""
    message = (
        f"{group.ref}: {now.subject} is at {now.value:.4g}, {largest:.4g} worse than the best, "
        f"{best.subject} at {best.value:.4g} ({p}{note}allowed {max_drop:g})"
    )
    facts = {
        "line": adapter.line,
        "task": group.task,
        "revision": group.revision,
        "best": best.subject,
        "best_value": best.value,
        "now": now.subject,
        "now_value": now.value,
        "drop": largest,
        "error": paired.error,
        "low": paired.low,
        "high": paired.high,
        "p": paired.p,
        "rows": paired.rows,
        "real": paired.real,
        "max_drop": max_drop,
    }
    return Finding("drop", now.subject, message, facts)
