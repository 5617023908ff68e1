"""`lori verify` and `lori db upgrade`."""

from __future__ import annotations

import typer

from lori_manager.cli import output
from lori_manager.cli.output import Json
from lori_manager.cli.session import PLAIN, Session, workspace
from lori_manager.errors import DamagedObject, NotFound

HARMLESS = ("orphan",)


def verify(ctx: typer.Context, json: Json = False) -> None:
    """Check all that is stored.

    Every row has its file, every file its digest, every mask fits its A.
    """
    with workspace(ctx) as ws:
        found = list(ws.verify())
        adapters = len(ws.store.adapters())
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

    A copy is made beside it first.
    """
    from lori_manager.store.database import upgrade
    from lori_manager.workspace import FOLDER

    session: Session = ctx.obj
    start = session.folder.absolute()
    root = next((f for f in (start, *start.parents) if (f / FOLDER).is_dir()), None)
    if root is None:
        raise NotFound(f"no workspace in {start} or above it: run `lori init --base MODEL` first")
    done = upgrade(root / FOLDER)
    if json:
        output.print_json(done)
    elif done.before == done.after:
        typer.echo(f"the database is at {done.after} already")
    else:
        typer.echo(f"the database went from {done.before} to {done.after}; before: {done.backup}")


group = typer.Typer(
    help="Look after the database.",
    no_args_is_help=True,
    **PLAIN,
)
group.command("upgrade")(upgrade)
