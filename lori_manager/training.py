"""The training loop: frozen model, a few parameters, exact resume."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lori_manager import checkpoints
from lori_manager.adapters.kind import Training
from lori_manager.config import Config
from lori_manager.engine.head import SoftTargets
from lori_manager.engine.weights import Stored
from lori_manager.errors import Diverged, InvalidInput
from lori_manager.forward import Forward
from lori_manager.gradients import Gradients, Late, checkpointed, micro_batches
from lori_manager.models import BaseModel
from lori_manager.ranks import ranks
from lori_manager.tasks.batches import training_order
from lori_manager.tasks.encoding import Encoded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a run is, given to the caller after every step; `job` is which of several at once."""

    phase: str
    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float
    job: str = ""


OnProgress = Callable[[Progress], None]


def steps_told(tell: Callable[[int, int], None] | None) -> OnProgress | None:
    """Progress for what is called with (steps done, steps in all)."""
    return None if tell is None else lambda told: tell(told.step, told.steps)


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind.

    Attributes:
        losses: mean cross-entropy in nats per completion token, or per row that has a label; of
            images, mean squared error. One a step.
        tokens: real tokens that went through the model, padding left out; of images, images.
        seconds: time in the loop, over all sessions of a resumed run.
        parameters: how many values trained.
    """

    losses: list[float]
    tokens: int
    seconds: float
    parameters: int


class Steps(Protocol):
    """What gives the gradients of a training's steps, one after the other."""

    def of(self, parts: Any) -> Tensor:
        """The mean loss of the next step's rows, its gradient left in the parameters."""


# (what trains, the rows of every step left in parts, number of the first of them) -> Steps.
StepsOf = Callable[[Training, Sequence[Any], int], AbstractContextManager[Steps]]


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup: float) -> float:
    """The rate of step 0..steps-1: linear warm-up, then constant, linear or cosine decay.

    Decays end above zero: the last step still counts.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    left = (steps - step) / max(steps - rising, 1)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * left
    return peak * 0.5 * (1 - math.cos(math.pi * left))


def steps_for(rows: int, config: Config) -> int:
    """Optimizer steps: `steps`, or as many as `epochs` passes take."""
    if config.steps:
        return config.steps
    return max(1, math.ceil(config.epochs * math.ceil(rows / config.batch)))


def completion_steps(base: BaseModel, config: Config, soft: SoftTargets | None = None) -> StepsOf:
    """Steps on the completions of encoded rows; for `soft` see `fit`."""

    @contextmanager
    def steps(
        training: Training, batches: Sequence[Sequence[list[Encoded]]], first: int
    ) -> Iterator[Steps]:
        packing = config.packing if training.packs else "off"
        graphs = config.graphs if training.graphs else "off"
        trained = list(training.parameters.values())
        forward = Forward(base, packing=packing, soft=soft)
        with forward.ready(), checkpointed(base.model, config.checkpointing == "on"):
            yield Gradients(forward, trained, batches, graphs, training.penalty)

    return steps


def fit(
    base: BaseModel,
    parameters: Mapping[str, nn.Parameter],
    rows: Sequence[Any],
    config: Config,
    *,
    steps: int,
    peak: float,
    phase: str = "train",
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
    soft: SoftTargets | None = None,
    training: Training | None = None,
    steps_of: StepsOf | None = None,
) -> TrainResult:
    """Train parameters of the model on the rows' completions, or on what `steps_of` makes of rows.

    Args:
        base: the model with its trainable layers in place.
        parameters: name -> parameter; they change in place, nothing else does.
        rows: encoded training rows; with `steps_of` anything that has a `length`.
        config: batch, schedule, weight decay, clipping and seed count here.
        steps: optimizer steps.
        peak: learning rate after the warm-up.
        phase: a word for progress and checkpoints.
        checkpoint: a folder for the state while this runs. A state found there
            is gone on from: on the CPU the result is bit for bit that of a run
            without interruption. The caller discards it once the result is safe.
        on_progress: called after every step.
        soft: what the rows' `taught` refer to, where a teacher says what is right.
        training: whose parameters these are, where its kind wants more than AdamW's steps.
        steps_of: gives the gradients; None is `completion_steps`.
    Raises:
        Diverged: the loss or a value stopped being finite.
    """
    trained = list(parameters.values())
    if not rows or not any(p.numel() for p in trained):
        raise InvalidInput("nothing to train: expected rows and at least one parameter")
    training = training or Training(parameters, no_weights)
    peaks = [training.rates.get(name, peak) for name in parameters]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p, own in zip(trained, peaks, strict=True) if own == one]}
            for one in dict.fromkeys(peaks)
        ],
        lr=peak,
        betas=(0.9, 0.999),
        weight_decay=config.weight_decay,
        fused=True if base.device.type == "cuda" else None,
    )
    ranks().alike(trained)  # unlike machines may have begun with unlike ones
    order = training_order([r.length for r in rows], config.batch, steps, config.seed)
    state = _load_state(checkpoint, phase, training, optimizer, steps)
    losses, tokens, before = state.losses, state.tokens, state.seconds
    start = saved = time.monotonic()
    took = 0.0

    def state_now(step: int) -> _State:
        return _State(phase, step, steps, losses, tokens, before + time.monotonic() - start)

    def read(late: Late) -> None:
        losses.append(late.value())
        if not math.isfinite(losses[-1]):
            raise Diverged(
                f"the loss is {losses[-1]} at step {len(losses)} of {phase}: lower the "
                f"learning rate (now {peak:g}) or check the rows"
            )

    def tell(done: int) -> None:
        if on_progress:
            # A coarse clock may not have moved.
            spent = max(before + time.monotonic() - start, 1e-9)
            left = spent / done * (steps - done)
            on_progress(Progress(phase, done, steps, losses[done - 1], tokens / spent, left))

    batches = [
        micro_batches([rows[i] for i in order[step]], config.micro_batch * ranks().world)
        for step in range(state.step, steps)
    ]
    waiting: deque[Late] = deque()
    steps_of = steps_of or completion_steps(base, config, soft)
    with steps_of(training, batches, state.step) as gradients:
        for step, parts in enumerate(batches, start=state.step):
            for group, own in zip(optimizer.param_groups, dict.fromkeys(peaks), strict=True):
                group["lr"] = learning_rate(step, steps, own, config.schedule, config.warmup)
            loss = gradients.of(parts)
            if config.clip:
                nn.utils.clip_grad_norm_(trained, config.clip)
            optimizer.step()
            torch.autograd.graph.increment_version(trained)  # fused steps do not tell
            if training.after_step is not None:
                training.after_step(step + 1)
            tokens += sum(r.length for part in parts for r in part)
            waiting.append(Late(loss))
            # Of what takes long to save, no more than a tenth of the time goes into it.
            pause = max(config.checkpoint_seconds, 9 * took if config.checkpoint_seconds else 0)
            due = checkpoint is not None and ranks().first and step + 1 < steps and (
                time.monotonic() - saved >= pause
            )  # fmt: skip
            # On a GPU a step's loss is read when the next step has been launched.
            keep = 0 if due or step + 1 == steps or loss.device.type == "cpu" else 1
            known = len(losses)
            while len(waiting) > keep:
                read(waiting.popleft())
            if checkpoint is not None and due:
                began = time.monotonic()
                _save_state(checkpoint, state_now(step + 1), training, optimizer)
                saved = time.monotonic()
                took = saved - began
            for done in range(known, len(losses)):
                tell(done + 1)
    if not all(bool(torch.isfinite(p).all()) for p in trained):
        raise Diverged(
            f"values are not finite after step {steps} of {phase}: lower the learning rate "
            f"(now {peak:g}) or check the rows"
        )
    final = state_now(steps)
    return TrainResult(
        losses,
        tokens,
        final.seconds,
        sum(p.numel() for p in trained),
    )


def no_weights(_: torch.dtype) -> Stored:
    """For parameters whose caller makes an adapter of them itself."""
    raise ValueError("these parameters are no kind's own")


_OWN = "|"  # before the names of what a kind keeps beside its parameters


@dataclass(frozen=True)
class _State:
    phase: str
    step: int
    steps: int
    losses: list[float]
    tokens: int
    seconds: float


def _save_state(
    folder: Path,
    state: _State,
    training: Training,
    optimizer: torch.optim.AdamW,
) -> None:
    """Keep values and both moments, and what the kind wants kept beside them."""
    own = {} if training.state is None else training.state()
    tensors = {f"{_OWN}|{name}": tensor for name, tensor in own.items()}
    for name, parameter in training.parameters.items():
        moments = optimizer.state[parameter]
        tensors[f"{name}|value"] = parameter
        tensors[f"{name}|mean"] = moments["exp_avg"]
        tensors[f"{name}|square"] = moments["exp_avg_sq"]
    checkpoints.save(folder, state.step, tensors, state.__dict__)


def _load_state(
    folder: Path | None,
    phase: str,
    training: Training,
    optimizer: torch.optim.AdamW,
    steps: int,
) -> _State:
    """The newest usable state, put into parameters and optimizer, or a fresh one."""
    fresh = _State(phase, 0, steps, [], 0, 0.0)

    def check(found: checkpoints.Checkpoint) -> None:
        if (found.facts["phase"], found.facts["steps"]) != (phase, steps):
            told = f"{found.facts['phase']!r} with {found.facts['steps']} steps"
            raise ValueError(f"it is of {told}")
        for name, parameter in training.parameters.items():
            for part in ("value", "mean", "square"):
                if found.tensors[f"{name}|{part}"].shape != parameter.shape:
                    raise ValueError("it has other shapes")
        for name, own in (training.state() if training.state is not None else {}).items():
            if found.tensors[f"{_OWN}|{name}"].shape != own.shape:
                raise ValueError("what its kind keeps has other shapes")

    found = ranks().led(
        lambda: None if folder is None else checkpoints.newest(folder, check), "the checkpoint"
    )
    if found is None:
        return fresh
    state = _State(**found.facts)
    for name, like in training.parameters.items():
        with torch.no_grad():
            like.copy_(found.tensors[f"{name}|value"])
        optimizer.state[like] = {
            "step": torch.tensor(float(state.step)).to(like.device),
            "exp_avg": found.tensors[f"{name}|mean"].to(like.device),
            "exp_avg_sq": found.tensors[f"{name}|square"].to(like.device),
        }
    if training.load_state is not None:
        kept = found.tensors.items()
        training.load_state({k.removeprefix(f"{_OWN}|"): v for k, v in kept if k.startswith(_OWN)})
    logger.info("going on with %s at step %d of %d", phase, state.step + 1, steps)
    return state
