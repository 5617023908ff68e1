"""`lori merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lori_manager.cli import complete, output
from lori_manager.cli.output import Json
from lori_manager.cli.scores import names, verdict
from lori_manager.cli.session import workspace
from lori_manager.cli.settings import SCORING, Changes, configured, with_settings
from lori_manager.errors import InvalidInput

if TYPE_CHECKING:
    from lori_manager.audit import Audit, Entry
    from lori_manager.combining import Merged
    from lori_manager.records import Adapter


def _list_methods(wanted: bool) -> None:
    if not wanted:
        return
    from lori_manager.combining import methods

    columns = ["method", "one adapter at weight 1", "order", "reads", "source"]
    rows = [
        [
            entry.name,
            "returns itself" if entry.facts.get("identity") else "changes",
            "matters" if entry.facts.get("ordered") else "does not matter",
            "probe prompts" if entry.facts.get("needs") else "weights alone",
            entry.source,
        ]
        for entry in methods()
    ]
    output.table(columns, rows)
    raise typer.Exit


@with_settings(*SCORING)
def merge(
    ctx: typer.Context,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Tasks, by their own adapters.", autocompletion=complete.tasks
        ),
    ] = None,
    adapters: Annotated[
        str | None,
        typer.Option(metavar="REF,REF", help="Adapters.", autocompletion=complete.refs),
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="See --list-methods; auto: layerwise where tasks have probe rows."),
    ] = "auto",
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W", help="One a member, adapters first; 1/T each by default."),
    ] = None,
    into: Annotated[
        str, typer.Option(metavar="LINE", help="The merge's line.", autocompletion=complete.lines)
    ] = "main",
    max_rank: Annotated[
        int | None, typer.Option(help="Rank of the merge; as the method gives it if unset.")
    ] = None,
    probe_rows: Annotated[
        int, typer.Option(help="Probe prompts of each task, for methods that read inputs.")
    ] = 32,
    space: Annotated[
        str, typer.Option(help="core or full: where methods look at single entries.")
    ] = "core",
    density: Annotated[
        float, typer.Option(help="Share of entries that pruning methods keep.")
    ] = 0.5,
    eps: Annotated[
        float, typer.Option(help="Of a regression, against the mean second moment.")
    ] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of methods that draw.")] = 0,
    list_methods: Annotated[
        bool,
        typer.Option(
            "--list-methods", help="Show the methods and exit.", callback=_list_methods,
            is_eager=True,
        ),
    ] = False,
    json: Json = False,
    *,
    changes: Changes,
) -> None:  # fmt: skip
    """Merge adapters into one, store and score it.

    Its score on each member's task is shown beside the member's own. With `--method
    routed` every member is kept whole, and each prompt goes to one of them.
    """
    shares = _numbers(weights)
    with workspace(ctx) as ws:
        config = configured(ws.settings.config, changes)
        merged = ws.merge(
            names(adapters) or [],
            names=names(tasks) or [],
            method=method,
            weights=shares,
            into=into,
            options={
                "max_rank": max_rank,
                "space": space,
                "density": density,
                "eps": eps,
                "seed": seed,
            },
            probe_rows=probe_rows,
            config=config,
        )
        found = ws.audit(merged.adapter.ref)
    if json:
        output.print_json({"merged": merged, "audit": found.to_json()["tasks"]})
    else:
        _show(merged, found)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as e:
        raise InvalidInput(f"`weights` must be numbers such as 0.5,0.5, got {text!r}") from e


def _show(merged: Merged, found: Audit) -> None:
    adapter = merged.adapter
    output.table(
        ["member", "task", ">weight", ">rank"],
        [
            [m.ref, m.task, f"{weight:.4g}", m.rank]
            for m, weight in zip(merged.members, merged.weights, strict=True)
        ],
    )
    typer.echo(
        f"\n{adapter.ref}: {adapter.method} at rank {adapter.rank}, {output.size(adapter.bytes)}"
    )
    if "routing" in adapter.facts:
        _show_routing(adapter)
    rows = []
    for task in found.tasks:
        entry = next((e for e in task.entries if e.subject == adapter.ref), None)
        if entry is None or not task.latest:
            continue
        against = entry.parent.against if entry.parent else None
        own = next((e for e in task.entries if e.subject == against), None)
        rows.append([task.ref, *_comparison(entry, own)])
    output.table(["task", "own adapter", ">own", ">merge", ">difference", ""], rows)


def _show_routing(adapter: Adapter) -> None:
    routing = adapter.facts["routing"]
    typer.echo(
        f"router: {routing['accuracy']:.1%} of held-out probe prompts go to their own member, "
        f"read at {routing['reads']}"
    )
    refs = [parent.ref for parent in adapter.parents]
    counts = [[ref, *row] for ref, row in zip(refs, routing["held_out"], strict=True)]
    output.table(["prompts of", *(f">to {ref}" for ref in refs)], counts)
    typer.echo()


def _comparison(entry: Entry, own: Entry | None) -> list[str | None]:
    change = entry.parent
    return [
        own.subject if own else None,
        output.with_error(own.value, own.error) if own else None,
        output.with_error(entry.value, entry.error),
        output.change(change.change, change.error) if change else None,
        verdict(change),
    ]
