"""DoRA: length and direction of W's rows trained apart (arXiv:2402.09353), by PEFT.

h = diag(m / ||W + s B A||) (W + s B A) x, with a norm for each row of W, that is for each
output; the norm is held constant in the gradient (section 4.3).

Stored are A, B and for each row the gain m / ||W + s B A|| - 1: with it the adapter acts and is
merged into W without a norm of anything, and what bf16 rounds is the change and not W's length.
That also is why it cannot be merged with other adapters: the gain multiplies W itself, and so
whatever another adapter adds to W.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch.nn import functional as F

from lori_manager.adapters.base_weights import row_norms
from lori_manager.adapters.full_export import write_full as write_model
from lori_manager.adapters.kind import Training, own_start
from lori_manager.adapters.lora import kept, put_update
from lori_manager.adapters.peft_export import write_peft
from lori_manager.adapters.peft_layers import NAME, injected, unpacked_weight
from lori_manager.config import Config
from lori_manager.engine.layers import attached, product_dtype
from lori_manager.engine.update import LowRankUpdate, Rescaled
from lori_manager.engine.weights import AdapterWeights, KindWeights, Stored
from lori_manager.errors import ImportRefused
from lori_manager.models import BaseModel, check_rank, resolve_targets

KIND = "dora"


class _Magnitude(DoraLinearLayer):
    """PEFT's, with a norm in float32 over any base, and B A as one product."""

    def get_weight_norm(
        self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None
    ) -> Tensor:
        """(out_features,) float32."""
        weight = weight.t() if self.fan_in_fan_out else weight
        length: Tensor = torch.linalg.norm((weight + scaling * lora_weight).float(), dim=1)
        return length

    def get_lora_weight(self, lora_A: Any, lora_B: Any, adapter_name: str | None = None) -> Tensor:
        """B A, which counts in the norm alone."""
        product: Tensor = lora_B.weight.detach() @ lora_A.weight.detach()
        return product


@contextmanager
def training(
    base: BaseModel, config: Config, *, steps: int, start: Stored | None = None
) -> Iterator[Training]:
    """See `KindModule`. Goes on from an adapter of this kind."""
    begun = own_start(KIND, start)
    updates, gains = ({}, {}) if begun is None else _parts(begun)
    if begun is None:
        names, rank = resolve_targets(base.linear_shapes, config.targets), config.rank
    else:
        names, rank = list(updates), begun.rank
    check_rank({name: base.linear_shapes[name] for name in names}, rank)
    scaling = config.alpha / rank
    peft_config = LoraConfig(r=rank, lora_alpha=config.alpha, use_dora=True)  # type: ignore[arg-type]
    own = {name: base.model.get_submodule(name) for name in names}
    with injected(base, peft_config, names, config.seed) as layers:
        for name, layer in layers.items():
            magnitude = layer.lora_magnitude_vector[NAME]
            magnitude.__class__ = _Magnitude
            if name in updates:
                put_update(layer, updates[name], scaling)
            length = _lengths(own[name], layer, scaling)
            magnitude.weight.data = length * (1 + gains[name].to(length)) if gains else length

        def weights(dtype: torch.dtype) -> KindWeights:
            tensors: dict[str, Tensor] = {}
            for name, layer in layers.items():
                length = _lengths(own[name], layer, scaling)
                tensors[f"{name}.A"] = layer.lora_A[NAME].weight
                tensors[f"{name}.B"] = layer.lora_B[NAME].weight
                tensors[f"{name}.gain"] = layer.lora_magnitude_vector[NAME].weight / length - 1
            return KindWeights(KIND, {"rank": rank, "scaling": scaling}, kept(tensors, dtype))

        parameters = {}
        for name, layer in layers.items():
            parameters[f"{name}.A"] = layer.lora_A[NAME].weight
            parameters[f"{name}.B"] = layer.lora_B[NAME].weight
            parameters[f"{name}.magnitude"] = layer.lora_magnitude_vector[NAME].weight
        yield Training(parameters, weights, graphs=base.base_bits == 16)


def _lengths(own: nn.Module, layer: Any, scaling: float) -> Tensor:
    """||W + s B A|| of each row, (out_features,) float32."""
    with torch.no_grad():
        product = layer.lora_B[NAME].weight @ layer.lora_A[NAME].weight
        length: Tensor = torch.linalg.norm(unpacked_weight(own) + scaling * product, dim=1)
        return length


def _parts(weights: KindWeights) -> tuple[dict[str, LowRankUpdate], dict[str, Tensor]]:
    """Module name -> its update, and -> its gains, float32."""
    t, scaling = weights.tensors, float(weights.options["scaling"])
    names = [key.removesuffix(".gain") for key in t if key.endswith(".gain")]
    updates = {
        n: LowRankUpdate(t[f"{n}.A"].float(), t[f"{n}.B"].float(), scaling) for n in sorted(names)
    }
    return updates, {name: t[f"{name}.gain"].float() for name in updates}


class DoraLinear(nn.Module):
    """h = (1 + gain) (W + s B A) x + b with all of it fixed.

    Shapes: x (..., in_features), A (rank, in_features), B (out_features, rank),
    gain (out_features,).
    """

    A: Tensor
    B: Tensor
    gain: Tensor
    shift: Tensor | None

    def __init__(self, base: nn.Module, update: LowRankUpdate, gain: Tensor) -> None:
        super().__init__()
        self.base = base
        device, dtype = next(base.parameters()).device, product_dtype(base)
        gain = gain.to(device)
        B = update.B.to(device) * update.scaling * (1 + gain[:, None])
        bias = getattr(base, "bias", None)
        shift = None if bias is None else (-gain * bias.float()).to(dtype)
        self.register_buffer("A", update.A.to(device, dtype), persistent=False)
        self.register_buffer("B", B.to(dtype), persistent=False)
        self.register_buffer("gain", gain.to(dtype), persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        y: Tensor = self.base(x)
        # The gain is added, not multiplied: 1 + gain would lose most of it in bf16.
        added = torch.addcmul(F.linear(F.linear(x.to(self.A.dtype), self.A), self.B, self.shift),
                              y.to(self.A.dtype), self.gain)  # fmt: skip
        return y + added.to(y.dtype)


@contextmanager
def applied(base: BaseModel, weights: KindWeights) -> Iterator[None]:
    """See `KindModule`."""
    updates, gains = _parts(weights)
    layers = {
        name: DoraLinear(base.model.get_submodule(name), update, gains[name])
        for name, update in updates.items()
    }
    with attached(base.model, layers):
        yield


def write(weights: KindWeights, directory: Path, told: Mapping[str, Any]) -> None:
    """See `KindModule`: a PEFT directory with `use_dora`."""
    updates, gains = _parts(weights)
    told = dict(told)
    lengths = row_norms(told.pop("folder"), updates)
    magnitudes = {name: lengths[name] * (1 + gain.double()) for name, gain in gains.items()}
    write_peft(updates, directory, magnitudes=magnitudes, **told)


def write_full(weights: KindWeights, folder: Path, directory: Path, **whole: Any) -> None:
    """See `KindModule`: the base with diag(1 + gain) (W + s B A) in the place of W."""
    updates, gains = _parts(weights)
    changes = {n: Rescaled(u.shape, u, rows=1 + gains[n]) for n, u in updates.items()}
    write_model(folder, changes, directory, **whole)


def from_magnitudes(
    found: AdapterWeights, magnitudes: Mapping[str, Tensor], folder: Path
) -> KindWeights:
    """An adapter as PEFT has it, in the form that is stored here.

    Args:
        found: the factors.
        magnitudes: module name -> m (out_features,).
        folder: the base's.
    Raises:
        ImportRefused: values that are not finite in that form.
    """
    updates = found.updates()
    lengths = row_norms(folder, updates)
    scalings = {update.scaling for update in updates.values()}
    scaling = scalings.pop() if len(scalings) == 1 else 1.0
    scaling = scaling or 1.0  # alpha may be 0, which B then takes
    tensors = {}
    for name, update in updates.items():
        tensors[f"{name}.A"] = update.A
        tensors[f"{name}.B"] = update.B * (update.scaling / scaling)
        tensors[f"{name}.gain"] = magnitudes[name].double() / lengths[name] - 1
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise ImportRefused(
                f"{name} is not finite in float32: lora_alpha is too large, or a row of the base "
                "that the magnitude stands for is zero"
            )
    options = {"rank": found.rank, "scaling": scaling}
    return KindWeights(KIND, options, kept(tensors, torch.float32))
