"""Layers that add B A x to a frozen linear layer, and how they get into a model.

`LoriLinear` and `LoraLinear` train, `LowRankLinear` only applies. All wrap the layer they stand
for, so that taking them out again leaves the very same model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lori_manager.engine.fp8 import Fp8Linear
from lori_manager.engine.products import plus_low_rank, plus_trained
from lori_manager.engine.siblings import Factors, Group
from lori_manager.engine.update import LowRankUpdate


def linear_shape(layer: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of a linear layer, None for anything else.

    Knows torch's Linear, packed ones such as bitsandbytes' Linear4bit with it, `Fp8Linear` and
    transformers' Conv1D (GPT-2), whose weight is (in_features, out_features).
    """
    if isinstance(layer, nn.Linear | Fp8Linear):
        return layer.out_features, layer.in_features
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        inner, outer = layer.weight.shape  # type: ignore[misc]
        return int(outer), int(inner)
    return None


def linear_weight(layer: nn.Module) -> Tensor:
    """The weight of a plain linear layer as (out_features, in_features), a view."""
    weight = layer.weight
    shape = linear_shape(layer)
    if isinstance(weight, Tensor) and shape is not None:
        # By its class: the shape of a square weight does not tell how it lies.
        out = weight if isinstance(layer, nn.Linear | Fp8Linear) else weight.t()
        if tuple(out.shape) == shape:
            return out
    raise ValueError(f"{type(layer).__name__} has no plain weight matrix")


def product_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype of a linear layer's products, which a packed weight is unpacked to.

    Layers with packed weights say it as `compute_dtype`, as bitsandbytes' Linear4bit does.
    """
    packed = getattr(layer, "compute_dtype", None)
    return packed if packed is not None else next(layer.parameters()).dtype


class LoriLinear(nn.Module):
    """h = W x + scaling * B A x, where only masked entries of B are parameters.

    B is put together in every forward from `values`, a 1-D parameter over the
    mask's positions, and a frozen remainder. What the mask leaves out is in no
    parameter: optimizer state, weight decay and clipping cannot reach it, so it
    does not change by a single bit.

    Shapes: x (..., in_features), A (rank, in_features), B (out_features, rank),
    values (number of True entries in the mask,).
    Source: arXiv:2504.07448; the reference masks gradients of a dense B instead.
    """

    A: Tensor
    positions: Tensor | None
    rest: Tensor | None
    trained: Factors | None = None

    def __init__(
        self,
        base: nn.Module,
        A: Tensor,
        scaling: float,
        mask: Tensor | None = None,
        start: Tensor | None = None,
        beside: LowRankUpdate | None = None,
    ) -> None:
        """Wrap `base`.

        Args:
            base: the frozen layer; not modified.
            A: (rank, in_features).
            scaling: alpha / rank.
            mask: bool (out_features, rank); None trains all of B.
            start: B to begin with; None is zero. Entries outside the mask stay.
            beside: a fixed update of the same layer. Its rows come first in the layer's A,
                its columns in B, with this scaling; none of them trains.
        Raises:
            ValueError: shapes that do not belong together.
        """
        super().__init__()
        shape = linear_shape(base)
        if shape is None or A.shape[1] != shape[1]:
            raise ValueError(f"A {tuple(A.shape)} does not fit a layer of shape {shape}")
        self.base = base
        self.scaling = scaling
        self.shape = (shape[0], int(A.shape[0]))
        for name, tensor in (("mask", mask), ("start", start)):
            if tensor is not None and tuple(tensor.shape) != self.shape:
                raise ValueError(f"{name} {tuple(tensor.shape)} does not fit B {self.shape}")
        self.fixed = 0 if beside is None else beside.rank
        if beside is not None:
            A, mask, start = self._widened(A, mask, start, beside)
        like = next(base.parameters())
        self.register_buffer("A", A.to(like.device, product_dtype(base)), persistent=False)
        first = (
            torch.zeros(self.shape, dtype=torch.float32, device=like.device)
            if start is None
            else start.to(like.device, torch.float32)
        )
        positions = rest = None
        if mask is not None:
            positions = mask.to(like.device).flatten().nonzero().flatten()
            if start is not None:
                rest = first.flatten().index_fill(0, positions, 0.0)
            first = first.flatten()[positions]
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("rest", rest, persistent=False)
        self.values: Tensor = nn.Parameter(first.flatten().clone())
        self.group = Group([self])

    def _widened(
        self, A: Tensor, mask: Tensor | None, start: Tensor | None, beside: LowRankUpdate
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A, mask and start with the fixed update's before them."""
        if beside.shape != (self.shape[0], A.shape[1]):
            raise ValueError(f"an update of shape {beside.shape} does not fit B {self.shape}")
        own = torch.ones(self.shape, dtype=torch.bool) if mask is None else mask
        first = torch.zeros(self.shape) if start is None else start
        B = beside.B.to(first.device, torch.float32) * (beside.scaling / self.scaling)
        none = torch.zeros(B.shape, dtype=torch.bool, device=own.device)
        self.shape = (self.shape[0], beside.rank + int(A.shape[0]))
        A = torch.cat([beside.A.to(A.device), A])  # in the wider of their dtypes
        return A, torch.cat([none, own], dim=1), torch.cat([B, first.float()], dim=1)

    def B(self) -> Tensor:
        """The whole B, (out_features, rank) float32, with its gradient path to `values`."""
        if self.positions is None:
            return self.values.view(self.shape)
        if self.rest is None:
            canvas = self.values.new_zeros(self.shape[0] * self.shape[1])
        else:
            canvas = self.rest
        return canvas.index_copy(0, self.positions, self.values).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.plain(x):
            return self.group.output(x, self)
        # Rows, so that y is no view: a view out of a custom function takes nothing in place.
        rows = x.reshape(-1, x.shape[-1])
        y: Tensor = self.base(rows)
        (B,) = self.group.factors(y.dtype)
        y = plus_low_rank(y, rows.to(y.dtype), self.A, B)
        return y.view(*x.shape[:-1], y.shape[-1])

    def plain(self, x: Tensor) -> bool:
        """Whether the group computes it: a plain matrix of x's own dtype, or one in e4m3."""
        if isinstance(self.base, Fp8Linear):
            return x.dtype == self.A.dtype
        weight = getattr(self.base, "weight", None)
        return isinstance(weight, Tensor) and weight.dtype == x.dtype == self.A.dtype


class LoraLinear(nn.Module):
    """h = W x + scaling * B A x with both factors trained, in their own dtype.

    The products are in the dtype of the base's own.
    Shapes: x (..., in_features), A (rank, in_features), B (out_features, rank).
    Source: arXiv:2106.09685.
    """

    def __init__(self, base: nn.Module, A: nn.Parameter, B: nn.Parameter, scaling: float) -> None:
        super().__init__()
        self.base = base
        self.A = A
        self.B = B
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        # Rows, so that y is no view: a view out of a custom function takes nothing in place.
        rows = x.reshape(-1, x.shape[-1])
        y: Tensor = self.base(rows)
        y = plus_trained(y, rows.to(y.dtype), self.A, self.B, self.scaling)
        return y.view(*x.shape[:-1], y.shape[-1])


class LowRankLinear(nn.Module):
    """h = W x + scaling * B A x with fixed factors.

    Shapes: x (..., in_features), A (rank, in_features), B (out_features, rank).
    """

    A: Tensor
    B: Tensor

    def __init__(self, base: nn.Module, update: LowRankUpdate) -> None:
        super().__init__()
        shape = linear_shape(base)
        if shape != update.shape:
            raise ValueError(f"an update of shape {update.shape} does not fit a layer of {shape}")
        self.base = base
        device, dtype = next(base.parameters()).device, product_dtype(base)
        self.register_buffer("A", update.A.to(device, dtype), persistent=False)
        B = (update.B * update.scaling).to(device, dtype)
        self.register_buffer("B", B, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        out: Tensor = self.base(x)
        z = F.linear(x, self.A)
        if torch.is_grad_enabled() or out.dtype != z.dtype:
            return out + F.linear(z, self.B)
        rows = out.view(-1, out.shape[-1])  # a fresh result of the base: added to in place
        rows.addmm_(z.view(-1, z.shape[-1]), self.B.t())
        return out


@contextmanager
def attached(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put `layers` in the place of the modules of those names, and take them out after.

    Raises:
        KeyError: the model has no module of that name; nothing is changed then.
    """
    places = []
    for name in layers:
        parent, _, child = name.rpartition(".")
        try:
            owner = model.get_submodule(parent)
        except AttributeError as e:
            raise KeyError(name) from e
        if child not in owner._modules:
            raise KeyError(name)
        places.append((owner, child, owner._modules[child]))
    try:
        for (owner, child, _), layer in zip(places, layers.values(), strict=True):
            owner._modules[child] = layer
        yield
    finally:
        for owner, child, original in places:
            owner._modules[child] = original


def low_rank_layers(
    model: nn.Module, updates: Mapping[str, LowRankUpdate]
) -> dict[str, LowRankLinear]:
    """One `LowRankLinear` per update, around the model's own layers."""
    return {n: LowRankLinear(model.get_submodule(n), u) for n, u in updates.items()}
