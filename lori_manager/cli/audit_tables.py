"""An audit on the terminal, each task as soon as it is ready."""

from __future__ import annotations

import math
import sys

import typer

from lori_manager.auditing import AuditRun, layout, wording
from lori_manager.auditing.results import SequenceAudit, TaskAudit
from lori_manager.cli import output

_MOST_TASKS = 12  # columns of a matrix; more tasks become lines
_FIRST, _LAST = 3, 9  # versions of a long matrix, tasks of a wide one


def show(run: AuditRun) -> None:
    """Every task's history, then the matrices, then what was found."""
    whole = run.asked["most"] is None
    for task in run.tasks():
        _show_task(task)
        sys.stdout.flush()
    for sequence in run.sequences():
        _show_sequence(sequence, whole=whole)
    found = run.rest()
    typer.echo()
    for note in found.notes:
        typer.echo(f"note: {note}")
    for finding in (*found.regressions, *found.findings):
        typer.echo(output.one_line(f"{finding.kind}: {finding.message}"))
    typer.echo(wording.outcome(found))
    typer.echo(wording.corrections(found.adapters, len(run.latest)))


def _show_task(task: TaskAudit) -> None:
    output.title(wording.heading(task))
    if task.note:
        typer.echo(f"note: {task.note}")
    if not task.entries:
        return
    output.table(*layout.history(task))
    told = wording.sensitivity(task)
    if told is not None:
        typer.echo(told)
    for note in wording.notes(task):
        typer.echo(output.one_line(f"note: {note}"))


def _show_sequence(sequence: SequenceAudit, *, whole: bool) -> None:
    output.title(wording.matrix(sequence))
    if whole or len(sequence.tasks) <= _MOST_TASKS:
        _show_matrix(sequence, whole=whole)
    else:
        _show_ends(sequence)
    if sequence.outside:
        typer.echo(f"only scored: {wording.some(sequence.outside)}")
    if sequence.note:
        typer.echo(f"note: {sequence.note}")
    if not sequence.figures:
        return
    typer.echo()
    output.table(*layout.figures((*sequence.figures, *(sequence.variants if whole else ()))))
    for told in wording.about_references(sequence):
        typer.echo(told)


def _show_matrix(sequence: SequenceAudit, *, whole: bool) -> None:
    """A line for each version; of a long line the ends."""
    columns, (base, *rows) = layout.matrix(sequence)
    hidden = len(rows) - _FIRST - _LAST
    if whole or hidden <= _FIRST + _LAST:
        hidden = 0
    else:
        rows = [*rows[:_FIRST], *rows[-_LAST:]]
    output.table(columns, [base, *rows])
    if hidden:
        typer.echo(f"{hidden:,} versions between them: --all shows all")


def _show_ends(sequence: SequenceAudit) -> None:
    """A line for each of the tasks that changed most since they came in."""
    rows = []
    for i, task in enumerate(sequence.tasks):
        learned = sequence.R[sequence.introduced[i]][i] if i < sequence.taught else math.nan
        rows.append((task, sequence.base[i], learned, sequence.R[-1][i]))
    rows.sort(key=lambda row: abs(row[3] - row[2]) if row[3] == row[3] and row[2] == row[2] else -1,
              reverse=True)  # fmt: skip
    output.table(
        ["task", ">base", ">when it came in", f">{sequence.stages[-1]}", ">change"],
        [
            [task, *map(wording.number, (base, learned, end)), output.signed(end - learned)]
            for task, base, learned, end in rows[: _FIRST + _LAST]
        ],
    )
    typer.echo(
        f"the {_FIRST + _LAST} of {len(rows)} tasks that changed most since they came in; "
        "--all shows every version on every task"
    )
