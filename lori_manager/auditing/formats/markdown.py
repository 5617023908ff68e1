"""GitHub's Markdown, for pull requests: what was judged first, every task's history folded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from lori_manager.auditing import layout, wording
from lori_manager.auditing.results import Audit, SequenceAudit, TaskAudit

_SPECIAL = re.compile(r"([\\`*_{}\[\]|~<>&$])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_LINKED = re.compile(r"#(?=\d)|(?<!\w)@(?=\w)")  # GitHub makes links of nlu#1 and @name


def text(found: Audit) -> str:
    """The whole document."""
    return "\n".join(_lines(found)) + "\n"


def escape(told: str) -> str:
    """`told` as plain words: no markup, link, mention, cell or line of its own.

    >>> print(escape("a|b <c> nlu#1"))
    a\\|b \\<c\\> nlu#<!-- -->1
    """
    plain = _SPECIAL.sub(r"\\\1", _CONTROL.sub(" ", told))
    return _LINKED.sub(lambda found: f"{found[0]}<!-- -->", plain)


def _lines(found: Audit) -> Iterator[str]:
    yield f"### lori audit{' of ' + escape(found.ref) if found.ref else ''}"
    yield ""
    yield f"**{escape(wording.outcome(found))}.**"
    yield ""
    findings = [*found.regressions, *found.findings]
    yield from (f"- {escape(f'{finding.kind}: {finding.message}')}" for finding in findings)
    yield from [""] * bool(findings)
    judged = layout.judged(found)
    if judged.rows:
        yield from _table(judged)
        yield ""
    yield escape(wording.corrections(found.adapters, len({t.task for t in found.tasks})))
    for task in found.tasks:
        yield from _folded(wording.heading(task), _task(task))
    for sequence in found.sequences:
        yield from _folded(wording.matrix(sequence), _sequence(sequence))
    if found.notes:
        yield ""
        yield from (f"- note: {escape(note)}" for note in found.notes)


def _task(task: TaskAudit) -> Iterator[str]:
    if task.note:
        yield escape(f"note: {task.note}")
        yield ""
    if task.entries:
        yield from _table(layout.history(task))
        yield ""
    told = wording.sensitivity(task)
    yield from (f"- {escape(note)}" for note in [*([told] if told else []), *wording.notes(task)])


def _sequence(sequence: SequenceAudit) -> Iterator[str]:
    yield from _table(layout.matrix(sequence))
    yield ""
    if sequence.note:
        yield escape(f"note: {sequence.note}")
    if sequence.figures:
        yield from _table(layout.figures(sequence.figures))
        yield ""
        yield from (f"- {escape(told)}" for told in wording.about_references(sequence))


def _table(table: layout.Table) -> Iterator[str]:
    yield _row(escape(c.removeprefix(">")) or " " for c in table.columns)
    yield _row("--:" if c.startswith(">") else "---" for c in table.columns)
    yield from (_row(map(escape, row)) for row in table.rows)


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
