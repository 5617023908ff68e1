"""`lori export` and `lori import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lori_manager.cli import complete, output
from lori_manager.cli.output import Json
from lori_manager.cli.session import workspace
from lori_manager.errors import ImportRefused, InvalidInput
from lori_manager.kinds import KINDS

FORMATS = ("peft", "full")
OWN = "own"  # what is told where PEFT has no form and lori's own was written


def export(
    ctx: typer.Context,
    ref: Annotated[
        str, typer.Argument(metavar="REF", autocompletion=complete.refs, show_default=False)
    ],
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="New, or empty.", show_default=False)
    ],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="peft: what PeftModel loads (lori's own folder where PEFT has no such kind, "
            "see `lori kinds`); full: the base with the update merged in.",
            autocompletion=complete.among(*FORMATS),
        ),
    ] = "peft",
    task: Annotated[
        str | None,
        typer.Option(help="Whose head to write, of an encoder's adapter that has several."),
    ] = None,
    json: Json = False,
) -> None:
    """Write an adapter for use elsewhere.

    A routed one becomes a PEFT directory a member, with the router beside them.
    """
    if form not in FORMATS:
        raise InvalidInput(f"`--format` must be one of {', '.join(FORMATS)}, got {form!r}")
    with workspace(ctx) as ws:
        adapter = ws.adapter(ref)
        written = ws.export(adapter.ref, directory, full=form == "full", task=task)
    kind = KINDS.get(adapter.method)
    if form == "peft" and kind is not None and kind.own_form:
        form = OWN
    if json:
        output.print_json({"ref": adapter.ref, "directory": written, "format": form})
    else:
        typer.echo(f"{adapter.ref} written to {written} ({form})")


def import_(
    ctx: typer.Context,
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR", help="Folders of PEFT's, or of lori's own form.", show_default=False
        ),
    ],
    assume_base: Annotated[
        bool,
        typer.Option("--assume-base", help="Take it that they were trained on this base."),
    ] = False,
    json: Json = False,
) -> None:
    """Bring in PEFT LoRAs, DoRAs, IA3s and prefixes, and lori's own folders, a line each.

    Each becomes version 1 of a line named after its folder. What cannot be imported
    faithfully is refused with its reason, the rest is imported; the exit code is then
    11.
    """
    with workspace(ctx) as ws:
        found = ws.import_adapters(directories, assume_base=assume_base)
    if json:
        output.print_json(found)
    for one in [] if json else found:
        if one.adapter is None:
            told = f"refused: {one.reason}"
        else:
            told = f"{one.adapter.ref} at rank {one.adapter.rank}"
            if not one.adapter.rank:
                told = f"{one.adapter.ref} of kind {one.adapter.method}"
            told += "".join(f"; {note}" for note in one.notes)
        typer.echo(output.one_line(f"{one.directory}: {told}"))
    refused = sum(one.adapter is None for one in found)
    if refused:
        raise ImportRefused(f"{refused} of {len(found)} refused, {len(found) - refused} imported")
