"""What merging asks of a running model: probe rows, and the inputs that adapters see on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lori_manager.engine.layers import attached, low_rank_layers
from lori_manager.engine.update import LowRankUpdate
from lori_manager.engine.weights import AdapterWeights
from lori_manager.errors import InvalidInput
from lori_manager.forward import real_tokens
from lori_manager.generation import end_ids, generate, within_context
from lori_manager.labelling import runner
from lori_manager.merging.methods import MergeOptions
from lori_manager.models import BaseModel
from lori_manager.stages import Stage, run_watched
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


def check_counts(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    rows: Sequence[Sequence[Encoded]],
) -> None:
    """ValueError without members, or without one weight and one set of rows for each."""
    if not members or not len(members) == len(weights) == len(rows):
        raise ValueError(
            f"got {len(members)} members and {len(weights)} weights, and rows for {len(rows)}"
        )


def taking_part(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    rows: Sequence[Sequence[Encoded]],
) -> tuple[list[AdapterWeights], list[float], list[Sequence[Encoded]]]:
    """Members, weights and rows of those whose weight is not 0.

    Raises:
        ValueError: no members, or not one weight and one set of rows per member.
        InvalidInput: all weights are 0.
    """
    check_counts(members, weights, rows)
    chosen = [i for i, weight in enumerate(weights) if weight]
    if not chosen:
        raise InvalidInput("`weights` must not all be 0: give one that is not")
    return (
        [members[i] for i in chosen],
        [float(weights[i]) for i in chosen],
        [rows[i] for i in chosen],
    )


def regression_part(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    rows: Sequence[Sequence[Encoded]],
) -> tuple[list[AdapterWeights], list[float], list[Sequence[Encoded]]]:
    """`taking_part` for least squares, whose weights must not be negative (InvalidInput)."""
    chosen = taking_part(members, weights, rows)
    if min(chosen[1]) < 0:
        raise InvalidInput(
            "`weights` of a regression must not be negative: `--method concat` takes such"
        )
    return chosen


def answered(
    base: BaseModel,
    updates: Mapping[str, LowRankUpdate],
    rows: Sequence[Encoded],
    batch: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Encoded]:
    """The rows' prompts with what an adapter writes after them, end of text last.

    It writes at most as many tokens as the longest of the rows' own completions has, which
    are not looked at otherwise. A prompt that leaves no room for them in the model's context
    loses its beginning.
    """
    longest = max(1, *(len(row.ids) - row.prompt_length for row in rows))
    given = [row.ids[: row.prompt_length] for row in rows]
    prompts, longest = within_context(base, given, longest)
    with attached(base.model, low_rank_layers(base.model, updates)):
        said = generate(base, prompts, longest, batch, on_progress)
    # What completions were trained to end with; a model may name other ends beside it.
    own = getattr(base.tokenizer, "eos_token_id", None)
    end = min(end_ids(base)) if own is None else int(own)
    return [
        Encoded([*map(int, prompt), *text, end][: base.context], len(prompt))
        for prompt, text in zip(prompts, said, strict=True)
    ]


def prompts_of(rows: Sequence[Encoded]) -> list[Encoded]:
    """The rows without their completions: nothing to learn from but the inputs."""
    return [Encoded(row.ids[: row.prompt_length], row.prompt_length) for row in rows]


def input_grams(
    base: BaseModel,
    updates: Mapping[str, LowRankUpdate],
    rows: Sequence[Any],
    batch: int,
    only: Sequence[Stage] | None = None,
) -> dict[str, Tensor]:
    """Second moments of the inputs of the modules that an adapter updates.

    Args:
        base: the model; the adapter is put in and taken out again.
        updates: module name -> update.
        rows: encoded, with labels where the base is an encoder; all tokens of each row count,
            padding never does.
        batch: rows a forward.
        only: the stages whose modules are looked at; None is all.
    Returns:
        Module name -> E[x x'] (in_features, in_features), float32 on the model's device.
        Modules that see the same input share one tensor.
    """
    layers = low_rank_layers(base.model, updates)
    watched, calls = layers, None
    if only is not None:
        names = [name for stage in only for name in stage.names]
        # Siblings that this adapter leaves alone are watched too, so that all calls are counted.
        watched = {name: layers.get(name, base.model.get_submodule(name)) for name in names}
        calls = sum(stage.calls for stage in only)
    sums: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    real: Tensor | None = None

    def see(name: str, x: Tensor, first: str) -> None:
        shared[name] = first
        if name != first:
            return
        flat = real_tokens(x, real).float()
        if name in sums:
            sums[name].addmm_(flat.t(), flat)
        else:
            sums[name] = flat.t() @ flat

    forward = runner(base)
    with attached(base.model, layers), torch.no_grad(), forward.ready():
        for numbers in length_batches([r.length for r in rows], batch):
            chosen = [rows[i] for i in numbers]
            given = forward.batch(chosen)
            real = forward.real(given, chosen)
            run_watched(forward, forward.place(given), watched, see, calls)
    tokens = sum(r.length for r in rows)
    found = {name: gram.div_(tokens) for name, gram in sums.items()}
    return {name: found[first] for name, first in shared.items() if name in layers}
