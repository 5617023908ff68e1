"""How an audit's figures read, the same in every format for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lori_manager.auditing.choosing import WHAT_MATTERS
from lori_manager.auditing.results import (
    SIGNIFICANCE,
    Audit,
    Comparison,
    Entry,
    SequenceAudit,
    TaskAudit,
)
from lori_manager.metrics.continual import Figure

NONE = "-"


def number(value: float, digits: int = 3) -> str:
    """`0.853`, or `-` for what was not measured."""
    return NONE if math.isnan(value) else f"{value:.{digits}f}"


def score(entry: Entry) -> str:
    """`0.853 +- 0.012`: a value and its standard error."""
    told = "" if math.isnan(entry.error) else f" +- {entry.error:.3f}"
    return NONE if math.isnan(entry.value) else f"{entry.value:.3f}{told}"


def change(comparison: Comparison | None) -> str:
    """`-0.065 [-0.108, -0.022]`: a difference and its 95% interval."""
    if comparison is None or math.isnan(comparison.change):
        return NONE
    if math.isnan(comparison.low):
        return f"{comparison.change:+.3f}"
    return f"{comparison.change:+.3f} [{comparison.low:+.3f}, {comparison.high:+.3f}]"


def p(comparison: Comparison | None) -> str:
    """`0.031`, `<1e-6`."""
    if comparison is None or math.isnan(comparison.p):
        return NONE
    return "<1e-6" if comparison.p < 1e-6 else f"{comparison.p:.2g}"


def verdict(comparison: Comparison | None) -> str:
    """A word where a change is beyond noise."""
    if comparison is None or not comparison.real:
        return ""
    return "worse" if comparison.worse else "better"


def name(entry: Entry) -> str:
    """The subject, and where its outcomes come from if not from here."""
    return entry.subject + (f" ({entry.origin})" if entry.imported else "")


def marks(entry: Entry, task: TaskAudit) -> str:
    """`own, best, production`: what is said of this version on this task."""
    own = ["own"] if entry.subject == task.own else []
    best = ["best"] if entry.subject == task.best else []
    return ", ".join([*own, *best, *entry.aliases])


def heading(task: TaskAudit) -> str:
    """`nlu#1: exact_match, 200 rows, best nlu@1`."""
    best = f", best {task.best}" if task.best else ""
    lower = ", lower is better" if task.higher_is_better is False else ""
    return f"{task.ref}: {task.scorer}{lower}, {task.rows:,} rows{best}"


def sensitivity(task: TaskAudit) -> str | None:
    """What this test set could have shown; None where nothing was compared."""
    found = task.sensitivity
    if found is None:
        return None
    told = f"with power {found.power:g} at p < {found.alpha:.2g}"
    if math.isinf(found.drop):
        return f"no drop could have been shown {told}: {found.assumption}"
    drop = f"{found.drop:.3f}"
    return f"smallest drop that could have been shown {told}: {drop}, where {found.assumption}"


def notes(task: TaskAudit) -> list[str]:
    """What has to be known about the table: rows on one side only, unequal precision, cuts."""
    told: dict[str, None] = {}
    for entry in task.entries:
        for comparison in filter(None, (entry.parent, entry.previous, entry.best, entry.against)):
            pair = f"{entry.subject} to {comparison.against}"
            if comparison.note:
                told[f"{pair}: {comparison.note}"] = None
            before, after = comparison.rows_only_before, comparison.rows_only_after
            if before or after:
                told[
                    f"{pair}: compared on {comparison.rows:,} rows; {before:,} were scored only "
                    f"for {comparison.against}, {after:,} only for {entry.subject}"
                ] = None
    if task.omitted:
        real = f", {task.regressions_omitted} of them real regressions" * bool(
            task.regressions_omitted
        )
        shown = len(task.entries)
        told[
            f"{task.omitted:,} more scores{real}; these {shown} are {WHAT_MATTERS}: --all shows all"
        ] = None
    return list(told)


def corrections(judged: Sequence[str], tasks: int) -> str:
    """What `worse` and `better` mean, in one sentence."""
    if tasks < 2:
        return f"worse, better: p < {SIGNIFICANCE:g}"
    who = ", ".join(judged) if len(judged) <= 6 else f"the latest of {len(judged)} lines"
    if not judged:
        return f"worse, better: p x {tasks} tasks < {SIGNIFICANCE:g} (Bonferroni)"
    return (
        f"worse, better: p < {SIGNIFICANCE:g}, corrected by Holm over the tasks of one version "
        f"({who}); for other versions and against the best, p x {tasks} tasks"
    )


def figure(found: Figure) -> str:
    """Signed where it is a difference."""
    signed = " - " in found.formula and not math.isnan(found.value)
    return f"{found.value:+.3f}" if signed else number(found.value)


def matrix(sequence: SequenceAudit) -> str:
    """`support: R, every stage on every task`."""
    rows = "stage" if sequence.kind == "sequence" else "version"
    return f"{sequence.line}: R, every {rows} on every task"


def about_references(sequence: SequenceAudit) -> list[str]:
    """What intransigence stands on."""
    missing = [t for t, r in zip(sequence.tasks, sequence.references, strict=False) if not r]
    known = [r for r in sequence.references if r is not None]
    told = []
    if missing:
        told.append(f"I needs an adapter trained on each task alone; none for {some(missing)}")
    if known:
        told.append(f"I is against {some(known)}")
    return told


def some(words: Iterable[str]) -> str:
    """The first six of them, and how many more there are."""
    words = list(words)
    more = f" and {len(words) - 6} more" if len(words) > 6 else ""
    return ", ".join(words[:6]) + more


def outcome(found: Audit) -> str:
    """`1 real regression, 0 drops beyond 0.05` in one line."""
    count = len(found.regressions)
    told = f"{count or 'no'} real regression{'s' * (count != 1)}"
    if found.max_drop is not None:
        drops = len(found.findings)
        told += f", {drops or 'no'} drop{'s' * (drops != 1)} beyond {found.max_drop:g}"
    return told
