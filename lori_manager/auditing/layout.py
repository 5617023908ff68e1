"""The tables of an audit, the same on a terminal and in Markdown: headings and cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lori_manager.auditing import wording
from lori_manager.auditing.results import Audit, Entry, SequenceAudit, TaskAudit
from lori_manager.metrics.continual import Figure


class Table(NamedTuple):
    """Headings, `>` before one that is aligned right, and rows of as many cells."""

    columns: list[str]
    rows: list[list[str]]


_Column = tuple[str, Callable[[Entry, TaskAudit], str]]


def history(task: TaskAudit) -> Table:
    """A row for each entry of a task; columns that would say nothing are left out."""
    return _table([(task, entry) for entry in task.entries])


def judged(found: Audit) -> Table:
    """A row for each task and judged version."""
    entries = [
        (task, entry)
        for task in found.tasks
        for entry in task.entries
        if entry.subject in found.adapters
    ]
    table = _table(entries, best=False)
    rows = [[task.ref, *row] for (task, _), row in zip(entries, table.rows, strict=True)]
    return Table(["task", *table.columns], rows)


def figures(told: Sequence[Figure]) -> Table:
    """A row for each figure."""
    return Table(
        ["figure", "symbol", ">value", ">of", "better", "formula", "source"],
        [
            [
                figure.name,
                figure.symbol,
                wording.figure(figure),
                str(figure.denominator),
                "higher" if figure.higher_is_better else "lower",
                figure.formula,
                figure.source,
            ]
            for figure in told
        ],
    )


def matrix(sequence: SequenceAudit) -> Table:
    """The base and each stage on each task."""
    stages = ("base", *sequence.stages)
    scores = (sequence.base, *sequence.R)
    return Table(
        ["stage" if sequence.kind == "sequence" else "version", *(f">{t}" for t in sequence.tasks)],
        [[s, *map(wording.number, row)] for s, row in zip(stages, scores, strict=True)],
    )


def _table(entries: Sequence[tuple[TaskAudit, Entry]], *, best: bool = True) -> Table:
    columns: list[_Column] = [
        ("subject", lambda e, _: wording.name(e)),
        ("", wording.marks),
        (">score", lambda e, _: wording.score(e)),
    ]
    if any(entry.rows != task.rows for task, entry in entries):
        columns.append((">rows", lambda e, _: f"{e.rows:,}"))
    if any(len(task.precisions) > 1 for task, _ in entries):
        columns.append(("precision", lambda e, _: e.precision or wording.NONE))
    columns += [
        (">change [95%]", lambda e, _: wording.change(e.parent)),
        (">p", lambda e, _: wording.p(e.parent)),
        ("from", lambda e, _: e.parent.against if e.parent else wording.NONE),
        ("", lambda e, _: wording.verdict(e.parent)),
    ]
    if any(entry.previous is not None for _, entry in entries):
        columns += [
            (">to previous [95%]", lambda e, _: wording.change(e.previous)),
            ("", lambda e, _: wording.verdict(e.previous)),
        ]
    if best:
        columns += [
            (">to best [95%]", lambda e, _: wording.change(e.best)),
            ("", lambda e, _: wording.verdict(e.best)),
        ]
    against = {entry.against.against for _, entry in entries if entry.against is not None}
    if len(against) == 1:
        columns.append((f">to {min(against)} [95%]", lambda e, _: wording.change(e.against)))
    elif against:
        columns += [
            (">against [95%]", lambda e, _: wording.change(e.against)),
            ("what", lambda e, _: e.against.against if e.against else wording.NONE),
        ]
    if against:
        columns.append(("", lambda e, _: wording.verdict(e.against)))
    rows = [[cell(entry, task) for _, cell in columns] for task, entry in entries]
    return Table([title for title, _ in columns], rows)
