"""A short training of a merged adapter on probe rows, with each task's own adapter as teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lori_manager.adapters import lori
from lori_manager.config import Config
from lori_manager.distillation import taught_rows, teacher_words
from lori_manager.engine.layers import LoriLinear
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.models import BaseModel
from lori_manager.tasks.encoding import Encoded
from lori_manager.training import OnProgress, TrainResult, fit


def repair(
    base: BaseModel,
    merged: AdapterWeights,
    members: Sequence[AdapterWeights],
    rows: Sequence[Sequence[Encoded]],
    config: Config,
    *,
    steps: int,
    peak: float,
    labels: float = 0.5,
    on_progress: OnProgress | None = None,
) -> tuple[AdapterWeights, TrainResult]:
    """Train every B of a merge where its mask allows; every A stays as it is.

    Args:
        base: the model; left as it was.
        merged: what to begin with. Not modified.
        members: the teachers, one for each of `rows`.
        rows: for each member rows of its task, with completions.
        config: batch, schedule, clipping and seed count.
        steps, peak: of the training.
        labels: share of the completions' own tokens in what is learned; the rest is what
            the teachers say there.
    Raises:
        InvalidInput: the merge is routed.
    """
    merged.check_single()
    parts = [
        teacher_words(base, member.updates(), own, config.score_batch, labels=labels)
        for member, own in zip(members, rows, strict=True)
    ]
    taught, table = taught_rows(parts, base.device)
    layers = _layers(base, merged)
    with lori.in_training(base, layers) as parameters:
        result = fit(
            base,
            parameters,
            taught,
            config,
            steps=steps,
            peak=peak,
            phase="repairing",
            on_progress=on_progress,
            soft=table,
        )
    return _split(merged, lori.trained_B(layers)), result


def _parts(merged: AdapterWeights, name: str) -> list[tuple[Block, float]]:
    """The blocks that have a module, with the factor of their B in a common scaling."""
    scaling = merged.blocks[0].scaling
    return [(b, b.scaling / scaling) for b in merged.blocks if name in b.B]


def _layers(base: BaseModel, merged: AdapterWeights) -> dict[str, LoriLinear]:
    """One layer a module, all blocks' factors side by side in it."""
    out = {}
    for name in merged.modules:
        parts = _parts(merged, name)
        mask = None
        if any(block.mask is not None for block, _ in parts):
            mask = torch.cat([
                torch.ones(block.B[name].shape, dtype=torch.bool)
                if block.mask is None
                else block.mask[name]
                for block, _ in parts
            ], dim=1)  # fmt: skip
        A = torch.cat([block.A[name].float() for block, _ in parts])
        start = torch.cat([block.B[name].float() * share for block, share in parts], dim=1)
        out[name] = LoriLinear(
            base.model.get_submodule(name), A, merged.blocks[0].scaling, mask, start
        )
    return out


def _split(merged: AdapterWeights, B: dict[str, Tensor]) -> AdapterWeights:
    """The blocks with their own columns of the trained B's, in their own dtype and scaling."""
    found: list[dict[str, Tensor]] = [{} for _ in merged.blocks]
    for name, whole in B.items():
        column = 0
        for block, mine in zip(merged.blocks, found, strict=True):
            if name not in block.B:
                continue
            old = block.B[name]
            share = block.scaling / merged.blocks[0].scaling
            mine[name] = (whole[:, column : column + old.shape[1]] / share).to(old.dtype)
            column += old.shape[1]
    return AdapterWeights(
        tuple(
            Block(mine, block.scaling, block.projection, block.tensors, block.mask)
            for block, mine in zip(merged.blocks, found, strict=True)
        )
    )
