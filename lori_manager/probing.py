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
from typing import TYPE_CHECKING

import numpy as np

from lori_manager.config import Config
from lori_manager.context import Context
from lori_manager.errors import Diverged, InvalidInput
from lori_manager.kinds import LORI, resolved
from lori_manager.projecting import start_of
from lori_manager.records import Task

if TYPE_CHECKING:
    from torch import Tensor

    from lori_manager.adapters.kind import Training
    from lori_manager.tasks.encoding import Encoded
    from lori_manager.training import Progress

HELD = 256  # rows that judge, at most
SHARE = 4  # one row in so many at most
LEAST = 8  # training rows without which nothing can be told


@dataclass(frozen=True)
class Halves:
    """A task's training rows in two: to train on, and to judge by."""

    rows: Sequence[Encoded]
    held: Sequence[Encoded]


@dataclass(frozen=True)
class Probe:
    """How a short training went.

    Attributes:
        loss: mean cross-entropy of the held-out rows in nats per completion token; infinite
            where the training diverged.
        by_row: (held,) that of each row; empty where it diverged.
        tokens: (held,) completion tokens of each row.
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

    _, encoded = ws.rows(task, "train", config.max_length)
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

    Args:
        config: resolved; its learning rate, of dense LoRI its dense one, is the one probed.
        steps: of the optimizer, the schedule being whole in them.
        dense: LoRI without a mask.
        line: whose A it is, where A hangs on the line; the task's own where None.
        mask: of LoRI; made on the rows that train where None.
        phase: for progress.
    """
    from lori_manager.metering import Meter
    from lori_manager.scoring import token_stats
    from lori_manager.training import fit

    base = ws.base_model(config)
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
        with _modules(ws, task, config, parts, steps, dense, line, mask) as training:
            parameters = sum(p.numel() for p in training.parameters.values())
            peak = config.dense_learning_rate if dense else config.learning_rate
            fit(base, training.parameters, parts.rows, config, steps=steps, peak=peak, phase=phase,
                on_progress=progress, training=training)  # fmt: skip
            packing = config.packing if training.packs else "off"
            found = token_stats(base, parts.held, config.score_batch, packing=packing)
            tokens = np.array([len(one.nll) for one in found], np.float64)
            by_row = np.array([float(np.sum(one.nll, dtype=np.float64)) for one in found]) / tokens
            loss = float(by_row @ tokens / tokens.sum())
    except Diverged:
        by_row = tokens = np.zeros(0)
    seconds = time.perf_counter() - begin
    if not math.isfinite(loss):
        loss = math.inf
    return Probe(loss, by_row, tokens, seconds, meter.step_seconds, parameters, meter.peak_bytes)


def probing_mask(
    ws: Context, task: Task, config: Config, parts: Halves, line: str | None = None
) -> dict[str, Tensor]:
    """A mask of LoRI made on the rows that train, for several probes to share."""
    from lori_manager.calibrating import grown_mask
    from lori_manager.tasks.batches import permutation

    block = start_of(ws, task, config, line or task.name).block
    chosen = permutation(len(parts.rows), config.seed, "calibration")[: config.calibration_rows]
    rows = [parts.rows[i] for i in sorted(chosen)]
    phase = f"calibrating {task.name}"
    return grown_mask(
        ws.base_model(config), block, rows, config, phase=phase, on_progress=ws.on_progress
    )[0]


@contextmanager
def _modules(
    ws: Context,
    task: Task,
    config: Config,
    parts: Halves,
    steps: int,
    dense: bool,
    line: str | None,
    mask: Mapping[str, Tensor] | None,
) -> Iterator[Training]:
    """What trains, in the model."""
    from lori_manager.adapters import lori
    from lori_manager.adapters.kind import Training, module_of
    from lori_manager.training import no_weights

    base = ws.base_model(config)
    if config.kind != LORI:
        with module_of(config.kind).training(base, config, steps=steps) as training:
            yield training
        return
    if not dense and mask is None:
        mask = probing_mask(ws, task, config, parts, line)
    block = start_of(ws, task, config, line or task.name).block
    layers = lori.trainable_layers(base.model, block, None if dense else mask)
    with lori.in_training(base, layers) as parameters:
        yield Training(parameters, no_weights)


def with_rate(config: Config, rate: float, dense: bool = False) -> Config:
    """Settings of that learning rate, resolved."""
    changes = {"dense_learning_rate" if dense else "learning_rate": rate}
    return resolved(config.replace(**changes))
