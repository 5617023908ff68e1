"""`lori place`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lori_manager.cli import complete, output
from lori_manager.cli.output import Json
from lori_manager.cli.session import workspace
from lori_manager.cli.settings import Changes, configured, with_settings
from lori_manager.config import PLOP_TYPES

if TYPE_CHECKING:
    from lori_manager.config import Config
    from lori_manager.placement import Placement, TypeScore

SHADES = " ░▒▓█"


@with_settings("rank", "seed", "precision", "base_bits", "packing", "kernels")
def place(
    ctx: typer.Context,
    task: Annotated[
        str, typer.Argument(metavar="TASK", autocompletion=complete.tasks, show_default=False)
    ],
    top: Annotated[int, typer.Option(help="How many types of layers to choose.")] = PLOP_TYPES,
    prompts: Annotated[
        int,
        typer.Option(help="How many of the task's prompts to read; of an encoder, of its rows."),
    ] = 64,
    layers: Annotated[bool, typer.Option("--layers", help="The score of every layer too.")] = False,
    apply: Annotated[
        bool, typer.Option("--apply", help="Make the choice the `targets` of lori.toml.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw the scores.")] = None,
    json: Json = False,
    *,
    changes: Changes,
) -> None:
    """Choose the types of layers that a task's adapter should go to.

    By PLoP (arXiv:2506.20629): the base reads prompts of the task (an encoder its texts or
    images), and the types of layers that answer them least for weights of their size are chosen.
    `lori train --targets plop` does the same before it trains.
    """
    from lori_manager.reporting.drawing import check_plot
    from lori_manager.reporting.placement_plot import placement_svg
    from lori_manager.store.files import write_atomic

    if plot is not None:
        check_plot(plot)
    with workspace(ctx) as ws:
        config = configured(ws.settings.config, changes)
        found = ws.place(task, config, prompts=prompts)
        targets = found.targets(top)
        applied = ws.apply_placement(targets) if apply else None
    if plot is not None:
        write_atomic(plot, placement_svg(found, top).encode(), private=False)
    if json:
        output.print_json(_document(found, top, config, applied, plot))
        return
    _show_types(found, top, config.rank)
    if layers:
        output.title("scores by layer")
        _show_layers(found.types)
    typer.echo(f"\n{found.reason(top)}")
    if applied is not None:
        typer.echo(output.one_line(f"{applied}: targets = {', '.join(targets)}"))
    if plot is not None:
        typer.echo(output.one_line(f"drawn in {plot}"))


def _show_types(found: Placement, top: int, rank: int) -> None:
    chosen = found.chosen(top)
    columns = ["type", ">score", ">std over layers", ">layers", f">B at rank {rank}", ">A and B"]
    rows = [
        [
            one.name,
            output.number(one.score),
            output.number(one.spread),
            output.count(len(one.modules)),
            output.count(one.parameters(rank)),
            output.count(one.lora_parameters(rank)),
            "yes" if one in chosen else "",
        ]
        for one in found.types
    ]
    output.table([*columns, "chosen"], rows)


def _show_layers(types: Iterable[TypeScore]) -> None:
    """A row a layer, a column a type; the darker, the higher in the logarithm."""
    types = list(types)
    every = [math.log(score) for one in types for score in one.layers.values()]
    low, high = min(every), max(every)

    def cell(score: float | None) -> str | None:
        if score is None:
            return None
        share = (math.log(score) - low) / (high - low) if high > low else 0.0
        return f"{score:.2f} {SHADES[round(share * (len(SHADES) - 1))]}"

    numbers = sorted({number for one in types for number in one.layers}, key=_order)
    output.table(
        [">layer", *(f">{one.name}" for one in types)],
        [[number, *(cell(one.layers.get(number)) for one in types)] for number in numbers],
    )


def _order(number: int | None) -> int:
    return -1 if number is None else number


def _document(
    found: Placement, top: int, config: Config, applied: Path | None, plot: Path | None
) -> dict[str, Any]:
    chosen = found.chosen(top)
    return {
        "task": f"{found.task}#{found.task_revision}",
        "reads": found.reads,
        "prompts": found.prompts,
        "tokens": found.tokens,
        "seed": found.seed,
        "precision": found.precision,
        "rank": config.rank,
        "types": [
            {
                "type": one.name,
                "score": one.score,
                "spread": one.spread,
                "layers": len(one.modules),
                "parameters": one.parameters(config.rank),
                "lora_parameters": one.lora_parameters(config.rank),
                "chosen": one in chosen,
            }
            for one in found.types
        ],
        "targets": found.targets(top),
        "reason": found.reason(top),
        "scores": found.scores,
        "applied": applied,
        "plot": plot,
    }
