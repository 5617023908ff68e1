"""`lori suggest`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lori_manager.cli import complete, output
from lori_manager.cli.output import Json
from lori_manager.cli.session import workspace
from lori_manager.cli.settings import TRAINING, Changes, configured, with_settings
from lori_manager.cli.training import show_trained

if TYPE_CHECKING:
    from lori_manager.suggesting import Suggestion


@with_settings(*TRAINING)
def suggest(
    ctx: typer.Context,
    task: Annotated[
        str, typer.Argument(metavar="TASK", autocompletion=complete.tasks, show_default=False)
    ],
    budget_minutes: Annotated[float, typer.Option(help="Time for all probes together.")] = 5.0,
    apply: Annotated[bool, typer.Option("--apply", help="Train with it, too.")] = False,
    json: Json = False,
    *,
    changes: Changes,
) -> None:
    """Propose rank, sparsity, learning rate and steps for a task, and say why.

    A few short trainings on a part of the training rows, judged on another part. A faster
    machine probes more in the same time, so it may propose something else.
    """
    with workspace(ctx) as ws:
        config = configured(ws.settings.config, changes)
        found = ws.suggest(task, budget=budget_minutes * 60, config=config)
        trained = ws.train([task], config.replace(**found.changes)) if apply else []
    if json:
        output.print_json({"suggestion": found, "command": found.command, "trained": trained})
        return
    show(found)
    if trained:
        output.title("trained with it")
        show_trained(trained)


def show(found: Suggestion) -> None:
    """What was tried, what is proposed and why."""
    output.table(
        ["probe", ">rate", ">rank", ">sparsity", ">trained", ">steps", ">held-out loss", ">time"],
        [
            [
                one.what,
                f"{one.settings['learning_rate']:g}",
                one.settings.get("rank"),
                one.settings.get("sparsity"),
                output.count(one.parameters),
                one.steps,
                f"{one.loss:.4f}",
                output.duration(one.seconds),
            ]
            for one in found.probes
        ],
    )
    output.title(f"{found.task}: {found.kind}")
    output.table(
        ["setting", "proposed", "because"],
        [[c.setting, _value(c.value), c.why] for c in found.choices],
    )
    typer.echo(
        f"\n{output.duration(found.seconds)} of {output.duration(found.budget)} on {found.device}, "
        f"{found.step_seconds * 1e3:.3g} ms a step; one seed, {found.held} held-out rows, "
        f"{found.untaught} {found.base_loss:.4f}. Another machine gets to other probes in that "
        f"time.\n\n{found.command}"
    )


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
