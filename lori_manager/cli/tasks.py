"""`lori add-task` and `lori tasks`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lori_manager.cli import complete, output
from lori_manager.cli.output import Json
from lori_manager.cli.session import records, workspace
from lori_manager.cli.training import show_trained
from lori_manager.errors import InvalidInput
from lori_manager.records import SPLITS

if TYPE_CHECKING:
    from lori_manager.intake import AddedTask

HARNESS = "lm-evaluation-harness"
IMAGES = "Images"
ROWS = "JSONL or Parquet file, folder or hf:owner/name[:config][:split]"


def add_task(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="Of the task and of its own line.")],
    train: Annotated[
        str | None,
        typer.Option(metavar="FILE", help=f"Rows to learn: {ROWS}. Without it, only scored."),
    ] = None,
    eval: Annotated[str | None, typer.Option(metavar="FILE", help="Rows to score on.")] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows that masks are calibrated on.")
    ] = None,
    probe: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows set aside for merging.")
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="exact_match by default; another name than the known ones lists them.",
            autocompletion=complete.scorers,
        ),
    ] = None,
    description: Annotated[str | None, typer.Option(help="For people.")] = None,
    probe_rows: Annotated[
        int | None, typer.Option(help="Train rows to set aside for merging; 256 by default.")
    ] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Take rows common to train and eval.")
    ] = False,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="Eval rows and scorer of an lm-evaluation-harness task (extra `lm-eval`).",
            rich_help_panel=HARNESS,
        ),
    ] = None,
    lm_eval_include: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Look for its YAML here first.", rich_help_panel=HARNESS
        ),
    ] = None,
    lm_eval_metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="acc, acc_norm, exact_match,strict-match, ...; its first by default.",
            rich_help_panel=HARNESS,
        ),
    ] = None,
    lm_eval_fewshot: Annotated[
        int | None,
        typer.Option(metavar="N", help="Examples before each question.", rich_help_panel=HARNESS),
    ] = None,
    lm_eval_limit: Annotated[
        int | None,
        typer.Option(metavar="N", help="Only its first N documents.", rich_help_panel=HARNESS),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Images to learn and score on: captions in metadata.jsonl or NAME.txt files, or "
            "for an image encoder LABEL/NAME.png or labels in metadata.jsonl.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    eval_images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Images to score on instead.", rich_help_panel=IMAGES),
    ] = None,
    eval_share: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Of --images, held out; 0.2 by default.", rich_help_panel=IMAGES
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the draw of those; lori.toml's by default.", rich_help_panel=IMAGES),
    ] = None,
    run: Annotated[bool, typer.Option("--run", help="Train the task at once.")] = False,
    json: Json = False,
) -> None:
    """Check and freeze a task's rows, or its images where the base takes images.

    Other rows than before make a new revision. What is not given comes from
    [tasks.NAME] in lori.toml, then from tasks/NAME/{train,eval,calibration,probe}.jsonl
    in the workspace.
    """
    of_text = (
        train, eval, calibration, probe, lm_eval, lm_eval_include, lm_eval_metric,
        lm_eval_fewshot, lm_eval_limit,
    )  # fmt: skip
    if images is not None and (allow_overlap or any(given is not None for given in of_text)):
        raise InvalidInput("--images goes with --eval-images, --eval-share and --seed alone, and "
                           "with labels also with --scorer and --probe-rows")  # fmt: skip
    if images is None and any(given is not None for given in (eval_images, eval_share, seed)):
        raise InvalidInput("--eval-images, --eval-share and --seed go with --images DIR")
    with workspace(ctx) as ws:
        if images is not None:
            added = ws.add_image_task(
                name,
                images.absolute(),
                eval_images=None if eval_images is None else eval_images.absolute(),
                eval_share=eval_share,
                seed=seed,
                description=description,
                scorer=scorer,
                probe_rows=probe_rows,
            )
        else:
            added = ws.add_task(
                name,
                train=_from_here(train),
                eval=_from_here(eval),
                calibration=_from_here(calibration),
                probe=_from_here(probe),
                scorer=scorer,
                description=description,
                probe_rows=probe_rows,
                allow_overlap=allow_overlap or None,
                lm_eval=lm_eval,
                lm_eval_include=_from_here(lm_eval_include),
                lm_eval_metric=lm_eval_metric,
                lm_eval_fewshot=lm_eval_fewshot,
                lm_eval_limit=lm_eval_limit,
            )
        if not json:
            _show_added(added)
        trained = ws.train([name]) if run else []
    if json:
        output.print_json({"added": added, "trained": trained})
    elif run:
        typer.echo()
        show_trained(trained)


def tasks(ctx: typer.Context, json: Json = False) -> None:
    """List the tasks, each at its latest revision."""
    with records(ctx) as ws:
        found = ws.store.tasks()
    if json:
        output.print_json(found)
        return
    columns = ["task", "scorer", *(f">{split}" for split in SPLITS), "added", "description"]
    rows = []
    for task in found:
        sizes = [task.splits[s].rows if s in task.splits else None for s in SPLITS]
        counts = [output.count(n) for n in sizes]
        rows.append(
            [task.ref, task.scorer, *counts, output.time(task.created_at), task.description]
        )
    output.table(columns, rows)


def _from_here(source: str | None) -> str | None:
    """A path given on the command line starts at the current folder, not at the workspace."""
    if source is None or source.startswith("hf:"):
        return source
    return str(Path(source).absolute())


def _show_added(added: AddedTask) -> None:
    task = added.task
    state = "new" if added.new else "unchanged"
    typer.echo(f"task {task.ref} ({state}), scored by {task.scorer}")
    columns = ["split", ">rows", ">tokens", ">longest", ">truncated"]
    rows = [
        [name, *map(output.count, (split.rows, split.tokens, split.longest, split.truncated))]
        for name, split in task.splits.items()
    ]
    of_text = len(columns) if task.images is None else 2
    output.table(columns[:of_text], [row[:of_text] for row in rows])
    for note in added.notes:
        typer.echo(output.one_line(note))
