"""Layers that see the same input, computed together over weights that lie side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lori_manager.engine.fp8 import Fp8Linear, Matrix, fp8_plus_low_rank, fp8_side_by_side
from lori_manager.engine.products import frozen_plus_low_rank


class Factors(Protocol):
    """Where a group's B's come from; see `TrainedValues`."""

    def factors(self, group: Group, dtype: torch.dtype) -> list[Tensor]:
        """The group's scaled B's."""


class Member(Protocol):
    """What a group asks of its layers; see `LoriLinear`."""

    base: nn.Module
    A: Tensor
    scaling: float
    shape: tuple[int, int]
    values: Tensor
    positions: Tensor | None
    rest: Tensor | None
    group: Group
    trained: Factors | None

    def B(self) -> Tensor:
        """(out_features, rank) float32."""

    def plain(self, x: Tensor) -> bool:
        """Whether the base is a plain matrix of x's own dtype."""


class Group:
    """One layer, or several that are called with the very same input.

    Several are computed at the first of their calls; the others' outputs wait for
    theirs. Another input, or the last of them, lets go of what waits.
    """

    def __init__(self, layers: Sequence[Member]) -> None:
        self.layers = list(layers)
        self._laid: tuple[Any, Tensor | None, Tensor] | None = None
        self._input: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def output(self, x: Tensor, layer: Member) -> Tensor:
        """The layer's output (..., out_features) for x (..., in_features)."""
        if len(self.layers) == 1:
            return self._compute(x)[0]
        if self._input is not x or id(layer) not in self._waiting:
            parts = self._compute(x, *(one.shape[0] for one in self.layers))
            self._input = x
            self._waiting = {id(o): y for o, y in zip(self.layers, parts, strict=True)}
        out = self._waiting.pop(id(layer))
        if not self._waiting:
            self._input = None
        return out

    def together(self, x: Tensor) -> Tensor:
        """All outputs side by side, (..., sum of out_features)."""
        return self._compute(x)[0]

    def _compute(self, x: Tensor, *widths: int) -> tuple[Tensor, ...]:
        weight, bias, A = self.laid()
        rows = x.reshape(-1, x.shape[-1])
        Bs = self.factors(x.dtype)
        multiply: Any = fp8_plus_low_rank if isinstance(weight, Matrix) else frozen_plus_low_rank
        ys = multiply(rows, weight, bias, A, Bs, widths or (weight.shape[0],))
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)

    def factors(self, dtype: torch.dtype) -> Sequence[Tensor]:
        """The layers' scaled B's, each (out_features, rank), or one block-diagonal matrix."""
        first = self.layers[0]
        if first.trained is not None:
            return first.trained.factors(self, dtype)
        return [(layer.B() * layer.scaling).to(dtype) for layer in self.layers]

    def laid(self) -> tuple[Any, Tensor | None, Tensor]:
        """W (out, in), or a `Matrix` in e4m3, b (out,) or None and A (rank, in), of all layers."""
        if self._laid is not None:
            return self._laid
        bases = [layer.base for layer in self.layers]
        if isinstance(bases[0], Fp8Linear):
            A = torch.cat([layer.A for layer in self.layers])
            self._laid = (*fp8_side_by_side(cast("list[Fp8Linear]", bases)), A)
            return self._laid
        if len(bases) == 1:
            weight = cast(Tensor, bases[0].weight)
            if not isinstance(bases[0], nn.Linear):
                weight = weight.t()  # Conv1D keeps (in_features, out_features)
            return weight, cast("Tensor | None", bases[0].bias), self.layers[0].A
        bias = None
        if any(base.bias is not None for base in bases):
            weights = [cast(Tensor, base.weight) for base in bases]
            bias = torch.cat([
                w.new_zeros(w.shape[0]) if base.bias is None else cast(Tensor, base.bias).detach()
                for base, w in zip(bases, weights, strict=True)
            ])  # fmt: skip
        A = torch.cat([layer.A for layer in self.layers])
        self._laid = side_by_side(cast("list[nn.Linear]", bases)), bias, A
        return self._laid


def side_by_side(bases: Sequence[nn.Linear]) -> Tensor:
    """The layers' frozen weights as one matrix (sum of out_features, in_features).

    The layers' own weights become its rows, with the same values: nothing is held
    twice. Layers that lie side by side already are left as they are.
    """
    weights = [base.weight.data for base in bases]
    first = weights[0]
    place = first.data_ptr()
    for weight in weights:
        adjacent = (
            weight.is_contiguous()
            and weight.data_ptr() == place
            and weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        )
        if not adjacent:
            break
        place += weight.numel() * weight.element_size()
    else:
        rows = sum(weight.shape[0] for weight in weights)
        return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))
    joined = torch.cat(weights)
    for base, part in zip(bases, torch.split(joined, [w.shape[0] for w in weights]), strict=True):
        base.weight.data = part
    return joined


@contextmanager
def inputs_watched(
    modules: Mapping[str, nn.Module], see: Callable[[str, Tensor, str], None]
) -> Iterator[None]:
    """Call `see(name, x, first)` before every call of a module inside.

    x is what the module was given, and `first` the name of the module that was the first
    to be given that very tensor.
    """
    given: list[tuple[Tensor, str]] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            first = next((one for tensor, one in given if tensor is x), None)
            if first is None:
                first = name
                given.append((x, name))
            see(name, x, first)

        return hook

    hooks: list[Any] = [m.register_forward_pre_hook(watch(n)) for n, m in modules.items()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def join_siblings(layers: Mapping[str, Any], probe: Callable[[], object]) -> list[list[str]]:
    """Find layers that see the same input and let each such group compute together.

    A layer that is called twice in a forward, or whose base is not a plain
    `nn.Linear`, stays alone.

    Args:
        layers: attached layers by module name; those of a group are told of each other.
        probe: runs the model once on anything.
    Returns:
        The groups of more than one, by module name, in the order of their calls.
    """
    seen: dict[str, tuple[Tensor, list[str]]] = {}

    def see(name: str, x: Tensor, first: str) -> None:
        seen.setdefault(first, (x, []))[1].append(name)

    with inputs_watched(layers, see), torch.no_grad():
        probe()
    groups = [
        names
        for x, names in seen.values()
        if len(names) > 1
        and len(set(names)) == len(names)
        and type(layers[names[0]].base) in (nn.Linear, Fp8Linear)
        and len({type(layers[n].base) for n in names}) == 1
        and all(layers[n].plain(x) for n in names)
    ]
    for names in groups:
        group = Group([layers[name] for name in names])
        for name in names:
            layers[name].group = group
    return groups
