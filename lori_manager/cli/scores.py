"""`lori score` and `lori score add`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lori_manager.cli import complete, output
from lori_manager.cli.output import Json
from lori_manager.cli.session import PLAIN, workspace
from lori_manager.cli.settings import SCORING, Changes, configured, with_settings
from lori_manager.errors import InvalidInput
from lori_manager.records import Score

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
