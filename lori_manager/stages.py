"""Which modules see one input together, in the order of their calls, and how many fit at once.

The inputs' second moments of a large model do not fit in memory together: of 8B Llama shapes
they are 33 GB for one adapter. What can be merged module by module is therefore collected for
some of the modules at a time, by as many forwards as that takes, each ended after the last
module that is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lori_manager.engine.siblings import inputs_watched
from lori_manager.errors import InvalidInput
from lori_manager.labelling import Runner
from lori_manager.models import BaseModel

ROOM = 4 * 2**30  # bytes that the sums of one group of modules may take


@dataclass(frozen=True)
class Stage:
    """Modules that are given one tensor together.

    Attributes:
        names: of the modules, in the order of their calls.
        features: in_features of all of them.
        calls: of all of them in one forward.
    """

    names: tuple[str, ...]
    features: int
    calls: int


class _Enough(Exception):
    """All calls that were waited for have come."""


def run_watched(
    forward: Runner,
    batch: Any,
    modules: Mapping[str, nn.Module],
    see: Callable[[str, Tensor, str], None],
    calls: int | None = None,
) -> None:
    """One forward with `see(name, x, first)` before every call of a module.

    Args:
        see: as of `inputs_watched`.
        calls: after so many the forward is ended; None lets it go on.
    """
    left = calls

    def counting(name: str, x: Tensor, first: str) -> None:
        nonlocal left
        see(name, x, first)
        if left is not None:
            left -= 1
            if not left:
                raise _Enough

    with inputs_watched(modules, counting), suppress(_Enough):
        forward.run(batch)


def stages_of(base: BaseModel, names: Iterable[str]) -> list[Stage]:
    """The modules as one forward calls them.

    Raises:
        InvalidInput: a module that it does not call, as a mixture's experts.
    """
    seen: dict[str, list[str]] = {}
    features: dict[str, int] = {}

    def see(name: str, x: Tensor, first: str) -> None:
        seen.setdefault(first, []).append(name)
        features[first] = x.shape[-1]

    modules = {name: base.model.get_submodule(name) for name in names}
    with torch.no_grad(), inputs_watched(modules, see):
        base.probe()
    called = {name for together in seen.values() for name in together}
    for name in modules:
        if name not in called:
            raise InvalidInput(f"{name} is not called in every forward: use `--method concat`")
    return [
        Stage(tuple(dict.fromkeys(together)), features[first], len(together))
        for first, together in seen.items()
    ]


def grouped(
    stages: Sequence[Stage], held: Callable[[Stage], int], room: int = ROOM
) -> list[list[Stage]]:
    """Consecutive stages whose sums fit in the room together, one stage at least.

    Args:
        held: the bytes that a stage takes.
        room: in bytes.
    """
    groups: list[list[Stage]] = []
    left = 0
    for stage in stages:
        size = held(stage)
        if not groups or size > left:
            groups.append([])
            left = room
        groups[-1].append(stage)
        left -= size
    return groups
