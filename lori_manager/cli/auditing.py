"""`lori audit`."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, time
from enum import StrEnum
from typing import Annotated

import typer

from lori_manager.cli import complete
from lori_manager.cli.output import Json
from lori_manager.cli.session import uncollected, workspace
from lori_manager.errors import AuditFailed, InvalidInput, NotFound


class Format(StrEnum):
    """What an audit is printed as."""

    TABLE = "table"
    MARKDOWN = "markdown"
    CSV = "csv"
    JUNIT = "junit"


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
        list[str] | None,
        typer.Option(
            metavar="A,B",
            help="Only these tasks; may be given several times.",
            autocompletion=complete.tasks,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="ALIAS|REF",
            help="Hold every version against this as well: base, line@3, line@alias, or an alias "
            "on each line. Each line's production, else champion, by default.",
            autocompletion=complete.refs,
        ),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="DATE", help="Only versions made then or later, such as 2026-01-31."),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(metavar="DATE", help="Only versions made then or earlier, that day included."),
    ] = None,
    alias: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only versions that this alias points at.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Exit with 3 where a task is more than X below its line's best."
        ),
    ] = None,
    gate: Annotated[
        bool,
        typer.Option(
            "--gate",
            help="Judge REF by [gate] in lori.toml against --against, production by default, and "
            "exit with 12 where it is refused. Without REF: the latest of every line that has it.",
        ),
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Every version, also where a task has many.")
    ] = False,
    format: Annotated[
        Format, typer.Option(help="junit: a suite a judged version, a case a task.")
    ] = Format.TABLE,
    json: Json = False,
) -> None:
    """Tell what every step did to every task, and whether it is real.

    Each score is compared, on the rows that both have, with its parent's, with the
    best before it and with the version under an alias. `worse` and `better` mark what
    is beyond noise (p < 0.05, corrected for the tasks that are looked at together).
    For a sequence or a line of merges, R and its figures follow. `--json` and `csv`
    always hold every version.
    """
    if json and format is not Format.TABLE:
        raise InvalidInput("--json and --format exclude each other: leave one out")
    if gate:
        given = (task, since, until, alias, max_drop)
        if any(option is not None for option in given) or format is not Format.TABLE or everything:
            raise InvalidInput("--gate goes with REF, --against and --json alone")
        _gate(ctx, ref, against, json)
        return
    names = None if task is None else [n.strip() for part in task for n in part.split(",")]
    cut = not (everything or json or format in (Format.CSV, Format.JUNIT))
    with uncollected(), workspace(ctx) as ws:
        run = ws.audit_run(
            ref,
            names,
            max_drop,
            against=against,
            since=_moment(since, "since", time.min),
            until=_moment(until, "until", time.max),
            alias=alias,
            most=_most() if cut else None,
            judged_alone=format is Format.JUNIT,
        )
        if json:
            from lori_manager.auditing.formats.document import document

            _write(document(run))
        elif format is Format.CSV:
            from lori_manager.auditing.formats.csv import lines

            _write(lines(run))
        elif format is Format.TABLE:
            from lori_manager.cli.audit_tables import show

            show(run)
        else:
            from lori_manager.auditing.formats import junit, markdown

            text = (junit if format is Format.JUNIT else markdown).text(run.all())
            typer.echo(text, nl=False)
        findings = run.findings
    if findings:
        fell = ", ".join(dict.fromkeys(str(f.facts["task"]) for f in findings))
        raise AuditFailed(f"more than {max_drop:g} below the best: {fell}")


def _gate(ctx: typer.Context, ref: str | None, against: str | None, json: bool) -> None:
    from lori_manager.cli import output
    from lori_manager.cli.promoting import show_gate
    from lori_manager.errors import GateRefused
    from lori_manager.gating import PRODUCTION

    held = against or PRODUCTION
    with workspace(ctx) as ws:
        if ref is None:
            lines = ws.store.lines()
            refs = [x.latest.ref for x in lines if held in x.aliases and x.latest is not None]
            if not refs:
                raise NotFound(f"no line has the alias {held!r}: name a REF and --against")
        else:
            refs = [ws.adapter(ref).ref]
        found = []
        for one in refs:
            line = ws.adapter(one).line
            named = "@" in held or held == "base"
            found.append(ws.gate(one, held if named else f"{line}@{held}"))
    if json:
        output.print_json([told.to_json() for told in found])
    else:
        for told in found:
            show_gate(told)
    refused = [told for told in found if not told.passed]
    if refused:
        said = "; ".join(f"{told.candidate}: {', '.join(told.refusals)}" for told in refused)
        raise GateRefused(said)


def _most() -> int:
    from lori_manager.auditing import MOST

    return MOST


def _write(pieces: Iterable[str]) -> None:
    for piece in pieces:
        typer.echo(piece, nl=False)


def _moment(text: str | None, name: str, of_day: time) -> datetime | None:
    """A date, or a date and time; in this machine's zone unless it says another."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as e:
        raise InvalidInput(
            f"--{name} takes a date such as 2026-01-31 or 2026-01-31T14:05, got {text!r}"
        ) from e
    if len(text) <= len("2026-01-31"):
        moment = datetime.combine(moment.date(), of_day)
    return moment if moment.tzinfo is not None else moment.astimezone()
