"""`lori lines`, `lori show`, `lori log` and `lori alias`."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Annotated

import typer

from lori_manager.cli import complete, output
from lori_manager.cli.describe import Shown, describe, parents, task_of
from lori_manager.cli.output import Json
from lori_manager.cli.scores import show_scores
from lori_manager.cli.session import records, workspace
from lori_manager.errors import InvalidInput
from lori_manager.records import Adapter, Base, Removal, Score, Task
from lori_manager.refs import BASE, is_number, parse_mask_ref

if TYPE_CHECKING:
    from lori_manager.context import Context

LAST = 100  # adapters that `lori log` lists


def lines(ctx: typer.Context, json: Json = False) -> None:
    """List the lines, each with its latest adapter."""
    with records(ctx) as ws:
        found = ws.store.lines()
    if json:
        output.print_json(found)
        return
    columns = ["line", ">adapters", "latest", "made", ">rank", ">size", "aliases", "sequence"]
    rows = []
    for line in found:
        latest = line.latest
        rows.append(
            [
                line.name,
                output.count(line.versions),
                latest and latest.ref,
                latest and output.time(latest.created_at),
                latest and latest.rank,
                latest and output.size(latest.bytes),
                ", ".join(f"{name} -> {v}" for name, v in line.aliases.items()),
                " -> ".join(line.sequence),
            ]
        )
    output.table(columns, rows)


def log(
    ctx: typer.Context,
    line: Annotated[
        str | None,
        typer.Argument(help="All of them by default.", autocompletion=complete.lines),
    ] = None,
    last: Annotated[
        int, typer.Option(metavar="N", min=0, help="The newest; 0 for all there are.")
    ] = LAST,
    removed: Annotated[
        bool, typer.Option("--removed", help="Those too that `lori rm` removed.")
    ] = False,
    json: Json = False,
) -> None:
    """List the adapters of one line or of all, in time."""
    with records(ctx) as ws:
        name = ws.store.line(line).name if line is not None else None
        # one more tells whether there are older ones
        found = ws.store.adapters(name, removed=removed, last=last + 1 if last else None)
        aliases = ws.store.aliases(line)
    if last and len(found) > last:
        found = found[-last:]
        typer.echo(f"the newest {last}; more with --last N, all with --last 0", err=True)
    if json:
        output.print_json(found)
        return
    names: dict[str, list[str]] = defaultdict(list)
    for alias in aliases:
        names[f"{alias.line}@{alias.version}"].append(alias.name)
    columns = ["adapter", "made", "method", ">rank", "task", "mask", "from", ">size", "aliases"]
    rows = []
    for adapter in found:
        own = names.get(adapter.ref, ["removed"] if adapter.hidden else [])
        rows.append(
            [
                adapter.ref,
                output.time(adapter.created_at),
                adapter.method,
                adapter.rank,
                task_of(adapter),
                adapter.mask,
                parents(adapter),
                output.size(adapter.bytes),
                ", ".join(own),
            ]
        )
    output.table(columns, rows)


def show(
    ctx: typer.Context,
    ref: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            help="An adapter (line@3, line@alias), base, a mask (task%1) or a task (task#2).",
            autocompletion=complete.anything,
            show_default=False,
        ),
    ],
    json: Json = False,
) -> None:
    """Show one adapter, mask, task or the base in full."""
    with records(ctx) as ws:
        found = _find(ws, ref)
        scores = _scores(ws, found)
        removal = _removal(ws, found)
    if json:
        output.print_json({"kind": type(found).__name__.lower(), "record": found, "scores": scores})
        return
    describe(found)
    if removal is not None:
        output.title("removed")
        told = {"at": output.time(removal.at), "by": removal.user, "reason": removal.reason}
        output.fields(told)
    if scores:
        output.title("scores")
        show_scores(scores)


def _find(ws: Context, ref: str) -> Shown:
    """What a word stands for: `#` a task, `%` a mask, `@` an adapter, a bare one the task first."""
    if ref == BASE:
        return ws.store.base()
    if "%" in ref:
        return ws.store.mask(*parse_mask_ref(ref))
    name, hash_, revision = ref.partition("#")
    if hash_ and not (is_number(revision) and int(revision)):
        raise InvalidInput(f"{ref!r} is not a task: expected `task` or `task#revision`")
    if hash_:
        return ws.store.task(name, int(revision))
    if "@" not in ref and any(task.name == ref for task in ws.store.tasks()):
        return ws.store.task(ref)
    return ws.adapter(ref, removed=True)


def _removal(ws: Context, found: Shown) -> Removal | None:
    """Who removed it, if anybody did."""
    if not isinstance(found, Adapter) or not found.hidden:
        return None
    return [r for r in ws.store.removals(found.line) if r.version == found.version][-1]


def _scores(ws: Context, found: Shown) -> list[Score]:
    if isinstance(found, Adapter):
        return [] if found.hidden else ws.store.scores(subject=found.ref)
    if isinstance(found, Base):
        return ws.store.scores(subject=BASE)
    if isinstance(found, Task):
        return ws.store.scores(task=found.name, revision=found.revision)
    return []


def alias(
    ctx: typer.Context,
    ref: Annotated[
        str | None,
        typer.Argument(
            metavar="[REF]",
            help="The adapter; without it, the aliases are listed.",
            autocompletion=complete.refs,
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Of the alias.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Let line@NAME mean an adapter, or list such names."""
    if ref is not None and name is None:
        raise InvalidInput(f"name the alias, too: `lori alias {ref} NAME`")
    with workspace(ctx) as ws:
        made = ws.set_alias(ref, name) if ref is not None and name is not None else None
        found = [made] if made is not None else ws.store.aliases()
    if json:
        output.print_json(made or found)
        return
    output.table(
        ["alias", "means", "since"],
        [[a.ref, f"{a.line}@{a.version}", output.time(a.moved_at)] for a in found],
    )
