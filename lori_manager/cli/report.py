"""`lori report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lori_manager.cli import complete, output
from lori_manager.cli.output import Json
from lori_manager.cli.session import workspace

DEFAULT = Path("report.html")


def report(
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
    file: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where the page goes; report.html by default, none with --json.",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        str,
        typer.Option(
            metavar="TASKS", help="Only these, by commas.", autocompletion=complete.tasks,
            show_default=False,
        ),
    ] = "",
    rows: Annotated[
        int,
        typer.Option(min=0, help="Changed rows to show of each direction, task and comparison."),
    ] = 20,
    json: Json = False,
) -> None:  # fmt: skip
    """Write one HTML page that shows the whole history.

    What the newest version did to every task, in words, as a heat map, as lines over
    versions, before and after each merge, and as the rows that changed. The page holds
    everything that it needs: no network, also by mail or from a disk.
    """
    tasks = list(dict.fromkeys(name.strip() for name in task.split(",") if name.strip()))
    with workspace(ctx) as ws:
        found = ws.report(ref, tasks, rows=rows)
    if json:
        output.print_json(found)
    if file is not None or not json:
        from lori_manager.reporting.page import write_page

        written = file if file is not None else DEFAULT
        size = write_page(found, written)
        typer.echo(f"{written}: {output.size(size)}", err=json)
        if not json:
            typer.echo(found.headline.title)
