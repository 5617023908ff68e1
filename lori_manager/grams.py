"""Second moments of every member's inputs, collected when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lori_manager.consolidation import input_grams
from lori_manager.engine.update import LowRankUpdate
from lori_manager.models import BaseModel
from lori_manager.stages import ROOM, Stage, grouped, stages_of


class _OfMember(Mapping[str, Tensor]):
    """One member's moments by module, in the order of the groups."""

    def __init__(self, whole: StreamedGrams, member: int, names: Sequence[str]) -> None:
        self._whole, self._member, self._names = whole, member, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._whole.read(self._member, name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # the usual way would collect it

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class StreamedGrams(Sequence[Mapping[str, Tensor]]):
    """As a list of what `input_grams` gives for each member, but never in memory together.

    Held are the moments of one member for one group of modules, the last that were read;
    others are collected by forwards of the model when they are asked for. So whoever reads
    them goes through `groups`, for each through the members, and for each through its modules,
    or through one member after the other in its own order.
    """

    def __init__(
        self,
        base: BaseModel,
        updates: Sequence[Mapping[str, LowRankUpdate]],
        rows: Sequence[Sequence[Any]],
        batch: int,
        room: int = ROOM,
    ) -> None:
        """Look at the model, and collect nothing yet.

        Args:
            base, batch: as of `input_grams`, which is asked for each member's
            updates, rows: of the member.
            room: bytes for a group's moments (float32) and their sum over members (float64).
        """
        self._base, self._updates, self._rows, self._batch = base, updates, rows, batch
        stages = stages_of(base, dict.fromkeys(name for one in updates for name in one))
        self._groups = grouped(stages, lambda stage: 12 * stage.features**2, room)
        self._place = {
            name: number
            for number, group in enumerate(self._groups)
            for stage in group
            for name in stage.names
        }
        self._held: tuple[int, int] | None = None
        self._grams: dict[str, Tensor] = {}

    @property
    def groups(self) -> list[list[tuple[str, ...]]]:
        """For each group the modules that see one input together."""
        return [[stage.names for stage in group] for group in self._groups]

    def __len__(self) -> int:
        return len(self._updates)

    def __getitem__(self, member):  # type: ignore[no-untyped-def]
        if isinstance(member, slice):
            return [self[i] for i in range(*member.indices(len(self)))]
        names = [name for name in self._place if name in self._updates[member]]
        return _OfMember(self, member, names)

    def read(self, member: int, name: str) -> Tensor:
        """E[x x'] of a module of a member, (in_features, in_features) float32."""
        wanted = (member, self._place[name])
        if self._held != wanted:
            self._grams, self._held = {}, None  # before others take their room
            self._grams = self._collected(member, self._groups[wanted[1]])
            self._held = wanted
        return self._grams[name]

    def _collected(self, member: int, group: Sequence[Stage]) -> dict[str, Tensor]:
        updates, rows = self._updates[member], self._rows[member]
        return input_grams(self._base, updates, rows, self._batch, group)
