"""LoRA: h = W x + (alpha / r) B A x with both factors trained (arXiv:2106.09685).

PEFT makes the factors; the products are `LoraLinear`'s, which copies and scales no output of
the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig

from lori_manager.adapters.kind import Training
from lori_manager.adapters.peft_layers import NAME, injected
from lori_manager.config import Config
from lori_manager.engine.layers import LoraLinear, attached
from lori_manager.engine.update import LowRankUpdate
from lori_manager.engine.weights import AdapterWeights, Block, KindWeights, Stored
from lori_manager.errors import InvalidInput
from lori_manager.models import BaseModel, check_rank, resolve_targets


@contextmanager
def training(
    base: BaseModel, config: Config, *, steps: int, start: Stored | None = None
) -> Iterator[Training]:
    """See `KindModule`. Begins with A Kaiming-uniform and B zero; goes on from any B A update."""
    with low_rank_training(base, config, start) as found:
        yield found


@contextmanager
def low_rank_training(
    base: BaseModel, config: Config, start: Stored | None, **peft: Any
) -> Iterator[Training]:
    """Train both factors, begun as PEFT begins them.

    Args:
        base, config, start: see `KindModule`. With a start its modules and rank count.
        peft: further settings of `LoraConfig`.
    """
    begun = _begun(start)
    if begun:
        names, rank = list(begun), max(update.rank for update in begun.values())
    else:
        names, rank = resolve_targets(base.linear_shapes, config.targets), config.rank
    check_rank({name: base.linear_shapes[name] for name in names}, rank)
    peft_config = LoraConfig(r=rank, lora_alpha=config.alpha, lora_dropout=0.0, **peft)  # type: ignore[arg-type]
    root = bool(peft.get("use_rslora"))
    scaling = config.alpha / (math.sqrt(rank) if root else rank)
    own = {name: base.model.get_submodule(name) for name in names}
    with injected(base, peft_config, names, config.seed) as layers:
        for name, update in begun.items():
            put_update(layers[name], update, scaling)

        def weights(dtype: torch.dtype) -> AdapterWeights:
            A = {n: layer.lora_A[NAME].weight for n, layer in layers.items()}
            B = {n: layer.lora_B[NAME].weight for n, layer in layers.items()}
            return AdapterWeights((Block(kept(B, dtype), scaling, tensors=kept(A, dtype)),))

        parameters = {
            f"{name}.{part}": getattr(layer, f"lora_{part}")[NAME].weight
            for name, layer in layers.items()
            for part in "AB"
        }
        trained = {
            name: LoraLinear(own[name], parameters[f"{name}.A"], parameters[f"{name}.B"], scaling)
            for name in layers
        }
        with attached(base.model, trained):
            yield Training(parameters, weights, graphs=base.base_bits == 16)


def _begun(start: Stored | None) -> Mapping[str, LowRankUpdate]:
    if start is None:
        return {}
    if isinstance(start, KindWeights):
        raise InvalidInput(
            f"LoRA goes on from a B A update, and an adapter of kind `{start.kind}` is none: "
            "leave --from out"
        )
    return start.updates()


def put_update(layer: Any, update: LowRankUpdate, scaling: float) -> None:
    """The update as the layer's factors; what its rank leaves over of the layer's stays."""
    with torch.no_grad():
        layer.lora_A[NAME].weight[: update.rank].copy_(update.A)
        layer.lora_B[NAME].weight[:, : update.rank].copy_(update.B * (update.scaling / scaling))


def kept(values: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The values in that dtype, on the CPU."""
    return {name: v.detach().to("cpu", dtype).contiguous() for name, v in values.items()}
