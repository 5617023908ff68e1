"""`lori compare`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lori_manager.cli import complete, output
from lori_manager.cli.output import Json
from lori_manager.cli.scores import names
from lori_manager.cli.session import workspace
from lori_manager.cli.settings import TRAINING, Changes, configured, with_settings
from lori_manager.errors import InvalidInput
from lori_manager.plain import counted

if TYPE_CHECKING:
    from lori_manager.reporting.kind_comparisons import Against, KindsCompared

# Both are a kind's own: the one named by --kinds, the other searched.
SHARED = tuple(key for key in TRAINING if key not in ("kind", "learning_rate"))


@with_settings(*SHARED)
def compare(
    ctx: typer.Context,
    task: Annotated[
        str | None,
        typer.Argument(metavar="TASK", autocompletion=complete.tasks, show_default=False),
    ] = None,
    kinds: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="See `lori kinds`; lori-d is LoRI without a mask. The others are compared with "
            "the first.",
        ),
    ] = "lori,lora",
    seeds: Annotated[int, typer.Option(help="Trainings of each kind.")] = 3,
    budget_minutes: Annotated[
        float | None, typer.Option(help="Begin nothing new after so long.", show_default="none")
    ] = None,
    rates: Annotated[int, typer.Option(help="Learning rates to try for each kind.")] = 5,
    rate_factor: Annotated[float, typer.Option(help="Between neighbouring rates.")] = 3.0,
    search_share: Annotated[
        float, typer.Option(help="Of a full training's steps, for each rate tried.")
    ] = 0.25,
    full_rates: Annotated[
        int,
        typer.Option(
            help="Trainings of full length at most that settle a kind's rate: at the best one, "
            "then lower for as long as that helps; 0 for none.",
        ),
    ] = 3,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw the scores there, too.")
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="Show what was compared before, of TASK or of all.")
    ] = False,
    json: Json = False,
    *,
    changes: Changes,
) -> None:
    """Train a task with several kinds of adapters, on equal data and steps, and compare them.

    Each kind's learning rate is searched by short trainings on a part of the training rows and
    settled by a few of full length, judged on another part; then every kind is trained with
    every seed, stored on a line of its own, TASK.KIND, and scored. The same command goes on
    where it was interrupted, and takes further kinds and seeds.
    """
    from lori_manager.reporting.drawing import check_plot

    if plot is not None:
        check_plot(plot)
    with workspace(ctx) as ws:
        if listed:
            from lori_manager.reporting.kind_comparisons import kinds_compared

            stored = [c for c in ws.store.kind_comparisons() if task in (None, c.task)]
            found = [kinds_compared(ws.store, one) for one in stored]
        else:
            from lori_manager.kind_comparison import RateSearch

            if task is None:
                raise InvalidInput("name a task to compare kinds on, or give --list")
            found = [
                ws.compare_kinds(
                    task,
                    names(kinds) or [],
                    seeds=seeds,
                    budget=None if budget_minutes is None else budget_minutes * 60,
                    config=configured(ws.settings.config, changes),
                    search=RateSearch(rates, rate_factor, search_share, full_rates),
                )
            ]
    if plot is not None:
        from lori_manager.reporting.kinds_plot import standalone
        from lori_manager.store.files import write_atomic

        if len(found) != 1:
            raise InvalidInput(f"--plot draws one comparison, and there are {len(found)}: name "
                               "the task and settings of one")  # fmt: skip
        write_atomic(plot.absolute(), standalone(found[0]).encode(), private=False)
    if json:
        output.print_json(found if listed else found[0])
        return
    for number, one in enumerate(found):
        if number:
            typer.echo()
        show(one)


def show(found: KindsCompared) -> None:
    """The table of a comparison, and what has to be known about it."""
    typer.echo(f"{found.task}: {found.scorer}, {found.rows:,} rows; {found.steps:,} steps each, "
               f"on {', '.join(found.devices) or 'nothing yet'}")  # fmt: skip
    output.table(
        ["kind", ">seeds", ">score [95%]", f">against {found.first} [95%]", ">p", "", ">trained",
         ">stored", ">step", ">training", ">memory", ">rate", ">search"],
        [
            [
                kind.entry,
                len(kind.seeds),
                _interval(kind.value, kind.low, kind.high, ""),
                *_against(kind.against, found.first),
                output.count(kind.parameters),
                output.size(kind.bytes),
                _milliseconds(kind.step_seconds),
                output.duration(kind.seconds),
                output.size(kind.peak_bytes),
                None if kind.rate is None else f"{kind.rate:g}{' (edge)' * kind.edge}",
                output.duration(kind.search_seconds),
            ]
            for kind in found.kinds
        ],
    )  # fmt: skip
    several = max((len(kind.seeds) for kind in found.kinds), default=0) > 1
    typer.echo(
        f"\nrate: the best of {found.points} by the loss on held-out training rows after "
        f"{counted(found.search_steps, 'step')}{_settled(found)}; p: paired over rows"
        f"{' and seeds, both taken as random' if several else ', of one seed'}; Holm over the kinds"
    )
    for kind in found.kinds:
        if kind.diverged:
            typer.echo(f"{kind.entry}: seed {', '.join(map(str, kind.diverged))} diverged")
    for line in found.missing:
        typer.echo(f"not done: {line}; the same command goes on")


def _settled(found: KindsCompared) -> str:
    return f", settled by at most {found.full} of all {found.steps}" if found.full else ""


def _interval(value: float, low: float, high: float, sign: str) -> str | None:
    if math.isnan(value):
        return None
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _against(told: Against | None, first: str) -> list[str | None]:
    if told is None:
        return [None, None, ""]
    p = "<1e-6" if told.corrected < 1e-6 else f"{told.corrected:.2g}"
    change = _interval(told.change, told.low, told.high, "+")
    return [change, p, f"{told.verdict} {first}"]


def _milliseconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds * 1e3:.3g} ms"
