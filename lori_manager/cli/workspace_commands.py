"""`lori init` and `lori base`: a workspace and the model under it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lori_manager.cli import output
from lori_manager.cli.describe import describe
from lori_manager.cli.output import Json
from lori_manager.cli.session import workspace


def init(
    ctx: typer.Context,
    base: Annotated[str, typer.Option(help="A model folder, or an id on the Hugging Face hub.")],
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]",
            help="The folder, made where it is missing; the current one by default.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    objects: Annotated[
        str | None,
        typer.Option(
            metavar="s3://BUCKET/PREFIX",
            help="Keep files there; credentials come from the provider's own chain.",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run Python code that comes with the base; needs the whole commit as --revision.",
        ),
    ] = False,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="postgresql://USER@HOST/DATABASE",
            help="Keep the rows in that empty database; the password comes from PGPASSWORD or "
            "~/.pgpass.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Make a workspace for one base model.

    It is the folder .lori/, found upwards from wherever you are, and lori.toml with
    the defaults, commented.
    """
    from lori_manager.context import SETTINGS
    from lori_manager.store.postgres import Postgres
    from lori_manager.workspace import Workspace

    folder = directory or ctx.obj.folder
    with Workspace.create(
        folder,
        base,
        revision,
        database=store,
        objects=objects,
        trust_remote_code=trust_remote_code,
    ) as ws:
        made = ws.store.base()
        if json:
            output.print_json({"root": ws.root, "base": made})
            return
        typer.echo(f"workspace in {ws.root}, defaults in {ws.root / SETTINGS}")
        if store is not None:
            typer.echo(f"rows in {ws.store.database}")
            if Postgres.at(store).password is not None:
                typer.echo("the password is not kept: set PGPASSWORD or ~/.pgpass", err=True)
        describe(made)


def base(
    ctx: typer.Context,
    move: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where the same weights lie now.")
    ] = None,
    json: Json = False,
) -> None:
    """Show the base model, or say where its weights lie now."""
    with workspace(ctx) as ws:
        shown = ws.store.base() if move is None else ws.move_base(move)
    if json:
        output.print_json(shown)
    else:
        describe(shown)
