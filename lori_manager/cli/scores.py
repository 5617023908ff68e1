"""`lori score`, `lori score add` and `lori audit`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lori_manager.cli import complete, output
from lori_manager.cli.output import Json
from lori_manager.cli.session import PLAIN, workspace
from lori_manager.cli.settings import SCORING, Changes, configured, with_settings
from lori_manager.errors import AuditFailed, InvalidInput
from lori_manager.records import Score

if TYPE_CHECKING:
    from lori_manager.audit import Audit, Comparison, SequenceAudit, TaskAudit
    from lori_manager.metrics.continual import Figure

MEASURE = "measure"


class MeasureCommand(TyperCommand):
    """The command behind `score REF...`, whose own name nobody types or sees."""

    def make_context(
        self, info_name: Any, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        """Take the place of the group in usage lines."""
        return super().make_context(parent.info_name, args, parent=parent.parent, **extra)


class ScoreGroup(TyperGroup):
    """`score add ...` is its command; anything else is references for `score` itself."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command that is not typed before its arguments."""
        if not args or args[0] not in ("add", *ctx.help_option_names):
            args = [MEASURE, *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The options of both."""
        measure = self.commands[MEASURE]
        measure.format_options(measure.make_context("", [], ctx, resilient_parsing=True), formatter)
        self.format_commands(ctx, formatter)


def measure(
    ctx: typer.Context,
    refs: Annotated[
        list[str],
        typer.Argument(
            metavar="REF",
            help="line@3, line@alias, base, or a task's name for its own adapter.",
            autocompletion=complete.refs_or_add,
            show_default=False,
        ),
    ],
    tasks: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Only these tasks.", autocompletion=complete.tasks),
    ] = None,
    all_tasks: Annotated[
        bool, typer.Option("--all", help="Every task; so it is without --tasks, too.")
    ] = False,
    json: Json = False,
    *,
    changes: Changes,
) -> None:
    """Score adapters or the base on tasks."""
    if all_tasks and tasks is not None:
        raise InvalidInput("--all and --tasks exclude each other: leave one out")
    with workspace(ctx) as ws:
        config = configured(ws.settings.config, changes)
        found = ws.score(refs, names(tasks), config)
    if json:
        output.print_json(found)
    else:
        show_scores(found)


def add(
    ctx: typer.Context,
    ref: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            help="Whose outcomes they are.",
            autocompletion=complete.refs,
            show_default=False,
        ),
    ],
    task: Annotated[str, typer.Option(metavar="TASK", autocompletion=complete.tasks)],
    outcomes: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help='JSONL: {"row": index or key, "value": number}, a line for each eval row.',
        ),
    ],
    origin: Annotated[
        str, typer.Option(metavar="TEXT", help="Where they come from; kept with the score.")
    ] = "elsewhere",
    json: Json = False,
) -> None:
    """Store outcomes that were measured elsewhere."""
    with workspace(ctx) as ws:
        score = ws.add_outcomes(ref, task, outcomes, origin)
    if json:
        output.print_json(score)
    else:
        show_scores([score])


def names(text: str | None) -> list[str] | None:
    """`a,b` as a list; None stays None."""
    return None if text is None else [part.strip() for part in text.split(",")]


def show_scores(scores: Sequence[Score]) -> None:
    """A table of scores."""
    columns = ["subject", "task", "scorer", ">score", ">rows", "precision", "origin"]
    rows = [
        [
            s.subject,
            f"{s.task}#{s.task_revision}",
            s.scorer,
            output.with_error(s.value, s.error),
            output.count(s.rows),
            s.precision or None,
            s.origin,
        ]
        for s in scores
    ]
    output.table(columns, rows)


def audit(
    ctx: typer.Context,
    ref: Annotated[
        str | None,
        typer.Argument(
            metavar="[REF]",
            help="Its line's history; everything by default.",
            autocompletion=complete.refs,
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="Only this task.", autocompletion=complete.tasks),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Exit with 3 where a task is more than X below its line's best."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Tell what every step did to every task, and whether it is real.

    Each score is compared with its parent's and with the best before it, by the
    standard error of the paired difference; `worse` and `better` mark what is
    beyond noise (p < 0.05). For a sequence, R and its figures follow.
    """
    with workspace(ctx) as ws:
        found = ws.audit(ref, task, max_drop)
    if json:
        output.print_json(found.to_json())
    else:
        show_audit(found)
    if found.findings:
        fell = ", ".join(dict.fromkeys(str(f.facts["task"]) for f in found.findings))
        raise AuditFailed(f"more than {max_drop:g} below the best: {fell}")


def show_audit(found: Audit) -> None:
    """Every task's history, then the sequences, then what was found."""
    for task in found.tasks:
        _show_task(task)
    for sequence in found.sequences:
        _show_sequence(sequence)
    if found.notes or found.findings:
        typer.echo()
    for note in found.notes:
        typer.echo(f"note: {note}")
    for finding in found.findings:
        typer.echo(f"{finding.kind}: {finding.message}")


def _show_task(task: TaskAudit) -> None:
    best = f", best {task.best}" if task.best else ""
    lower = ", lower is better" if task.higher_is_better is False else ""
    output.title(f"{task.ref}: {task.scorer}{lower}{best}")
    if task.note:
        typer.echo(f"note: {task.note}")
    if not task.entries:
        return
    columns = ["subject", ">score", ">rows", ">change", "from", "", ">against best", ""]
    rows, notes = [], []
    for entry in task.entries:
        parent, best_before = entry.parent, entry.best
        rows.append(
            [
                entry.subject + (f" ({entry.origin})" if entry.imported else ""),
                output.with_error(entry.value, entry.error),
                output.count(entry.rows),
                output.change(parent.change, parent.error) if parent else None,
                parent.against if parent else None,
                verdict(parent),
                output.change(best_before.change, best_before.error) if best_before else None,
                verdict(best_before),
            ]
        )
        for comparison in dict.fromkeys(filter(None, (parent, best_before))):
            if comparison.note:
                notes.append(f"note: {entry.subject} to {comparison.against}: {comparison.note}")
    output.table(columns, rows)
    for note in dict.fromkeys(notes):
        typer.echo(note)


def verdict(comparison: Comparison | None) -> str:
    """A word where a change is beyond noise."""
    if comparison is None or not comparison.real:
        return ""
    return "worse" if comparison.worse else "better"


def _show_sequence(sequence: SequenceAudit) -> None:
    output.title(f"{sequence.line}: R, every stage on every task")
    columns = ["stage", *(f">{task}" for task in sequence.tasks)]
    rows = [
        [stage, *map(output.number, scores)]
        for stage, scores in zip(sequence.stages, sequence.R, strict=True)
    ]
    output.table(columns, [["base", *map(output.number, sequence.base)], *rows])
    if sequence.note:
        typer.echo(f"note: {sequence.note}")
    if not sequence.figures:
        return
    typer.echo()
    output.table(
        ["figure", "symbol", ">value", ">of", "better", "formula", "source"],
        [
            [
                figure.name,
                figure.symbol,
                _figure(figure),
                figure.denominator,
                "higher" if figure.higher_is_better else "lower",
                figure.formula,
                figure.source,
            ]
            for figure in sequence.figures
        ],
    )
    missing = [task for task, r in zip(sequence.tasks, sequence.references, strict=False) if not r]
    if missing:
        typer.echo(f"I needs an adapter trained on each task alone; none for {', '.join(missing)}")
    known = [r for r in sequence.references if r is not None]
    if known:
        typer.echo(f"I is against {', '.join(known)}")


def _figure(figure: Figure) -> str:
    """Signed where it is a difference."""
    return (output.signed if " - " in figure.formula else output.number)(figure.value)


group = typer.Typer(
    cls=ScoreGroup,
    help=(
        "Score adapters or the base on tasks.\n\nWhat is scored already is not run again. "
        "`score add` stores outcomes that were measured elsewhere."
    ),
    subcommand_metavar="REF... | add REF",
    **PLAIN,
)
group.command(MEASURE, cls=MeasureCommand, hidden=True)(with_settings(*SCORING)(measure))
group.command("add")(add)
