"""`lori rm`, `lori gc` and `lori doctor`."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from lori_manager.cli import complete, output
from lori_manager.cli.output import Json
from lori_manager.cli.session import store_folder, workspace
from lori_manager.errors import Unhealthy
from lori_manager.plain import counted


def rm(
    ctx: typer.Context,
    refs: Annotated[
        list[str],
        typer.Argument(
            metavar="REF...", help="Adapters.", autocompletion=complete.refs, show_default=False
        ),
    ],
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why, for others.")] = "",
    undo: Annotated[bool, typer.Option("--undo", help="Bring them back instead.")] = False,
    json: Json = False,
) -> None:
    """Remove adapters from sight; `lori gc` frees their files later.

    Numbers, scores and who did it stay. What an alias, an unfinished training or another
    version needs is refused, unless that version is named beside it.
    """
    with workspace(ctx) as ws:
        done = ws.restore(refs, reason=reason) if undo else ws.remove(refs, reason=reason)
    if json:
        output.print_json(done)
        return
    for adapter in done:
        typer.echo(f"{adapter.ref} {'is back' if undo else 'removed'}")


def gc(
    ctx: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell.")] = False,
    grace: Annotated[
        float, typer.Option(metavar="HOURS", min=0, help="Spare what is younger.")
    ] = 24.0,
    json: Json = False,
) -> None:
    """Free what nothing needs: files without a row, of removed adapters, of ended trainings.

    What an alias, a merge, a child, an unfinished training or any other row needs is kept.
    """
    with workspace(ctx) as ws:
        found = list(ws.store.collect(grace=timedelta(hours=grace), dry_run=dry_run))
    if json:
        output.print_json(found)
        return
    if found:
        rows = [[f.kind, f.subject, output.size(f.bytes), f.place] for f in found]
        output.table(["what", "subject", ">size", "place"], rows)
    total = output.size(sum(f.bytes for f in found))
    typer.echo(f"{'would free' if dry_run else 'freed'} {counted(len(found), 'item')}, {total}")


def doctor(ctx: typer.Context, json: Json = False) -> None:
    """Check what the workspace stands on: database, disk, clock, permissions, base, GPU stack.

    Ends with 13 where something needs mending.
    """
    from lori_manager.doctor import TROUBLE, examine

    found = list(examine(store_folder(ctx)))
    if json:
        output.print_json(found)
    else:
        output.table(["what", "state", "told"], [[c.name, c.state, c.told] for c in found])
    wrong = [check.name for check in found if check.state == TROUBLE]
    if wrong:
        raise Unhealthy(f"needs mending: {', '.join(dict.fromkeys(wrong))}")
