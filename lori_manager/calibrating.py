"""Which entries of B matter to some rows: where a brief dense training moves it most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lori_manager.adapters import lori
from lori_manager.config import Config
from lori_manager.engine import mask as masks
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.models import BaseModel
from lori_manager.tasks.encoding import Encoded
from lori_manager.training import OnProgress, TrainResult, fit


def grown_mask(
    base: BaseModel,
    block: Block,
    rows: Sequence[Encoded],
    config: Config,
    *,
    exclude: Mapping[str, Tensor] | None = None,
    beside: AdapterWeights | None = None,
    phase: str = "calibrating",
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[dict[str, Tensor], TrainResult]:
    """Train B dense from zero for `calibration_steps`, keep its largest entries.

    Args:
        block: whose A counts; its B does not.
        exclude: entries that must not be kept.
        beside: what acts in the model and stays fixed.
        phase, checkpoint, on_progress: see `fit`.
    Returns:
        Module name -> bool (out_features, rank), and what the training left behind.
    Source: LoRI, arXiv:2504.07448.
    """
    zero = {name: torch.zeros_like(b, dtype=torch.float32) for name, b in block.B.items()}
    empty = Block(zero, block.scaling, block.projection, block.tensors)
    layers = lori.trainable_layers(base.model, empty, None, beside)
    with lori.in_training(base, layers, beside) as parameters:
        result = fit(
            base,
            parameters,
            rows,
            config,
            steps=config.calibration_steps,
            peak=config.dense_learning_rate,
            phase=phase,
            checkpoint=checkpoint,
            on_progress=on_progress,
        )
    B = lori.trained_B(layers)
    return masks.calibrate_mask(B, config.sparsity, config.scope, exclude), result
