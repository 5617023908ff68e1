"""`lori verify`, and `lori db upgrade`, `journal` and `abandon`."""

from __future__ import annotations

from typing import Annotated

import typer

from lori_manager.cli import complete, output
from lori_manager.cli.output import Json
from lori_manager.cli.session import PLAIN, store_folder, workspace
from lori_manager.errors import DamagedObject, InvalidInput

HARMLESS = ("orphan",)


def verify(
    ctx: typer.Context,
    deep: Annotated[bool, typer.Option("--deep", help="Decode every adapter, too.")] = False,
    json: Json = False,
) -> None:
    """Check all that is stored.

    Every row has its file, every file its digest, every mask fits its A.
    """
    with workspace(ctx) as ws:
        found = list(ws.verify(deep=deep))
        adapters = sum(line.versions for line in ws.store.lines())
    if json:
        output.print_json(found)
    elif found:
        output.table(
            ["what", "subject", "message"], [[f.kind, f.subject, f.message] for f in found]
        )
    else:
        typer.echo(f"all is well: {adapters} adapters, every file whole")
    wrong = [f for f in found if f.kind not in HARMLESS]
    if wrong:
        raise DamagedObject(f"{len(wrong)} of what is stored cannot be trusted")


def upgrade(ctx: typer.Context, json: Json = False) -> None:
    """Bring an older lori's database to this one's schema.

    A copy is made in .lori/ first; of a server's by pg_dump, or none where that is missing.
    """
    from lori_manager.store.database import upgrade

    done = upgrade(store_folder(ctx))
    if json:
        output.print_json(done)
    elif done.before == done.after:
        typer.echo(f"the database is at {done.after} already")
    else:
        kept = f"before: {done.backup}" if done.backup else f"no copy was made: {done.unsaved}"
        typer.echo(f"the database went from {done.before} to {done.after}; {kept}")


JOURNALS = {"rollback": "delete", "wal": "wal"}  # our words -> SQLite's


def journal(
    ctx: typer.Context,
    mode: Annotated[
        str | None,
        typer.Argument(
            metavar="[rollback|wal]",
            help="What it is to be from now on; without it, what it is.",
            autocompletion=complete.among(*JOURNALS),
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show or set how SQLite keeps commits whole.

    A rollback journal by default. With wal, readers never wait for a writer: on a local disk
    alone, and with SQLite 3.51.3 or newer, since older ones may damage a database in that mode.
    """
    from lori_manager.store.databases import backend
    from lori_manager.store.sqlite import SQLite

    if mode is not None and mode not in JOURNALS:
        raise InvalidInput(f"no journal is called {mode!r}; there are: {', '.join(JOURNALS)}")
    database = backend(store_folder(ctx))
    if not isinstance(database, SQLite):
        raise InvalidInput(f"{database.shown} is no SQLite database: its server keeps the journal")
    if mode is not None:
        database.set_journal(JOURNALS[mode])
    found = database.journal()
    told = next((word for word, name in JOURNALS.items() if name == found), found)
    if json:
        output.print_json({"journal": told})
    else:
        typer.echo(f"the journal is {told}")


def abandon(
    ctx: typer.Context,
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="How `lori doctor` calls it.",
            show_default=False,
        ),
    ],
    json: Json = False,
) -> None:
    """Give up an unfinished training.

    What it has stored stays, its checkpoints go, and the same command begins anew.
    """
    with workspace(ctx) as ws:
        given_up = ws.abandon(run)
    if json:
        output.print_json(given_up)
    else:
        tasks = " ".join(given_up.plan.get("tasks", []))
        typer.echo(output.one_line(f"given up: the training {given_up.id[:8]} of {tasks}"))


group = typer.Typer(
    help="Look after the database.",
    no_args_is_help=True,
    **PLAIN,
)
group.command("upgrade")(upgrade)
group.command("journal")(journal)
group.command("abandon")(abandon)
