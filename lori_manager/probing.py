"""Short trainings on a part of a task's training rows, judged on another part, never stored.

What is chosen by them (learning rates, ranks, sparsities) is chosen without the task's
eval rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lori_manager.by_base import head_of, rows_of, steps_of
from lori_manager.config import Config
from lori_manager.context import Context
from lori_manager.errors import Diverged, InvalidInput
from lori_manager.kinds import LORI, resolved
from lori_manager.projecting import start_of
from lori_manager.records import Task

if TYPE_CHECKING:
    from torch import Tensor

    from lori_manager.adapters.kind import Training
    from lori_manager.training import Progress

HELD = 256  # rows that judge, at most
SHARE = 4  # one row in so many at most
LEAST = 8  # training rows without which nothing can be told


@dataclass(frozen=True)
class Halves:
    """A task's training rows in two: to train on, and to judge by; see `by_base.rows_of`."""

    rows: Sequence[Any]
    held: Sequence[Any]


@dataclass(frozen=True)
class Probe:
    """How a short training went.

    Attributes:
        loss: mean cross-entropy of the held-out rows in nats per completion token, of an
            encoder per row; of a pipeline the mean squared error of its images; infinite where
            the training diverged.
        by_row: (held,) that of each row; empty where it diverged.
        tokens: (held,) completion tokens of each row, 1 of a label or an image.
        seconds: all that it took, the mask and the judging too.
        step_seconds: median of the training's steps, None of too few.
        parameters: that trained.
        peak_bytes: see `metering.Peak`.
    """

    loss: float
    by_row: np.ndarray = field(repr=False)
    tokens: np.ndarray = field(repr=False)
    seconds: float
    step_seconds: float | None
    parameters: int
    peak_bytes: int | None


def halves(ws: Context, task: Task, config: Config) -> Halves:
    """The training rows in two, drawn by the seed; a quarter, at most `HELD`, judges.

    Raises:
        InvalidInput: fewer than `LEAST` training rows.
    """
    from lori_manager.tasks.batches import permutation

    encoded = rows_of(ws, task, "train", config)
    if len(encoded) < LEAST:
        raise InvalidInput(
            f"task {task.name!r} has {len(encoded)} training rows, and short trainings need at "
            f"least {LEAST}, some to train on and some to judge by: add it again with more"
        )
    order = permutation(len(encoded), config.seed, "probing")
    held = min(HELD, len(encoded) // SHARE)
    return Halves([encoded[i] for i in sorted(order[held:])], [encoded[i] for i in order[:held]])


def probe(
    ws: Context,
    task: Task,
    config: Config,
    parts: Halves,
    *,
    steps: int,
    dense: bool = False,
    line: str | None = None,
    mask: Mapping[str, Tensor] | None = None,
    phase: str = "probing",
) -> Probe:
    """Train briefly as `train` would, judge on the held-out rows, keep nothing.

    An encoder's head trains with it, from where `train` would begin.

    Args:
        config: resolved; its learning rate, of dense LoRI its dense one, is the one probed.
        steps: of the optimizer, the schedule being whole in them.
        dense: LoRI without a mask.
        line: whose A it is, where A hangs on the line; the task's own where None.
        mask: of LoRI; where None, made on the rows that train, in as many steps if the settings
            do not say.
        phase: for progress.
    """
    from lori_manager.adapters.heads import with_head
    from lori_manager.metering import Meter
    from lori_manager.training import fit

    base = ws.model(config)
    meter = Meter(phase, base.device)
    told = ws.on_progress
    begin = time.perf_counter()

    def progress(state: Progress) -> None:
        meter.told(state.phase)
        told(state)

    parameters = 0
    by_row = tokens = np.zeros(0)
    loss = math.inf
    try:
        if config.kind == LORI and not dense and mask is None:
            mask = probing_mask(ws, task, config, parts, steps, line)
        with (
            head_of(ws, task, base, config) as head,
            modules_in(ws, task, config, steps, line, None if dense else mask) as inside,
        ):
            training = with_head(inside, head, config.head_learning_rate)
            parameters = sum(p.numel() for p in training.parameters.values())
            peak = config.dense_learning_rate if dense else config.learning_rate
            noise = f"probing {task.name}"  # the same for all that are compared
            fit(base, training.parameters, parts.rows, config, steps=steps, peak=peak, phase=phase,
                on_progress=progress, training=training,
                steps_of=steps_of(ws, base, config, noise))  # fmt: skip
            packing = config.packing if training.packs else "off"
            by_row, tokens = losses(ws, task, base, parts.held, config, packing)
            loss = float(by_row @ tokens / tokens.sum())
    except Diverged:
        by_row = tokens = np.zeros(0)
    seconds = time.perf_counter() - begin
    if not math.isfinite(loss):
        loss = math.inf
    return Probe(loss, by_row, tokens, seconds, meter.step_seconds, parameters, meter.peak_bytes)


def losses(
    ws: Context, task: Task, base: Any, rows: Sequence[Any], config: Config, packing: str
) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) each: loss and tokens, see `Probe`, by the model as it now is."""
    from lori_manager.classification import label_losses
    from lori_manager.scoring import token_stats

    if ws.makes_images:
        from lori_manager.diffusion.noise_loss import held_out_losses
        from lori_manager.tasks.scorers import NoiseLoss

        errors = held_out_losses(base, rows, NoiseLoss.draws, config.score_batch)
        return errors.astype(np.float64), np.ones(len(rows))
    if ws.architecture.encoder:
        found = label_losses(base, len(task.labels), rows, config.score_batch)
        return found, np.ones(len(rows))
    stats = token_stats(base, rows, config.score_batch, packing=packing)
    tokens = np.array([len(one.nll) for one in stats], np.float64)
    sums = np.array([float(np.sum(one.nll, dtype=np.float64)) for one in stats])
    return sums / tokens, tokens


def untaught_loss(ws: Context, task: Task, parts: Halves, config: Config) -> float:
    """The held-out rows' mean loss before any training.

    A language model's or a pipeline's own. An encoder says nothing without a head: there it
    is that of knowing how common each label is among the rows that train (each counted once
    more than it is there).
    """
    if ws.architecture.encoder:
        counts = np.ones(len(task.labels))
        for row in parts.rows:
            counts[row.label] += 1
        shares = counts / counts.sum()
        return float(-np.mean(np.log([shares[row.label] for row in parts.held])))
    base = ws.model(config)
    by_row, tokens = losses(ws, task, base, parts.held, config, config.packing)
    return float(by_row @ tokens / tokens.sum())


def probing_mask(
    ws: Context, task: Task, config: Config, parts: Halves, steps: int, line: str | None = None
) -> dict[str, Tensor]:
    """A mask of LoRI made on the rows that train, for several probes to share.

    Args:
        steps: of the training that it is for: its own too, unless the settings have others.
    """
    from lori_manager.calibrating import calibration_rows, grown_mask

    block = start_of(ws, task, config, line or task.name).block
    rows = calibration_rows(parts.rows, config)
    base, phase = ws.model(config), f"calibrating {task.name}"
    with head_of(ws, task, base, config) as head:
        return grown_mask(
            base, block, rows, config, steps=config.calibration_steps or steps, head=head,
            phase=phase, on_progress=ws.on_progress, steps_of=steps_of(ws, base, config, phase),
        )[0]  # fmt: skip


@contextmanager
def modules_in(
    ws: Context,
    task: Task,
    config: Config,
    steps: int,
    line: str | None = None,
    mask: Mapping[str, Tensor] | None = None,
) -> Iterator[Training]:
    """What trains, in the model; LoRI without a mask trains all of B.

    Raises:
        InvalidInput: settings that the kind cannot have on this base, or for so many steps.
    """
    from lori_manager.adapters import lori
    from lori_manager.adapters.kind import Training, module_of
    from lori_manager.training import no_weights

    base = ws.model(config)
    if config.kind != LORI:
        with module_of(config.kind).training(base, config, steps=steps) as training:
            yield training
        return
    block = start_of(ws, task, config, line or task.name).block
    layers = lori.trainable_layers(base.model, block, mask)
    with lori.in_training(base, layers) as parameters:
        yield Training(parameters, no_weights)


def with_rate(config: Config, rate: float, dense: bool = False) -> Config:
    """Settings of that learning rate, resolved."""
    changes = {"dense_learning_rate" if dense else "learning_rate": rate}
    return resolved(config.replace(**changes))
