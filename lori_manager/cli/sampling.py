"""`lori sample`: images by the base and by adapters, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lori_manager.cli import complete, output
from lori_manager.cli.output import Json
from lori_manager.cli.session import workspace
from lori_manager.cli.settings import Changes, configured, with_settings


@with_settings("precision")
def sample(
    ctx: typer.Context,
    refs: Annotated[
        list[str], typer.Argument(metavar="REF", autocompletion=complete.refs, show_default=False)
    ],
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar='"A;B"',
            help="A column each, apart by semicolons; captions of the tasks' eval images by "
            "default.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise that images start from.")] = 0,
    steps: Annotated[int, typer.Option(help="Of the pipeline's own scheduler.")] = 20,
    guidance: Annotated[float, typer.Option(help="Classifier-free; 1 is off.")] = 7.5,
    out: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The PNG.")] = Path(
        "grid.png"
    ),
    json: Json = False,
    *,
    changes: Changes,
) -> None:
    """Paint prompts by the base and by adapters: one PNG, a row each.

    Every row starts from the same noise, so that rows differ by their adapter alone.
    """
    wanted = None if prompts is None else [p.strip() for p in prompts.split(";") if p.strip()]
    with workspace(ctx) as ws:
        sampled = ws.sample(
            refs,
            wanted,
            path=out,
            seed=seed,
            steps=steps,
            guidance=guidance,
            config=configured(ws.settings.config, changes),
        )
    if json:
        output.print_json(sampled)
    else:
        shown = f"{len(sampled.rows)} rows ({', '.join(sampled.rows)})"
        typer.echo(f"{sampled.path}: {shown}, {len(sampled.prompts)} prompts")
