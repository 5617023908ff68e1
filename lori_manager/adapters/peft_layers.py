"""PEFT's layers in the place of a model's own, and out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from lori_manager.engine.fp8 import Fp8Linear
from lori_manager.engine.layers import attached, linear_weight, product_dtype
from lori_manager.errors import InvalidInput
from lori_manager.models import BaseModel

NAME = "default"


class InPrecision(nn.Module):
    """A layer whose float32 parameters multiply in the dtype of its base."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in x's dtype."""
        with torch.autocast(x.device.type, dtype=self.dtype, cache_enabled=False):
            y: Tensor = self.layer(x)
        return y.to(x.dtype)


def unpacked_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer, packed in 4 bits or not, (out_features, in_features) float32.

    Raises:
        InvalidInput: it is in e4m3.
    """
    check_wide({"": layer})
    if hasattr(layer, "compute_dtype"):
        return dequantize_module_weight(layer).detach().float()
    return linear_weight(layer).detach().float()


def check_wide(layers: Mapping[str, nn.Module]) -> None:
    """Refuse a base in e4m3, which PEFT's layers do not take.

    Raises:
        InvalidInput: there is such a layer.
    """
    if any(isinstance(layer, Fp8Linear) for layer in layers.values()):
        raise InvalidInput("only kind `lori` trains over a base in fp8: give precision bf16")


@contextmanager
def injected(
    base: BaseModel, peft_config: PeftConfig, names: Sequence[str], seed: int
) -> Iterator[dict[str, Any]]:
    """Put PEFT's layers into the model, with float32 parameters.

    Args:
        base: frozen; the very same modules stand in it again after.
        peft_config: its `target_modules` are set to `names`.
        names: full names of the linear layers that get one each.
        seed: of what PEFT draws.
    Yields:
        Module name -> PEFT's layer.
    Raises:
        InvalidInput: the base is in e4m3.
    """
    model = base.model
    own = {name: model.get_submodule(name) for name in names}
    check_wide(own)
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    peft_config.target_modules = set(names)  # type: ignore[attr-defined]
    layers: dict[str, Any] = {}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(peft_config, model, adapter_name=NAME)
        layers = {name: model.get_submodule(name) for name in names}
    finally:
        for name, module in own.items():
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._modules[child] = module
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen[name])
        for leftover in ("peft_config", "_hf_peft_config_loaded"):
            model.__dict__.pop(leftover, None)
    for layer in layers.values():
        for name, parameter in layer.named_parameters():
            if ".base_layer." not in f".{name}" and parameter.requires_grad:
                parameter.data = parameter.data.float()
    placed = {}
    for name, layer in layers.items():
        dtype = product_dtype(own[name])
        placed[name] = layer if dtype == torch.float32 else InPrecision(layer, dtype)
    with attached(model, placed):
        yield layers
