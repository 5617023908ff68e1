"""(IA)3: keys, values and the feed-forward's inner activations scaled (arXiv:2205.05638), by PEFT.

The outputs of some linear layers are multiplied by a trained vector, bias included, and the
inputs of others. Stored are these vectors less one: what bf16 rounds is the change alone.
An adapter of this kind scales W itself and so is no sum with another's update.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS
from torch import Tensor, nn

from lori_manager import models
from lori_manager.adapters.full_export import write_full as write_model
from lori_manager.adapters.kind import Training, own_start
from lori_manager.adapters.lora import kept
from lori_manager.adapters.peft_export import finite, model_card, save_peft, shared_config
from lori_manager.adapters.peft_format import KEY_PREFIX, last_part, named_by
from lori_manager.adapters.peft_layers import NAME, injected
from lori_manager.config import Config
from lori_manager.engine.layers import attached, product_dtype
from lori_manager.engine.update import Rescaled
from lori_manager.engine.weights import KindWeights, Stored
from lori_manager.errors import InvalidInput
from lori_manager.models import BaseModel, resolve_targets

KIND = "ia3"
OUTPUTS, INPUTS = "outputs", "inputs"
# As in the paper, wherever a model's modules go by these names.
_USUAL = (("k_proj", "v_proj"), ("down_proj",))
# Of encoders: keys, values and what comes last in the feed-forward.
_ENCODERS = (
    ("key", "value", "output.dense"),
    ("key_proj", "value_proj", "output.dense"),
    ("key", "value", "ffn_output"),
    ("k", "v", "output.dense"),
    ("k_lin", "v_lin", "lin2"),
    ("k_proj", "v_proj", "fc2"),
    ("key", "value", "fc2"),  # DINOv2 in older versions of transformers
)
_ATTENTION = frozenset({"attention", "attn"})


@contextmanager
def training(
    base: BaseModel, config: Config, *, steps: int, start: Stored | None = None
) -> Iterator[Training]:
    """See `KindModule`. Goes on from an adapter of this kind; else from ones.

    Options: `outputs` and `inputs`, names of modules with commas between, whose outputs or
    inputs are scaled; both empty: keys and values, and what comes last in the feed-forward.
    """
    begun = own_start(KIND, start)
    scaled = _chosen(base, config) if begun is None else _sides(begun)
    inputs = {name for name, side in scaled.items() if side == INPUTS}
    peft_config = IA3Config(feedforward_modules=list(inputs))
    with injected(base, peft_config, sorted(scaled), config.seed) as layers:
        vectors = {name: layer.ia3_l[NAME] for name, layer in layers.items()}
        if begun is not None:
            for name, side in scaled.items():
                vectors[name].data.add_(begun.tensors[f"{name}.{side}"].view_as(vectors[name]))

        def weights(dtype: torch.dtype) -> KindWeights:
            tensors = {f"{n}.{scaled[n]}": v.detach().flatten() - 1 for n, v in vectors.items()}
            return KindWeights(KIND, {}, kept(tensors, dtype))

        yield Training(vectors, weights, graphs=base.base_bits == 16)


def _chosen(base: BaseModel, config: Config) -> dict[str, str]:
    """Module name -> `OUTPUTS` or `INPUTS`.

    Raises:
        InvalidInput: names that mean nothing, or that mean a module twice; an architecture
            whose keys and values are not known, and no options.
    """
    shapes = base.linear_shapes
    outputs, inputs = (_names(config.kind_options[side]) for side in (OUTPUTS, INPUTS))
    if not outputs and not inputs:
        if base.architecture.encoder:
            return _of_encoder(base)
        outputs, inputs = _usual(base)
    found: dict[str, str] = {}
    for side, names in ((OUTPUTS, outputs), (INPUTS, inputs)):
        for name in resolve_targets(shapes, names):
            if name in found:
                raise InvalidInput(f"module {name!r} is in both options `outputs` and `inputs`: "
                                   "name it in one")  # fmt: skip
            found[name] = side
    return found


def _of_encoder(base: BaseModel) -> dict[str, str]:
    """Module name -> side, of keys, values and the feed-forward's last layers."""
    # An attention block has an `output.dense` of its own: what leaves the block.
    feed = [name for name in base.linear_shapes if _ATTENTION.isdisjoint(name.split("."))]
    for key, value, last in _ENCODERS:
        kept = [name for name in base.linear_shapes if named_by((key, value), name)]
        closing = [name for name in feed if named_by((last,), name)]
        if closing and {last_part(name) for name in kept} == {key, value}:
            return dict.fromkeys(kept, OUTPUTS) | dict.fromkeys(closing, INPUTS)
    raise _unknown(base)


def _usual(base: BaseModel) -> tuple[list[str], list[str]]:
    there = {last_part(name) for name in base.linear_shapes}
    if there.issuperset(_USUAL[0] + _USUAL[1]):
        return list(_USUAL[0]), list(_USUAL[1])
    kind = base.model.config.get_text_config().model_type
    if kind not in TARGETS:
        raise _unknown(base)
    inputs = list(FEEDFORWARD.get(kind, []))
    return [name for name in TARGETS[kind] if name not in inputs], inputs


def _unknown(base: BaseModel) -> InvalidInput:
    kind = base.model.config.get_text_config().model_type
    return InvalidInput(
        f"which modules of {kind} hold keys, values and the feed-forward alone is not known: name "
        "them, `-o outputs=k,v -o inputs=down`"
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _sides(weights: KindWeights) -> dict[str, str]:
    """Module name -> the side on which it is scaled."""
    parts = (key.rpartition(".") for key in sorted(weights.tensors))
    return {name: side for name, _, side in parts}


class ScaledLinear(nn.Module):
    """h = (1 + c) * (W x + b) or W ((1 + c) * x) + b with a fixed vector c.

    Shapes: x (..., in_features); c (out_features,) or (in_features,).
    """

    change: Tensor

    def __init__(self, base: nn.Module, change: Tensor, side: str) -> None:
        super().__init__()
        self.base = base
        self.side = side
        device, dtype = next(base.parameters()).device, product_dtype(base)
        self.register_buffer("change", change.to(device, dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.side == INPUTS:
            inputs: Tensor = self.base(torch.addcmul(x, x, self.change.to(x.dtype)))
            return inputs
        y: Tensor = self.base(x)
        return torch.addcmul(y, y, self.change.to(y.dtype))


@contextmanager
def applied(base: BaseModel, weights: KindWeights) -> Iterator[None]:
    """See `KindModule`."""
    layers = {
        name: ScaledLinear(base.model.get_submodule(name), weights.tensors[f"{name}.{side}"], side)
        for name, side in _sides(weights).items()
    }
    with attached(base.model, layers):
        yield


def write(weights: KindWeights, directory: Path, told: Mapping[str, Any]) -> None:
    """See `KindModule`: a PEFT directory of type IA3."""
    sides = _sides(weights)
    config = shared_config("IA3", told["base_name"], told["revision"])
    config |= {
        "fan_in_fan_out": any(name in sides for name in told["transposed"]),
        "init_ia3_weights": True,
    } | _target_fields(sides, told["all_modules"])
    tensors = {}
    for name, side in sides.items():
        vector = 1 + weights.tensors[f"{name}.{side}"].double()
        shaped = vector[None] if side == INPUTS else vector[:, None]
        what = f"ia3_l of module {name!r}"
        tensors[f"{KEY_PREFIX}{name}.ia3_l"] = finite(shaped, torch.float32, what)
    what = f"(IA)3 on {len(sides)} modules"
    card = model_card(told["label"], told["base_name"], told["revision"], what, tag=KIND)
    save_peft(directory, config, tensors, card, fingerprint=told["fingerprint"])


def _target_fields(sides: Mapping[str, str], all_modules: Collection[str]) -> dict[str, list[str]]:
    """`target_modules` and `feedforward_modules`: last parts where these mean the same."""
    inputs = {name for name, side in sides.items() if side == INPUTS}
    short, fed = {last_part(name) for name in sides}, {last_part(name) for name in inputs}
    meant = {name for name in all_modules if named_by(short, name)}
    # PEFT takes a module for the feed-forward's by the ending of its name, dots or not.
    if meant == set(sides) and {n for n in sides if n.endswith(tuple(fed))} == inputs:
        return {"target_modules": sorted(short), "feedforward_modules": sorted(fed)}
    return {"target_modules": sorted(sides), "feedforward_modules": sorted(inputs)}


def write_full(weights: KindWeights, folder: Path, directory: Path, **whole: Any) -> None:
    """See `KindModule`: the base with its rows, biases and columns scaled."""
    shapes = models.load_skeleton(folder).linear_shapes
    changes = {}
    for name, side in _sides(weights).items():
        vector = 1 + weights.tensors[f"{name}.{side}"].float()
        given: dict[str, Any] = {"rows": vector, "bias": True}
        changes[name] = Rescaled(shapes[name], **given if side == OUTPUTS else {"columns": vector})
    write_model(folder, changes, directory, **whole)
