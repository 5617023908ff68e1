"""What merging asks of a running model: probe rows, and the inputs that adapters see on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lori_manager.engine.layers import attached, low_rank_layers
from lori_manager.engine.siblings import inputs_watched
from lori_manager.engine.update import LowRankUpdate
from lori_manager.engine.weights import AdapterWeights
from lori_manager.forward import Forward, place
from lori_manager.generation import end_ids, generate
from lori_manager.merging.methods import MergeOptions
from lori_manager.models import BaseModel
from lori_manager.tasks.batches import length_batches
from lori_manager.tasks.encoding import Encoded


class ModelMethod(Protocol):
    """Members, their weights and rows of their tasks -> one adapter, with the model at hand.

    What the rows are is the method's fact `needs`: "answers" are prompts with what the
    member itself writes after them, "labels" rows with their own completions.
    """

    def __call__(
        self,
        base: BaseModel,
        members: Sequence[AdapterWeights],
        weights: Sequence[float],
        rows: Sequence[Sequence[Encoded]],
        options: MergeOptions,
        *,
        general: Sequence[Encoded] = (),
        on_progress: Callable[[int, int], None] | None = None,
    ) -> AdapterWeights:
        """Merge; the model is left as it was, the members are not modified."""


def answered(
    base: BaseModel,
    updates: Mapping[str, LowRankUpdate],
    rows: Sequence[Encoded],
    batch: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Encoded]:
    """The rows' prompts with what an adapter writes after them, end of text last.

    It writes at most as many tokens as the longest of the rows' own completions has, which
    are not looked at otherwise.
    """
    longest = max(len(row.ids) - row.prompt_length for row in rows)
    prompts = [row.ids[: row.prompt_length] for row in rows]
    with attached(base.model, low_rank_layers(base.model, updates)):
        said = generate(base, prompts, longest, batch, on_progress)
    end = min(end_ids(base))
    return [
        Encoded([*map(int, prompt), *text, end], len(prompt))
        for prompt, text in zip(prompts, said, strict=True)
    ]


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
