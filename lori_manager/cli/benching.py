"""`lori bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lori_manager.cli import complete, output
from lori_manager.cli.output import Json
from lori_manager.cli.session import workspace
from lori_manager.cli.settings import SCORING, Changes, configured, with_settings

if TYPE_CHECKING:
    from lori_manager.benching import Bench

MEASURING = tuple(key for key in SCORING if key in ("precision", "base_bits", "kernels"))


@with_settings(*MEASURING)
def bench(
    ctx: typer.Context,
    refs: Annotated[
        list[str],
        typer.Argument(metavar="REF", autocompletion=complete.refs, show_default=False),
    ],
    rows: Annotated[int, typer.Option(help="Prompts, or rows with labels, together.")] = 16,
    tokens: Annotated[
        int | None,
        typer.Option(help="New tokens of each prompt; not of an encoder.", show_default="64"),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Of every measurement; medians are told.")] = 5,
    json: Json = False,
    *,
    changes: Changes,
) -> None:
    """Measure what adapters cost at use, on this machine.

    Latency and memory of greedy decoding with the base alone, with each adapter kept apart
    from it and merged into it, and the time to change from one adapter to another. With an
    encoder it is a batch of labelled rows through model and head. Stores nothing.
    """
    with workspace(ctx) as ws:
        found = ws.bench(
            refs, rows=rows, tokens=tokens, repeats=repeats,
            config=configured(ws.settings.config, changes),
        )  # fmt: skip
    if json:
        output.print_json(found)
    else:
        show(found)


def show(found: Bench) -> None:
    """Both tables, and what they are of."""
    labels = found.tokens is None
    read = "" if found.prompt_tokens is None else f", {found.prompt_tokens:,} tokens in all"
    new = "" if labels else f", {found.tokens} new ones each"
    typer.echo(
        f"{found.device}, {found.precision}: {found.rows} {'rows' if labels else 'prompts'} "
        f"together{read}{new}; medians of {found.repeats}"
    )
    alone = found.uses[0].repeated_seconds
    times = [">the batch"] if labels else [">first token", ">each further"]
    output.table(
        ["adapter", "way", *times, ">of the base's", ">memory"],
        [
            [
                use.ref,
                use.way,
                *([] if labels else [_time(use.prefill_seconds)]),
                _time(use.repeated_seconds),
                f"{use.repeated_seconds / alone:.2f}" if alone > 0 else None,
                output.size(use.peak_bytes),
            ]
            for use in found.uses
        ],
    )
    output.title("to change adapters")
    output.table(
        ["adapter", "method", ">stored", ">load", ">attach", ">detach", ">merge", ">unmerge"],
        [
            [
                one.ref,
                one.method,
                output.size(one.bytes),
                *map(_time, (one.load, one.attach, one.detach, one.merge, one.unmerge)),
            ]
            for one in found.switches
        ],
    )
    for one in found.switches:
        if one.note:
            typer.echo(f"{one.ref}: {one.note}")


def _time(seconds: float | None) -> str | None:
    """`1.24 ms`, `310 us`."""
    if seconds is None:
        return None
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"
