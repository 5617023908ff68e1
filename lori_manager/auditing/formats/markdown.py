"""GitHub's Markdown, for pull requests: what was judged first, every task's history folded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from lori_manager.auditing import wording
from lori_manager.auditing.results import Audit, Entry, SequenceAudit, TaskAudit

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~<>&@$-])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def text(found: Audit) -> str:
    """The whole document."""
    return "\n".join(_lines(found)) + "\n"


def escape(told: str) -> str:
    """`told` as plain words: no markup, link, mention, cell or line of its own.

    >>> escape("a|b <c>")
    'a\\\\|b \\\\<c\\\\>'
    """
    return _SPECIAL.sub(r"\\\1", _CONTROL.sub(" ", told))


def _lines(found: Audit) -> Iterator[str]:
    yield f"### lori audit{' of ' + escape(found.ref) if found.ref else ''}"
    yield ""
    yield f"**{escape(wording.outcome(found))}.**"
    yield ""
    findings = [*found.regressions, *found.findings]
    yield from (f"- {escape(f'{finding.kind}: {finding.message}')}" for finding in findings)
    yield from [""] * bool(findings)
    yield from _judged(found)
    yield escape(wording.corrections(found.adapters, len({t.task for t in found.tasks})))
    for task in found.tasks:
        yield from _folded(wording.heading(task), _task(task))
    for sequence in found.sequences:
        title = f"{sequence.line}: R, every version on every task"
        yield from _folded(title, _sequence(sequence))
    if found.notes:
        yield ""
        yield from (f"- note: {escape(note)}" for note in found.notes)


def _judged(found: Audit) -> Iterator[str]:
    """One line for each judged version and task."""
    rows = [
        [task.ref, *_cells(entry, task)[:-1]]
        for task in found.tasks
        for entry in task.entries
        if entry.subject in found.adapters
    ]
    if rows:
        yield from _table(["task", *_COLUMNS[:-1]], rows)
        yield ""


_COLUMNS = (
    "version", "", ">score", ">change (95%)", ">p", "from", "", ">to previous", "",
    ">against", "what", "", ">to best",
)  # fmt: skip


def _cells(entry: Entry, task: TaskAudit) -> list[str]:
    parent, previous, against = entry.parent, entry.previous, entry.against
    precision = f" {entry.precision}" if len(task.precisions) > 1 else ""
    return [
        wording.name(entry) + precision,
        wording.marks(entry, task),
        wording.score(entry),
        wording.change(parent),
        wording.p(parent),
        parent.against if parent else "",
        wording.verdict(parent),
        wording.change(previous) if previous else "",
        wording.verdict(previous),
        wording.change(against) if against else "",
        against.against if against else "",
        wording.verdict(against),
        wording.change(entry.best) if entry.best else "",
    ]


def _task(task: TaskAudit) -> Iterator[str]:
    if task.note:
        yield escape(f"note: {task.note}")
        yield ""
    if task.entries:
        yield from _table(_COLUMNS, [_cells(entry, task) for entry in task.entries])
        yield ""
    told = wording.sensitivity(task)
    yield from (f"- {escape(note)}" for note in [*([told] if told else []), *wording.notes(task)])


def _sequence(sequence: SequenceAudit) -> Iterator[str]:
    rows = [
        [stage, *map(wording.number, scores)]
        for stage, scores in zip(
            ("base", *sequence.stages), (sequence.base, *sequence.R), strict=True
        )
    ]
    yield from _table(["version", *(f">{task}" for task in sequence.tasks)], rows)
    yield ""
    if sequence.note:
        yield escape(f"note: {sequence.note}")
    if sequence.figures:
        yield from _table(
            ["figure", "symbol", ">value", ">of", "better", "formula"],
            [
                [f.name, f.symbol, wording.figure(f), str(f.denominator),
                 "higher" if f.higher_is_better else "lower", f.formula]
                for f in sequence.figures
            ],
        )  # fmt: skip
        yield ""
        yield from (f"- {escape(told)}" for told in wording.about_references(sequence))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield _row(escape(c.removeprefix(">")) or " " for c in columns)
    yield _row("--:" if c.startswith(">") else "---" for c in columns)
    yield from (_row(map(escape, row)) for row in rows)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _folded(title: str, body: Iterable[str]) -> Iterator[str]:
    yield ""
    yield f"<details><summary>{_html(title)}</summary>"
    yield ""
    yield from body
    yield ""
    yield "</details>"


def _html(told: str) -> str:
    plain = _CONTROL.sub(" ", told)
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
