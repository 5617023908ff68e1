"""The training loop: frozen model, a few parameters, exact resume."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from lori_manager.adapters.kind import Training
from lori_manager.config import Config
from lori_manager.engine.head import SoftTargets
from lori_manager.engine.weights import Stored
from lori_manager.errors import Diverged, InvalidInput
from lori_manager.forward import Forward
from lori_manager.gradients import Gradients, Late, checkpointed, micro_batches
from lori_manager.models import BaseModel
from lori_manager.store.files import write_atomic
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
        losses: mean cross-entropy in nats per completion token, one a step.
        tokens: real tokens that went through the model, padding left out.
        seconds: time in the loop, over all sessions of a resumed run.
        parameters: how many values trained.
    """

    losses: list[float]
    tokens: int
    seconds: float
    parameters: int


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


def fit(
    base: BaseModel,
    parameters: Mapping[str, nn.Parameter],
    rows: Sequence[Encoded],
    config: Config,
    *,
    steps: int,
    peak: float,
    phase: str = "train",
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
    soft: SoftTargets | None = None,
    training: Training | None = None,
) -> TrainResult:
    """Train parameters of the model on the rows' completions.

    Args:
        base: the model with its trainable layers in place.
        parameters: name -> parameter; they change in place, nothing else does.
        rows: encoded training rows.
        config: batch, schedule, weight decay, clipping and seed count here.
        steps: optimizer steps.
        peak: learning rate after the warm-up.
        phase: a word for progress and checkpoints.
        checkpoint: where the state is kept while this runs. A state found there
            is gone on from: on the CPU the result is bit for bit that of a run
            without interruption. The caller removes it once the result is safe.
        on_progress: called after every step.
        soft: what the rows' `taught` refer to, where a teacher says what is right.
        training: whose parameters these are, where its kind wants more than AdamW's steps.
    Raises:
        Diverged: the loss or a value stopped being finite.
    """
    trained = list(parameters.values())
    if not rows or not any(p.numel() for p in trained):
        raise InvalidInput("nothing to train: expected rows and at least one parameter")
    optimizer = torch.optim.AdamW(
        trained,
        lr=peak,
        betas=(0.9, 0.999),
        weight_decay=config.weight_decay,
        fused=True if base.device.type == "cuda" else None,
    )
    order = training_order([len(r.ids) for r in rows], config.batch, steps, config.seed)
    training = training or Training(parameters, no_weights)
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
        micro_batches([rows[i] for i in order[step]], config.micro_batch)
        for step in range(state.step, steps)
    ]
    packing = config.packing if training.packs else "off"
    forward = Forward(base, packing=packing, soft=soft)
    waiting: deque[Late] = deque()
    with forward.ready(), checkpointed(base.model, config.checkpointing == "on"):
        graphs = config.graphs if training.graphs else "off"
        gradients = Gradients(forward, trained, batches, graphs, training.penalty)
        for step, parts in enumerate(batches, start=state.step):
            rate = learning_rate(step, steps, peak, config.schedule, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = gradients.of(parts)
            if config.clip:
                nn.utils.clip_grad_norm_(trained, config.clip)
            optimizer.step()
            torch.autograd.graph.increment_version(trained)  # fused steps do not tell
            if training.after_step is not None:
                training.after_step(step + 1)
            tokens += sum(len(r.ids) for part in parts for r in part)
            waiting.append(Late(loss))
            # Of what takes long to save, no more than a tenth of the time goes into it.
            pause = max(config.checkpoint_seconds, 9 * took if config.checkpoint_seconds else 0)
            due = checkpoint is not None and step + 1 < steps and (
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
    path: Path,
    state: _State,
    training: Training,
    optimizer: torch.optim.AdamW,
) -> None:
    """Values and both moments in one file with its digest behind, put in place whole."""
    own = {} if training.state is None else training.state()
    tensors = {f"{_OWN}|{name}": tensor for name, tensor in own.items()}
    for name, parameter in training.parameters.items():
        moments = optimizer.state[parameter]
        tensors[f"{name}|value"] = parameter.detach()
        tensors[f"{name}|mean"] = moments["exp_avg"]
        tensors[f"{name}|square"] = moments["exp_avg_sq"]
    tensors = {k: v.cpu().contiguous() for k, v in tensors.items()}
    data = save_tensors(tensors, metadata={"state": json.dumps(state.__dict__)})
    write_atomic(path, data + hashlib.sha256(data).digest())


def _load_state(
    path: Path | None,
    phase: str,
    training: Training,
    optimizer: torch.optim.AdamW,
    steps: int,
) -> _State:
    """The state kept at `path`, put into parameters and optimizer, or a fresh one."""
    fresh = _State(phase, 0, steps, [], 0, 0.0)
    if path is None or not path.is_file():
        return fresh
    try:
        stored = path.read_bytes()
        data, digest = stored[:-32], stored[-32:]
        if hashlib.sha256(data).digest() != digest:
            raise ValueError("it is not what was written")
        tensors = load_tensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        state = _State(**json.loads(header["__metadata__"]["state"]))
        if (state.phase, state.steps) != (phase, steps):
            raise ValueError(f"it is of {state.phase!r} with {state.steps} steps")
        loaded = [
            (parameter, *(tensors[f"{name}|{part}"] for part in ("value", "mean", "square")))
            for name, parameter in training.parameters.items()
        ]
        for parameter, *parts in loaded:
            if any(p.shape != parameter.shape for p in parts):
                raise ValueError("it has other shapes")
    except Exception as e:  # noqa: BLE001 - whatever is wrong with it, training starts afresh
        aside = path.with_suffix(".damaged")
        path.replace(aside)
        logger.warning("checkpoint unusable (%s): set aside as %s, starting again", e, aside.name)
        return fresh
    for like, value, mean, square in loaded:
        with torch.no_grad():
            like.copy_(value)
        optimizer.state[like] = {
            "step": torch.tensor(float(state.step)).to(like.device),
            "exp_avg": mean.to(like.device),
            "exp_avg_sq": square.to(like.device),
        }
    if training.load_state is not None:
        own = {k.removeprefix(f"{_OWN}|"): v for k, v in tensors.items() if k.startswith(_OWN)}
        training.load_state(own)
    logger.info("going on with %s at step %d of %d", phase, state.step + 1, steps)
    return state
