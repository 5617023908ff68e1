"""Layers that add B A x to a frozen linear layer, and how they get into a model.

`LoriLinear` trains, `LowRankLinear` only applies. Both wrap the layer they stand
for, so that taking them out again leaves the very same model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lori_manager.engine.update import LowRankUpdate


def linear_shape(layer: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of a linear layer, None for anything else.

    Knows torch's Linear and transformers' Conv1D (GPT-2), whose weight is
    (in_features, out_features).
    """
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        inner, outer = layer.weight.shape  # type: ignore[misc]
        return int(outer), int(inner)
    return None


class _FrozenPlusLowRank(torch.autograd.Function):
    """y_i = x W_i' + b_i + (x A_i') B_i' for matrices that see the same x.

    W, b and A are frozen: there are gradients for x and every B alone. All A_i are one
    matrix, so that x is read once for all projections z and dx is added to once. Keeps
    z for the backward and not x; every sum goes into its target by one fused call.
    Shapes: x (n, in), A (sum of ranks, in); for each i weight (out_i, in), bias
    (out_i,) or None, B (out_i, rank_i).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, count: int, *rest: Any) -> tuple[Tensor, ...]:
        weights, biases, Bs = rest[:count], rest[count : 2 * count], rest[2 * count :]
        z = F.linear(x, A)
        ys = []
        parts = torch.split(z, [B.shape[1] for B in Bs], dim=1)
        for weight, bias, B, part in zip(weights, biases, Bs, parts, strict=True):
            y = F.linear(x, weight, bias)
            y.addmm_(part, B.t())
            ys.append(y)
        ctx.save_for_backward(z, A, *weights, *Bs)
        ctx.count = count
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        count = ctx.count
        z, A, *rest = ctx.saved_tensors
        weights, Bs = rest[:count], rest[count:]
        dx = None
        if ctx.needs_input_grad[0]:
            dz = [dy.mm(B) for dy, B in zip(dys, Bs, strict=True)]
            dx = dys[0].mm(weights[0])
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                dx.addmm_(dy, weight)
            dx.addmm_(dz[0] if count == 1 else torch.cat(dz, dim=1), A)
        parts = torch.split(z, [B.shape[1] for B in Bs], dim=1)
        dBs = [dy.t().mm(part) for dy, part in zip(dys, parts, strict=True)]
        return (dx, None, None, *[None] * (2 * count), *dBs)


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
    siblings: Siblings | None = None

    def __init__(
        self,
        base: nn.Module,
        A: Tensor,
        scaling: float,
        mask: Tensor | None = None,
        start: Tensor | None = None,
    ) -> None:
        """Wrap `base`.

        Args:
            base: the frozen layer; not modified.
            A: (rank, in_features).
            scaling: alpha / rank.
            mask: bool (out_features, rank); None trains all of B.
            start: B to begin with; None is zero. Entries outside the mask stay.
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
        like = next(base.parameters())
        self.register_buffer("A", A.to(like.device, like.dtype), persistent=False)
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
        self.values = nn.Parameter(first.flatten().clone())

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
        if not self.plain(x):
            out: Tensor = self.base(x)
            return out + F.linear(F.linear(x, self.A), (self.B() * self.scaling).to(x.dtype))
        return self.siblings.outputs(x, self) if self.siblings else _together(x, [self], self.A)[0]

    def plain(self, x: Tensor) -> bool:
        """Whether the base is a plain matrix of x's own dtype, not a quantised one."""
        weight = self.base.weight
        return isinstance(weight, Tensor) and weight.dtype == x.dtype == self.A.dtype


def _together(x: Tensor, layers: Sequence[LoriLinear], A: Tensor) -> tuple[Tensor, ...]:
    """Outputs of layers that see the same x; A holds their projections one below the other."""
    matrices = [
        layer.base.weight
        if isinstance(layer.base, nn.Linear)
        else cast(Tensor, layer.base.weight).t()
        for layer in layers
    ]
    biases = [layer.base.bias for layer in layers]
    Bs = [(layer.B() * layer.scaling).to(x.dtype) for layer in layers]
    rows = x.reshape(-1, x.shape[-1])
    ys = _FrozenPlusLowRank.apply(rows, A, len(layers), *matrices, *biases, *Bs)  # type: ignore[no-untyped-call]
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


class Siblings:
    """Layers that are called with the very same input, computed at the first of the calls.

    The others' outputs wait for their calls; another input, or the end of them, lets
    go of what waits.
    """

    def __init__(self, layers: Sequence[LoriLinear]) -> None:
        self.layers = list(layers)
        self.A = torch.cat([layer.A for layer in layers])
        self._input: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def outputs(self, x: Tensor, layer: LoriLinear) -> Tensor:
        """The layer's output for x."""
        if self._input is not x or id(layer) not in self._waiting:
            ys = _together(x, self.layers, self.A)
            self._input = x
            self._waiting = {id(one): y for one, y in zip(self.layers, ys, strict=True)}
        out = self._waiting.pop(id(layer))
        if not self._waiting:
            self._input = None
        return out


def join_siblings(layers: Mapping[str, LoriLinear], probe: Callable[[], object]) -> list[list[str]]:
    """Find layers that see the same input and let each such group compute together.

    A layer that is called twice in a forward, or whose base is quantised, stays alone.

    Args:
        layers: attached layers by module name; those of a group are told of each other.
        probe: runs the model once on anything.
    Returns:
        The groups of more than one, by module name, in the order of their calls.
    """
    seen: list[tuple[Tensor, list[str]]] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            for tensor, names in seen:
                if tensor is inputs[0]:
                    names.append(name)
                    return
            seen.append((inputs[0], [name]))

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            probe()
    finally:
        for one in hooks:
            one.remove()
    groups = [
        names
        for x, names in seen
        if len(names) > 1
        and len(set(names)) == len(names)
        and all(layers[name].plain(x) for name in names)
    ]
    for names in groups:
        siblings = Siblings([layers[name] for name in names])
        for name in names:
            layers[name].siblings = siblings
    return groups


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
        like = next(base.parameters())
        self.register_buffer("A", update.A.to(like.device, like.dtype), persistent=False)
        B = (update.B * update.scaling).to(like.device, like.dtype)
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
