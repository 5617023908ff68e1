"""Full fine-tuning: every weight of the base trains, and the difference to it is stored.

An encoder's head is none of them: it trains and is stored beside, see `heads`.

What trains are float32 copies, of a bf16 base too: a step of 1e-5 would be lost in bf16. Tied
weights are one. On a device training takes, for each weight of a base in float32 (bf16), 24 (24)
bytes: 4 (2) the base's own, 4 (4 and a cast of 2) the copy, 8 its gradient and 8 AdamW's moments;
at use the base's own and a sum, 8 (4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lori_manager.adapters.full_export import write_differences
from lori_manager.adapters.kind import Training, own_start
from lori_manager.adapters.own_form import write_own
from lori_manager.config import Config
from lori_manager.engine.weights import KindWeights, Stored
from lori_manager.errors import InvalidInput, WrongBase
from lori_manager.models import BaseModel, head_names

KIND = "full"
ALL = "all"


@dataclass(frozen=True)
class Place:
    """Where a parameter stands; a tied one stands in several."""

    module: nn.Module
    name: str
    attribute: str


@contextmanager
def training(
    base: BaseModel, config: Config, *, steps: int, start: Stored | None = None
) -> Iterator[Training]:
    """See `KindModule`.

    Options: `modules`, "all", or names with commas between them that are each a module's full
    name or its last parts, whole: "norm", "mlp.down_proj".
    """
    wanted = config.kind_options["modules"]
    places = find_places(base.model, wanted)
    _check_plain(base.model, places)
    places = _used(base, places)
    own = {name: base.model.get_parameter(name) for name in places}
    masters = {name: nn.Parameter(p.detach().float().clone()) for name, p in own.items()}
    begun = own_start(KIND, start)
    if begun is not None:
        check(base.model, begun)
        if outside := sorted(set(begun.tensors) - set(masters)):
            raise InvalidInput(
                f"the parent changed {outside[0]!r}, which `modules` {wanted!r} leaves out: give "
                "the parent's, or leave --from out"
            )
        for name, difference in begun.tensors.items():
            masters[name].data += difference.to(masters[name])

    def put(*_: object) -> None:
        """The copies in the weights' dtype, with their gradient paths, in the weights' places."""
        _put(places, {name: p.to(own[name].dtype) for name, p in masters.items()})

    def weights(dtype: torch.dtype) -> KindWeights:
        kept = {
            name: (p.detach() - own[name].detach().float()).to("cpu", dtype).contiguous()
            for name, p in masters.items()
        }
        return KindWeights(KIND, {"modules": wanted}, kept)

    with _restored(places, own):
        put()
        hook = base.decoder.register_forward_pre_hook(put)
        try:
            yield Training(masters, weights, graphs=False)
        finally:
            hook.remove()


@contextmanager
def applied(base: BaseModel, weights: KindWeights) -> Iterator[None]:
    """See `KindModule`.

    Raises:
        WrongBase: the adapter is of another model.
        InvalidInput: the base's weights are packed.
    """
    every = find_places(base.model, ALL)
    _check_plain(base.model, every.keys() & weights.tensors.keys())
    check(base.model, weights)
    places = {name: every[name] for name in weights.tensors}
    own = {name: base.model.get_parameter(name) for name in places}
    sums = {
        name: (p.detach().float() + weights.tensors[name].to(p.device, torch.float32)).to(p.dtype)
        for name, p in own.items()
    }
    with _restored(places, own):
        _put(places, {name: nn.Parameter(t, requires_grad=False) for name, t in sums.items()})
        yield


def write(weights: KindWeights, directory: Path, told: Mapping[str, Any]) -> None:
    """See `KindModule`: the form of `own_form`, the differences by the parameters' names."""
    write_own(weights, directory, told)


def write_full(
    weights: KindWeights,
    folder: Path,
    directory: Path,
    *,
    fingerprint: str,
    told: Callable[[int, int], None] | None = None,
) -> None:
    """The model as it was trained, as a folder of its own; see `full_export.write_full`."""
    write_differences(folder, weights.tensors, directory, fingerprint=fingerprint, told=told)


def check(model: nn.Module, weights: KindWeights) -> None:
    """Refuse what does not fit the model, which may be on the meta device.

    Raises:
        WrongBase: it was made for another.
    """
    shapes = {name: tuple(model.get_parameter(name).shape) for name in find_places(model, ALL)}
    for name, t in weights.tensors.items():
        if shapes.get(name) != tuple(t.shape):
            raise WrongBase(
                f"the difference {name[:120]!r} is {tuple(t.shape)}, this "
                f"{type(model).__name__} has "
                f"{shapes.get(name, 'no such parameter')}: it was made for another model"
            )


def find_places(model: nn.Module, modules: str) -> dict[str, list[Place]]:
    """Parameter -> where it stands, of those that `modules` means; an encoder's head is left out.

    Raises:
        InvalidInput: a name that no module with parameters has.
    """
    standing: dict[int, list[Place]] = {}
    behind = tuple(f"{name}." for name in head_names(model))
    for module_name, module in model.named_modules(remove_duplicate=False):
        if f"{module_name}.".startswith(behind):
            continue
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                place = Place(module, module_name, attribute)
                standing.setdefault(id(parameter), []).append(place)
    places = {name: standing[id(p)] for name, p in model.named_parameters() if id(p) in standing}
    wanted = [name.strip() for name in modules.split(",")]
    if wanted == [ALL]:
        return places
    chosen: dict[str, list[Place]] = {}
    for target in wanted:
        found = {
            name: where for name, where in places.items()
            if any(p.name == target or p.name.endswith(f".{target}") for p in where)
        }  # fmt: skip
        if not found or not target:
            ends = sorted({p.name.rpartition(".")[2] for where in places.values() for p in where})
            raise InvalidInput(
                f"`modules` names {target!r}, which matches no module with weights; there are: "
                f"{', '.join(ends)}, or {ALL!r}"
            )
        chosen |= found
    return chosen


def _used(base: BaseModel, places: dict[str, list[Place]]) -> dict[str, list[Place]]:
    """Those that the logits of an encoder hang on.

    A mask token, say, is of no use here, and weight decay alone would move it.
    Raises:
        InvalidInput: none of them.
    """
    if not base.architecture.encoder:
        return places
    own = [base.model.get_parameter(name) for name in places]
    try:
        for p in own:
            p.requires_grad_(True)
        found = torch.autograd.grad(base.probe().sum(), own, allow_unused=True)
    finally:
        for p in own:
            p.requires_grad_(False)
    used = {
        name: places[name]
        for name, gradient in zip(places, found, strict=True)
        if gradient is not None
    }
    if not used:
        raise InvalidInput(
            f"no label depends on {next(iter(places))!r}: name other `modules`, or leave them out"
        )
    return used


def _check_plain(model: nn.Module, names: Iterable[str]) -> None:
    for name in sorted(names):
        p = model.get_parameter(name)
        if not p.is_floating_point() or p.itemsize < 2:
            raise InvalidInput(
                f"kind `{KIND}` changes the base's own weights, and those of {name!r} are packed: "
                "leave --base-bits 4 and --precision fp8 out"
            )


def _put(places: Mapping[str, list[Place]], tensors: Mapping[str, Tensor]) -> None:
    """Let the modules find those tensors where they look for their parameters."""
    for name, where in places.items():
        for place in where:
            place.module._parameters[place.attribute] = tensors[name]  # type: ignore[assignment]


@contextmanager
def _restored(places: Mapping[str, list[Place]], own: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """The very same parameters stand in their places again after."""
    try:
        yield
    finally:
        _put(places, own)
