"""What merging asks of a running model: the inputs that adapters see on probe rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lori_manager.engine.layers import attached, low_rank_layers
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
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Second moments of the inputs of the modules that an adapter updates.

    Args:
        base: the model; the adapter is put in and taken out again.
        updates: module name -> update.
        rows: token ids of each row count, all of them; padding never does.
        batch: rows a forward.
        on_batch: called with (rows done, rows in all).
    Returns:
        Module name -> E[x x'] (in_features, in_features), float32 on the model's device.
        Modules that see the same input share one tensor.
    """
    layers = low_rank_layers(base.model, updates)
    sums: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    real: Tensor | None = None
    seen: list[tuple[Tensor, str]] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            for tensor, first in seen:
                if tensor is x:
                    shared[name] = first
                    return
            seen.append((x, name))
            flat = x.reshape(-1, x.shape[-1]).float()
            if real is not None:
                flat = flat[real]
            if name in sums:
                sums[name].addmm_(flat.t(), flat)
            else:
                sums[name] = flat.t() @ flat

        return hook

    tokens = done = 0
    forward = Forward(base)
    hooks: list[Any] = []
    with attached(base.model, layers), torch.no_grad(), forward.ready():
        try:
            hooks = [m.register_forward_pre_hook(watch(n)) for n, m in layers.items()]
            for numbers in length_batches([len(r.ids) for r in rows], batch):
                chosen = [rows[i] for i in numbers]
                given = forward.batch(chosen)
                if given.bounds is None:
                    lengths = torch.tensor([len(r.ids) for r in chosen])
                    places = torch.arange(given.ids.shape[1])
                    real = (places < lengths[:, None]).flatten().to(base.device)
                seen.clear()
                forward.run(place(given, base.device))
                tokens += sum(len(r.ids) for r in chosen)
                done += len(chosen)
                if on_batch:
                    on_batch(done, len(rows))
        finally:
            for one in hooks:
                one.remove()
    found = {name: gram.div_(tokens) for name, gram in sums.items()}
    return found | {name: found[first] for name, first in shared.items()}
