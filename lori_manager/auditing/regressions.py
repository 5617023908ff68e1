"""Real regressions of judged adapters as findings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lori_manager.auditing.families import AGAINST, PARENT, PREVIOUS
from lori_manager.auditing.groups import Group
from lori_manager.auditing.results import HOLM, Comparison, Entry
from lori_manager.records import Finding

REGRESSION = "regression"


def regressions(entries: Iterable[Entry], group: Group) -> Iterator[Finding]:
    """Where `entries` are really worse than anything but the best that was before."""
    for entry in entries:
        said = set()
        for kind, comparison in (
            (PARENT, entry.parent),
            (PREVIOUS, entry.previous),
            (AGAINST, entry.against),
        ):
            if comparison is None or not (comparison.real and comparison.worse):
                continue
            if comparison.against not in said:
                yield _finding(entry, group, kind, comparison)
            said.add(comparison.against)


def _finding(entry: Entry, group: Group, kind: str, c: Comparison) -> Finding:
    corrected = f", {c.p_corrected:.2g} by Holm over {c.family}" if c.correction == HOLM else ""
    message = (
        f"{group.ref}: {entry.subject} is at {entry.value:.4g}, {abs(c.change):.4g} worse than "
        f"{c.against} (95% from {c.low:+.4g} to {c.high:+.4g}; p = {c.p:.2g}{corrected}; "
        f"{c.rows} rows)"
    )
    facts = {
        "task": group.task,
        "revision": group.revision,
        "kind": kind,
        "against": c.against,
        "value": entry.value,
        "precision": entry.precision,
        "change": c.change,
        "low": c.low,
        "high": c.high,
        "p": c.p,
        "p_corrected": c.p_corrected,
        "correction": c.correction,
        "family": c.family,
        "rows": c.rows,
        "gained": c.gained,
        "lost": c.lost,
        "note": c.note,
    }
    return Finding(REGRESSION, entry.subject, message, facts)
