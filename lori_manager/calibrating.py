"""Which entries of B matter to some rows: where a dense training moves it most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lori_manager.adapters import lori
from lori_manager.adapters.heads import HeadTraining, with_head
from lori_manager.adapters.kind import Training
from lori_manager.config import Config
from lori_manager.engine import mask as masks
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.models import BaseModel
from lori_manager.tasks.batches import permutation
from lori_manager.training import OnProgress, StepsOf, TrainResult, fit, no_weights

T = TypeVar("T")


def calibration_rows(rows: Sequence[T], config: Config) -> list[T]:
    """As many of the training rows as `calibration_rows` says, chosen by the seed."""
    if config.calibration_rows == 0:
        return list(rows)
    chosen = permutation(len(rows), config.seed, "calibration")[: config.calibration_rows]
    return [rows[i] for i in sorted(chosen)]


def grown_mask(
    base: BaseModel,
    block: Block,
    rows: Sequence[Any],
    config: Config,
    *,
    steps: int,
    exclude: Mapping[str, Tensor] | None = None,
    beside: AdapterWeights | None = None,
    head: HeadTraining | None = None,
    phase: str = "calibrating",
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
    steps_of: StepsOf | None = None,
) -> tuple[dict[str, Tensor], TrainResult]:
    """Train B dense from zero, keep its largest entries.

    Args:
        block: whose A counts; its B does not.
        rows: that it trains on.
        config: of the training; its `calibration_steps` are the caller's to look at.
        steps: of the optimizer.
        exclude: entries that must not be kept.
        beside: what acts in the model and stays fixed.
        head: an encoder's, in the model; it trains too.
        phase, checkpoint, on_progress, steps_of: see `fit`.
    Returns:
        Module name -> bool (out_features, rank), and what the training left behind.
    Source: LoRI, arXiv:2504.07448.
    """
    zero = {name: torch.zeros_like(b, dtype=torch.float32) for name, b in block.B.items()}
    empty = Block(zero, block.scaling, block.projection, block.tensors)
    layers = lori.trainable_layers(base.model, empty, None, beside)
    with lori.in_training(base, layers, beside) as parameters:
        training = Training(parameters, no_weights)
        training = with_head(training, head, config.head_learning_rate)
        result = fit(
            base,
            training.parameters,
            rows,
            config,
            steps=steps,
            peak=config.dense_learning_rate,
            phase=phase,
            checkpoint=checkpoint,
            on_progress=on_progress,
            training=training,
            steps_of=steps_of,
        )
    B = lori.trained_B(layers)
    return masks.calibrate_mask(B, config.sparsity, config.scope, exclude), result
