"""`lori calibrate` and `lori train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lori_manager.cli import complete, output
from lori_manager.cli.output import Json
from lori_manager.cli.scores import names
from lori_manager.cli.session import workspace
from lori_manager.cli.settings import CALIBRATION, TRAINING, Changes, configured, with_settings
from lori_manager.errors import InvalidInput
from lori_manager.kinds import parse_options
from lori_manager.ranks import ranks

if TYPE_CHECKING:
    from lori_manager.teaching import Trained


@with_settings(*CALIBRATION, also={"calibration_steps": "--steps", "dense_learning_rate": "--lr"})
def calibrate(
    ctx: typer.Context,
    task: Annotated[
        str, typer.Argument(metavar="TASK", autocompletion=complete.tasks, show_default=False)
    ],
    line: Annotated[
        str | None,
        typer.Option(
            help="Whose A the mask is for; the task's own line by default.",
            autocompletion=complete.lines,
        ),
    ] = None,
    json: Json = False,
    *,
    changes: Changes,
) -> None:
    """Find which entries of B matter to a task: its next mask.

    B trains dense from zero; what grew most is kept.
    """
    with workspace(ctx, by_ranks=True) as ws:
        mask = ws.calibrate(task, configured(ws.settings.config, changes), line=line)
        told = ranks().first
    if not told:
        return
    if json:
        output.print_json(mask)
    else:
        columns = ["mask", "task", ">kept", ">of", ">sparsity", "scope", "A"]
        output.table(
            columns,
            [
                [
                    mask.ref,
                    f"{mask.task}#{mask.task_revision}",
                    output.count(mask.kept),
                    output.count(mask.total),
                    f"{mask.sparsity:g}",
                    mask.scope,
                    mask.projection[:12],
                ]
            ],
        )


@with_settings(*TRAINING)
def train(
    ctx: typer.Context,
    tasks: Annotated[
        list[str],
        typer.Argument(metavar="TASK", autocompletion=complete.tasks, show_default=False),
    ],
    mask: Annotated[
        str | None,
        typer.Option(metavar="REF", help="Such as safety%1.", autocompletion=complete.masks),
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="All of B, without a mask.")] = False,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="REF",
            help="Continue this adapter: same A, B kept (orthogonal, nullspace: an A and a B "
            "beside them). Otherwise the base.",
            autocompletion=complete.refs,
        ),
    ] = None,
    line: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Instead of the task's own line.", autocompletion=complete.lines
        ),
    ] = None,
    protect: Annotated[
        bool,
        typer.Option("--protect", help="Keep the mask off what the parents' tasks use."),
    ] = False,
    avoid: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="With --projection nullspace: tasks whose inputs A avoids; by default all that "
            "were taught before.",
            autocompletion=complete.tasks,
        ),
    ] = None,
    replay: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="N rows of every earlier task among the new rows, taught by the adapter of then.",
        ),
    ] = 0,
    replay_general: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="With --replay: N short pieces of general text too, taught by the base.",
        ),
    ] = 240,
    general_text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Where that text is from; the manual that comes with Python."
        ),
    ] = None,
    sequence: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Teach the tasks one after another on this line.",
            autocompletion=complete.lines,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="KEY=VALUE",
            help="An option of the kind's own, see `lori kinds`; may be repeated.",
        ),
    ] = None,
    allow_foreign_mask: Annotated[
        bool,
        typer.Option("--allow-foreign-mask", help="Take a mask that another A calibrated."),
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Train up to N tasks at once, each in a process of its own, through Ray.",
            show_default=False,
        ),
    ] = None,
    slurm: Annotated[
        str | None,
        typer.Option(
            metavar="ARGS",
            help="Train each task as a job of a Slurm cluster, with these options of sbatch, such "
            'as "--partition=gpu --gres=gpu:1 --time=4:00:00".',
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    *,
    changes: Changes,
) -> None:
    """Train tasks one after another, store and score adapters.

    Calibrates where a task has no fitting mask. Interrupted, the same command goes
    on from its last checkpoint. With --sequence every stage continues the one
    before, and is scored on all the tasks, also the coming ones. With --jobs the tasks
    are trained at once instead, on this machine or on the cluster of RAY_ADDRESS, with
    --slurm on a Slurm cluster.
    """
    from lori_manager.teaching import TrainOptions

    at_once = jobs is not None or slurm is not None
    if at_once and sequence is not None:
        given = "--slurm" if jobs is None else "--jobs"
        raise InvalidInput(
            f"{given} trains tasks at once, and the stages of a --sequence go on from one "
            "another: leave one of them out"
        )
    avoided = names(avoid)
    options = TrainOptions(
        mask, dense, start, line, protect, allow_foreign_mask,
        None if avoided is None else tuple(avoided), replay, replay_general,
        None if general_text is None else str(general_text.absolute()),
    )  # fmt: skip
    with workspace(ctx, by_ranks=True) as ws:
        config = configured(ws.settings.config, changes, trains=True)
        if option:
            own = {**config.kind_options, **parse_options(config.kind, option)}
            config = config.replace(kind_options=own)
        if at_once:
            trained = ws.train_jobs(tasks, config, options, jobs=jobs, slurm=slurm)
        else:
            trained = ws.train(tasks, config, options, sequence=sequence)
        told = ranks().first
    if not told:
        return
    if json:
        output.print_json(trained)
    else:
        show_trained(trained)


def show_trained(trained: Sequence[Trained]) -> None:
    """The closing table of a training."""
    columns = ["adapter", "task", "mask", ">score", ">trained", ">size", ">time"]
    rows = []
    for one in trained:
        adapter = one.adapter
        own = next((s for s in one.scores if s.task == adapter.task), None)
        rows.append(
            [
                adapter.ref,
                f"{adapter.task}#{adapter.task_revision}",
                adapter.mask,
                output.with_error(own.value, own.error) if own else None,
                output.count(adapter.facts.get("parameters")),
                output.size(adapter.bytes),
                output.duration(adapter.facts.get("seconds")),
            ]
        )
    output.table(columns, rows)
    protected = {one.adapter.ref: one.capacity for one in trained if one.capacity is not None}
    if protected:
        output.title("share of B that no task uses yet")
        modules = next(iter(protected.values()))
        output.table(
            ["module", *(f">after {ref}" for ref in protected)],
            [[name, *(f"{left[name]:.1%}" for left in protected.values())] for name in modules],
        )
    if any(len(one.scores) > 1 for one in trained):
        output.title("every stage on every task")
        names = [f"{s.task}#{s.task_revision}" for s in trained[0].scores]
        output.table(
            ["adapter", *(f">{name}" for name in names)],
            [[one.adapter.ref, *(output.number(s.value) for s in one.scores)] for one in trained],
        )
