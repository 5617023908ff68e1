"""What merging asks of a running model: the inputs that adapters see on probe rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lori_manager.engine.layers import attached, low_rank_layers
from lori_manager.engine.siblings import inputs_watched
from lori_manager.engine.update import LowRankUpdate
from lori_manager.forward import Forward, place
from lori_manager.models import BaseModel
from lori_manager.tasks.batches import length_batches
from lori_manager.tasks.encoding import Encoded


def prompts_of(rows: Sequence[Encoded]) -> list[Encoded]:
    """The rows without their completions: nothing to learn from but the inputs."""
    return [Encoded(row.ids[: row.prompt_length], row.prompt_length) for row in rows]


def input_grams(
    base: BaseModel,
    updates: Mapping[str, LowRankUpdate],
    rows: Sequence[Encoded],
    batch: int,
) -> dict[str, Tensor]:
    """Second moments of the inputs of the modules that an adapter updates.

    Args:
        base: the model; the adapter is put in and taken out again.
        updates: module name -> update.
        rows: token ids of each row count, all of them; padding never does.
        batch: rows a forward.
    Returns:
        Module name -> E[x x'] (in_features, in_features), float32 on the model's device.
        Modules that see the same input share one tensor.
    """
    layers = low_rank_layers(base.model, updates)
    sums: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    real: Tensor | None = None

    def see(name: str, x: Tensor, first: str) -> None:
        shared[name] = first
        if name != first:
            return
        flat = x.reshape(-1, x.shape[-1]).float()
        if real is not None:
            flat = flat[real]
        if name in sums:
            sums[name].addmm_(flat.t(), flat)
        else:
            sums[name] = flat.t() @ flat

    forward = Forward(base)
    with attached(base.model, layers), torch.no_grad(), forward.ready():
        for numbers in length_batches([len(r.ids) for r in rows], batch):
            chosen = [rows[i] for i in numbers]
            given = forward.batch(chosen)
            real = forward.real(given, chosen)
            with inputs_watched(layers, see):
                forward.run(place(given, base.device))
    tokens = sum(len(r.ids) for r in rows)
    found = {name: gram.div_(tokens) for name, gram in sums.items()}
    return {name: found[first] for name, first in shared.items()}
