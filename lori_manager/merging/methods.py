"""The registry of merge methods, and what every one of them is given."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from lori_manager.engine.core import truncated
from lori_manager.engine.decompose import side_by_side
from lori_manager.engine.update import LowRankUpdate
from lori_manager.engine.weights import AdapterWeights, one_block
from lori_manager.errors import InvalidInput
from lori_manager.registry import Entry, Registry

# For each member: module name -> E[x x'] (in_features, in_features) of its own task's inputs.
Grams = Sequence[Mapping[str, Tensor]]
# Groups of modules, and in each those that see one input.
Groups = Sequence[Sequence[Sequence[str]]]

SPACES = ("core", "full")
SPANS = ("free", "members")


@dataclass(frozen=True)
class MergeOptions:
    """What methods may be told; the fact `options` of each says which of it counts there.

    Attributes:
        max_rank: rank of the result; None keeps what the method gives.
        space: "core" or "full", where methods that look at single entries do so.
        density: share of entries that pruning methods keep, in (0, 1].
        seed: of methods that draw.
        grams: second moments of the members' inputs, for methods that need them; each on
            the inputs of its own task, with itself in the model.
        groups: modules whose moments are at hand together: methods go through the groups, in
            each through the members, and read a module's moments of a member once. None:
            all are held.
        eps: of a regression, against the mean diagonal of the summed moments.
        shrink: of a regression, what entries off the diagonal of the moments are multiplied
            with, in [0, 1].
        general: weight of general text, on which the merge shall do what the base does,
            against all members together; 0 leaves it out.
        answers: share of a task's weight, in a regression, on the places whose next token
            is a completion's; 0 counts all tokens alike.
        span: "free" fits an update over all directions, "members" over those of the
            members' B, which keeps every B and its mask.
        iterations: of methods that solve again.
        steps, rate: of methods that train, and
        labels: the share of the rows' own completions in what they learn; the rest is what
            each task's own adapter says.
    """

    max_rank: int | None = None
    space: str = "core"
    density: float = 0.5
    seed: int = 0
    grams: Grams | None = None
    groups: Groups | None = None
    eps: float = 1e-2
    shrink: float = 1.0
    general: float = 0.25
    answers: float = 0.9
    span: str = "free"
    iterations: int = 3
    steps: int = 120
    rate: float = 1e-3
    labels: float = 0.5

    def settings(self) -> dict[str, object]:
        """All but the moments, by name: what makes the same merge again."""
        return {name: getattr(self, name) for name in option_names()}

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("max_rank", self.max_rank is None or self.max_rank >= 1, "at least 1"),
            ("space", self.space in SPACES, f"one of {', '.join(SPACES)}"),
            ("density", 0 < self.density <= 1, "in (0, 1]"),
            ("shrink", 0 <= self.shrink <= 1, "in [0, 1]"),
            ("eps", 0 < self.eps < float("inf"), "above 0"),
            ("seed", self.seed >= 0, "0 or more"),
            ("general", 0 <= self.general < float("inf"), "0 or more"),
            ("answers", 0 <= self.answers < 1, "a share in [0, 1)"),
            ("span", self.span in SPANS, f"one of {', '.join(SPANS)}"),
            ("iterations", self.iterations >= 1, "at least 1"),
            ("steps", self.steps >= 1, "at least 1"),
            ("rate", 0 < self.rate < float("inf"), "above 0"),
            ("labels", 0 <= self.labels <= 1, "a share in [0, 1]"),
        ):
            if not ok:
                raise InvalidInput(f"`{name}` must be {expected}, got {getattr(self, name)!r}")


def option_names() -> list[str]:
    """What methods may be told by name."""
    return [f.name for f in fields(MergeOptions) if f.name not in ("grams", "groups")]


def options_of(entry: Entry[Any]) -> tuple[str, ...]:
    """The options that count for a method, its fact `options`."""
    return tuple(cast("Sequence[str]", entry.facts["options"]))


DEFAULTS = MergeOptions()


class MergeMethod(Protocol):
    """Members and their weights -> one adapter. Members are not modified."""

    def __call__(
        self,
        members: Sequence[AdapterWeights],
        weights: Sequence[float],
        options: MergeOptions = DEFAULTS,
    ) -> AdapterWeights:
        """Merge; raises InvalidInput where the members do not admit this method."""


merge_methods: Registry[MergeMethod] = Registry("merge method")


def load_all() -> Registry[MergeMethod]:
    """The registry with every method of this package in it: each file registers its own."""
    folder = Path(__file__).parent
    for module in pkgutil.iter_modules([str(folder)]):
        importlib.import_module(f"lori_manager.merging.{module.name}")
    return merge_methods


def module_by_module(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    merge: Callable[[str, list[LowRankUpdate], list[float]], LowRankUpdate],
    max_rank: int | None = None,
    *,
    together: bool = True,
) -> AdapterWeights:
    """One block out of what `merge` makes of each module's updates.

    A member of weight 0 takes no part, as if it did not have the module; where none is
    left, the module's update is zero.

    Args:
        members, weights: as a method is given them.
        merge: called with the module's name, the updates of the members that take part
            (float32) and their weights; gives the module's update.
        max_rank: what comes out is cut to the best update of that rank.
        together: on a GPU, several modules at a time.
    Raises:
        ValueError: no members, or not one weight per member.
    """
    if not members or len(members) != len(weights):
        raise ValueError(f"got {len(members)} members and {len(weights)} weights")
    updates = [member.updates() for member in members]
    names = sorted({name for one in updates for name in one})

    def joined(name: str) -> LowRankUpdate:
        having = [(u[name], float(w)) for u, w in zip(updates, weights, strict=True) if name in u]
        part = [(u, w) for u, w in having if w]
        if part:
            found = merge(name, [u for u, _ in part], [w for _, w in part])
        else:
            found = having[0][0].zero()
        return found if max_rank is None else truncated(found, max_rank)[0]

    device = next(iter(updates[0].values())).B.device if together else torch.device("cpu")
    return one_block(dict(zip(names, side_by_side(joined, names, device), strict=True)))
