"""`lori promote`, `lori rollback` and `lori journal`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from lori_manager.cli import complete, output
from lori_manager.cli.output import Json
from lori_manager.cli.session import workspace
from lori_manager.cli.settings import SCORING, Changes, configured, with_settings

if TYPE_CHECKING:
    from lori_manager.gating import Gated, TaskGate

REASON = "Kept in the journal."


@with_settings(*SCORING)
def promote(
    ctx: typer.Context,
    ref: Annotated[
        str,
        typer.Argument(
            metavar="REF", help="The version.", autocompletion=complete.refs, show_default=False
        ),
    ],
    alias: Annotated[
        str, typer.Argument(metavar="ALIAS", help="What it shall be called.", show_default=True)
    ] = "production",
    force: Annotated[
        bool, typer.Option("--force", help="Against the gate's word; needs --reason.")
    ] = False,
    reason: Annotated[str, typer.Option(metavar="TEXT", help=REASON, show_default=False)] = "",
    json: Json = False,
    *,
    changes: Changes,
) -> None:
    """Let an alias mean a version, if the gate finds no task worse.

    What is not scored yet is scored first. Each task's outcomes are compared, row by
    row, with those of the version that the alias means now, by the rules of [gate] in
    lori.toml: safe, regressed, or undecided with the rows that would decide it. Refused,
    it exits with 12 and nothing moves.
    """
    from lori_manager.errors import GateRefused

    with workspace(ctx) as ws:
        config = configured(ws.settings.config, changes)
        try:
            moved, told = ws.promote(ref, alias, force=force, reason=reason, config=config)
        except GateRefused as e:
            refused = cast("Gated", e.told)
            if json:
                output.print_json(refused.to_json())
            else:
                show_gate(refused)
            raise
    if json:
        output.print_json({"alias": moved, "gate": told.to_json()})
    else:
        show_gate(told)
        typer.echo(f"\n{moved.ref} means {moved.line}@{moved.version}")


def rollback(
    ctx: typer.Context,
    alias: Annotated[
        str,
        typer.Argument(metavar="ALIAS", help="production, or main@production.", show_default=False),
    ],
    reason: Annotated[str, typer.Option(metavar="TEXT", help=REASON, show_default=False)] = "",
    json: Json = False,
) -> None:
    """Let an alias mean again what it meant before; once more goes one further back."""
    with workspace(ctx) as ws:
        moved = ws.rollback(alias, reason)
    if json:
        output.print_json(moved)
    else:
        typer.echo(f"{moved.ref} means {moved.line}@{moved.version} again")


def journal(
    ctx: typer.Context,
    line: Annotated[
        str | None,
        typer.Argument(help="All of them by default.", autocompletion=complete.lines),
    ] = None,
    alias: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only aliases of that name.")
    ] = None,
    json: Json = False,
) -> None:
    """List every move of every alias: who, when, why, and what the gate said."""
    with workspace(ctx) as ws:
        found = ws.store.journal(line, alias)
    if json:
        output.print_json(found)
        return
    rows = []
    for entry in found:
        gated = ""
        if entry.verdict is not None:
            gated = "passed" if entry.verdict.get("passed") else "refused"
        rows.append(
            [
                output.time(entry.at),
                entry.user,
                entry.ref,
                entry.action + (" by force" if entry.forced else ""),
                entry.from_version and f"{entry.line}@{entry.from_version}",
                entry.to_version and f"{entry.line}@{entry.to_version}",
                gated,
                entry.reason,
            ]
        )
    columns = ["time", "user", "alias", "move", "from", "to", "gate", "reason"]
    output.table(columns, rows)


def show_gate(told: Gated) -> None:
    """Each task's verdict, then why not."""
    against = f" against {told.against}" if told.against else ": nothing held the alias before"
    output.title(f"{told.candidate}{against}")
    output.table(
        ["task", ">before", ">after", ">difference", "90% interval", ">margin", ">p", "verdict",
         "versions judged"],
        [_row(one) for one in told.tasks],
    )  # fmt: skip
    for word, said in (("warning", told.warnings), ("refused", told.refusals)):
        for line in said:
            typer.echo(f"{word}: {line}")
    if told.passed:
        typer.echo("passed")


def _row(one: TaskGate) -> list[str | None]:
    judged = one.judged
    cells: list[str | None] = [one.ref, output.number(one.before), output.number(one.after)]
    if judged is None:
        return [*cells, None, None, None, None, None, str(one.reuse)]
    wide = f"{output.signed(judged.lower)} to {output.signed(judged.upper)}"
    return [
        *cells,
        output.signed(judged.difference),
        wide,
        f"{judged.margin:g}",
        f"{judged.p_holm:.2g}",
        judged.verdict,
        str(one.reuse),
    ]
