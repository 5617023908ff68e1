"""The noise-prediction loss: to train on, and as the outcome of an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lori_manager.adapters.kind import Training
from lori_manager.config import Config
from lori_manager.diffusion.capture import Captured
from lori_manager.diffusion.noise import normals, spread_timesteps, timesteps
from lori_manager.diffusion.pipeline import DiffusionBase
from lori_manager.errors import InvalidInput
from lori_manager.ranks import ranks
from lori_manager.tasks.images import Picture
from lori_manager.training import Steps, StepsOf


def squared_errors(
    base: DiffusionBase, latents: Tensor, texts: Tensor, noise: Tensor, at: Tensor
) -> Tensor:
    """(n,) float32: mean squared error of what the UNet predicts, by image.

    The UNet is to find the noise, or the velocity where the scheduler's `prediction_type` is
    `v_prediction` (arXiv:2202.00512), in latents noised to timestep `at`.
    Shapes: latents and noise (n, channels, h, w) float32, texts (n, tokens, width), at (n,).
    """
    scheduler = base.scheduler
    wanted = noise
    if scheduler.config.prediction_type == "v_prediction":
        wanted = scheduler.get_velocity(latents, noise, at)
    predicted = base.predict(scheduler.add_noise(latents, noise, at), at, texts)
    return (predicted.float() - wanted).square().flatten(1).mean(1)


def noise_steps(base: DiffusionBase, config: Config, label: str) -> StepsOf:
    """Steps of `training.fit` on pictures: each with noise and timesteps of its own.

    Args:
        base: the pipeline with its trainable layers in place.
        config: its seed counts here.
        label: of the noise, with the seed and the number of the step: a run that goes on draws
            what it would have drawn.
    Raises:
        InvalidInput: gradient checkpointing, which layers that compute together across the
            UNet do not stand.
    """
    if config.checkpointing == "on":
        raise InvalidInput("`checkpointing` is for language models: use a smaller --micro-batch")

    @contextmanager
    def steps(
        training: Training, batches: Sequence[Sequence[list[Picture]]], first: int
    ) -> Iterator[Steps]:
        every = [picture for step in batches for part in step for picture in part]
        if every:
            base.latents(list({p.digest: p for p in every}.values()))
            base.texts(list({p.caption for p in every}))
        base.release()
        told = f"{config.seed}|{label}"
        yield _NoiseSteps(base, training, first, told, config.graphs == "auto")

    return steps


class _NoiseSteps:
    def __init__(
        self, base: DiffusionBase, training: Training, step: int, label: str, graphs: bool
    ) -> None:
        self._base, self._step, self._label = base, step, label
        self._trained, self._penalty = list(training.parameters.values()), training.penalty
        self._run: Callable[..., Tensor] = self._summed
        if graphs and training.graphs and ranks().world == 1 and base.device.type == "cuda":
            self._run = Captured(self._summed)
        for p in self._trained:
            p.grad = torch.zeros_like(p)

    def of(self, parts: Sequence[Sequence[Picture]]) -> Tensor:
        """Mean squared error over all images of the step, on the device."""
        base = self._base
        pictures = [picture for part in parts for picture in part]
        latents = base.latents(pictures)
        label = f"{self._label}|step {self._step}"
        self._step += 1
        total = base.scheduler.config.num_train_timesteps
        at = timesteps(f"{label}|timesteps", len(pictures), total)
        noise = normals(f"{label}|noise", latents.shape)
        texts = base.texts([p.caption for p in pictures])
        placed = [_placed(t, base.device) for t in (latents, texts, noise, at)]
        losses = []
        for p in self._trained:
            p.grad.zero_()  # type: ignore[union-attr]
        begin = counted = 0
        for part in parts:
            mine = ranks().own(range(begin, begin + len(part)))
            begin += len(part)
            if mine:
                own = slice(mine[0], begin, ranks().world)
                losses.append(self._run(*(t[own] for t in placed)).clone())
                counted += len(mine)
        gradients = [p.grad for p in self._trained if p.grad is not None]
        found = torch.stack(losses).sum() if losses else None
        loss, every = ranks().summed(gradients, found, counted)
        for gradient in gradients:
            gradient.div_(every)
        if self._penalty is not None:
            self._add_gradient(self._penalty())
        return loss / every

    def _summed(self, *inputs: Tensor) -> Tensor:
        """Add the gradient of the images' summed loss to the parameters' own."""
        loss = squared_errors(self._base, *inputs).sum()
        self._add_gradient(loss)
        return loss.detach()

    def _add_gradient(self, loss: Tensor) -> None:
        found = torch.autograd.grad(loss, self._trained, allow_unused=True)
        for p, gradient in zip(self._trained, found, strict=True):
            if gradient is not None:
                p.grad.add_(gradient)  # type: ignore[union-attr]


def held_out_losses(
    base: DiffusionBase,
    pictures: Sequence[Picture],
    draws: int,
    batch: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """(n,) float32: each picture's mean squared error over its own frozen noise.

    Noise and timesteps follow from the row's key alone, one timestep out of each of `draws`
    equal parts of the scheduler's: every adapter is asked the very same.

    Args:
        draws: of noise, for each picture.
        batch: noisy images a forward.
        on_batch: called with (pictures done, pictures in all).
    """
    total = base.scheduler.config.num_train_timesteps
    every = base.latents(pictures), base.texts([p.caption for p in pictures])
    base.release()
    at_once = max(1, batch // draws)
    out = []
    for begin in range(0, len(pictures), at_once):
        part = pictures[begin : begin + at_once]
        latents, texts = (t[begin : begin + at_once].repeat_interleave(draws, 0) for t in every)
        labels = [f"held out|{picture.key.hex()}" for picture in part]
        noise = torch.cat([normals(f"{x}|noise", (draws, *latents.shape[1:])) for x in labels])
        at = torch.cat([spread_timesteps(f"{x}|timesteps", draws, total) for x in labels])
        placed = [_placed(t, base.device) for t in (latents, texts, noise, at)]
        with torch.inference_mode():
            errors = squared_errors(base, *placed)
        out.append(errors.view(len(part), draws).mean(1).cpu().numpy())
        if on_batch:
            on_batch(begin + len(part), len(pictures))
    return np.concatenate(out).astype(np.float32)


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
