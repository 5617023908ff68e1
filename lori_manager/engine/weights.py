"""AdapterWeights: a whole adapter in memory, as blocks of factors.

A trained adapter is one block; an exact merge of three is three blocks with
their weights in the scaling, so that a regenerable A stays regenerable and a
sparse B stays sparse on disk. A routed adapter holds its members side by side
and a router that chooses one of them for each input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lori_manager.engine.projection import ProjectionSpec, projection_digest
from lori_manager.engine.router import Router
from lori_manager.engine.update import LowRankUpdate, concat_updates
from lori_manager.errors import InvalidInput


@dataclass(frozen=True)
class Block:
    """Factors that share one way of making A and one scaling.

    Attributes:
        B: module name -> (out_features, rank). Stored in its own dtype.
        scaling: the factor before B A.
        projection: how A is regenerated, or None where `tensors` holds it.
        tensors: module name -> A (rank, in_features); None with a projection.
        mask: module name -> bool like B; B is zero outside it. None: B is dense.
    """

    B: Mapping[str, Tensor]
    scaling: float
    projection: ProjectionSpec | None = None
    tensors: Mapping[str, Tensor] | None = field(default=None, repr=False)
    mask: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if (self.projection is None) == (self.tensors is None):
            raise ValueError("a block has either a projection or tensors for A")
        named = self.projection.modules if self.projection is not None else self.tensors
        if set(named or ()) != set(self.B):
            raise ValueError("A and B of a block name different modules")

    @property
    def A(self) -> Mapping[str, Tensor]:
        """Module name -> (rank, in_features), float32 where it is regenerated."""
        if self.projection is not None:
            return self.projection.matrices
        return self.tensors or {}

    @property
    def projection_digest(self) -> str:
        """SHA-256 of A; equal for blocks that share one A."""
        if self.projection is not None:
            return self.projection.digest
        return projection_digest(self.A)

    def updates(self) -> dict[str, LowRankUpdate]:
        """Module name -> LowRankUpdate."""
        return {n: LowRankUpdate(self.A[n], self.B[n], self.scaling) for n in self.B}


@dataclass(frozen=True)
class Head:
    """What was trained whole behind an encoder, to tell the labels of one task.

    Attributes:
        labels: their names, in the order of the logits.
        tensors: a parameter's full name in the model -> its values, all of one dtype.
    """

    labels: tuple[str, ...]
    tensors: Mapping[str, Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2 or not self.tensors:
            raise ValueError("a head has two labels or more, all different, and its tensors")

    def same_as(self, other: Head) -> bool:
        """Whether both give the same logits to everything."""
        return (
            self.labels == other.labels
            and self.tensors.keys() == other.tensors.keys()
            and all(torch.equal(self.tensors[n], other.tensors[n]) for n in self.tensors)
        )


@dataclass(frozen=True)
class AdapterWeights:
    """One or more blocks whose updates add up, or with a router: those of one member do.

    Attributes:
        blocks: all of them; a routed adapter's members one behind the other.
        router: of a routed adapter.
        parts: how many of the blocks each of its members has; empty without a router.
        heads: task -> its head, where the base is an encoder.
    """

    blocks: tuple[Block, ...]
    router: Router | None = None
    parts: tuple[int, ...] = ()
    heads: Mapping[str, Head] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("an adapter has at least one block")
        if len(self.parts) != (0 if self.router is None else self.router.members):
            raise ValueError("`parts` must be one number for each member that a router knows")
        if self.parts and (min(self.parts) < 1 or sum(self.parts) != len(self.blocks)):
            raise ValueError(f"parts {self.parts} do not make up {len(self.blocks)} blocks")

    @property
    def modules(self) -> list[str]:
        """Sorted names of all modules that any block updates."""
        return sorted({name for block in self.blocks for name in block.B})

    @property
    def rank(self) -> int:
        """The largest rank of the summed update of any module; of any member, where routed."""
        if self.router is not None:
            return max(self.member(i).rank for i in range(len(self.parts)))
        return max(
            sum(int(b.B[name].shape[1]) for b in self.blocks if name in b.B)
            for name in self.modules
        )

    def member(self, number: int) -> AdapterWeights:
        """One member of a routed adapter, as it was before.

        Raises:
            IndexError: there is no such member, or the adapter is not routed.
        """
        if not 0 <= number < len(self.parts):
            raise IndexError(f"there is no member {number} among {len(self.parts)}")
        begin = sum(self.parts[:number])
        return AdapterWeights(self.blocks[begin : begin + self.parts[number]])

    def check_single(self) -> None:
        """Raise InvalidInput where the adapter is routed: its blocks must not be summed."""
        if self.router is not None:
            raise InvalidInput(
                f"a routed adapter has no single update: it is {len(self.parts)} adapters, of "
                "which one acts on each input; use its members instead"
            )

    def updates(self) -> dict[str, LowRankUpdate]:
        """Module name -> the sum of the blocks' updates, as factors, float32.

        Raises:
            InvalidInput: the adapter is routed.
        """
        self.check_single()
        out = {}
        for name in self.modules:
            parts = [
                LowRankUpdate(b.A[name].float(), b.B[name].float(), b.scaling)
                for b in self.blocks
                if name in b.B
            ]
            out[name] = parts[0] if len(parts) == 1 else concat_updates(parts, [1.0] * len(parts))
        return out


@dataclass(frozen=True)
class KindWeights:
    """An adapter that is no low-rank update: the tensors of its own kind.

    Attributes:
        kind: whose, see `kinds.KINDS`.
        options: plain JSON with which, and with the base, its modules are built again.
        tensors: name -> values of one dtype, in any number of dimensions, at least one.
        heads: task -> its head, where the base is an encoder.
    """

    kind: str
    options: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)
    heads: Mapping[str, Head] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tensors:
            raise ValueError("an adapter has at least one tensor")

    @property
    def rank(self) -> int:
        """The rank that its kind trains at, 0 where it has none."""
        return int(self.options.get("rank", 0))


Stored = AdapterWeights | KindWeights


def joined_heads(members: Sequence[Stored]) -> dict[str, Head]:
    """Each task's head, of all members together.

    Raises:
        InvalidInput: two members have different heads for one task.
    """
    found: dict[str, Head] = {}
    for member in members:
        for task, head in member.heads.items():
            if not found.setdefault(task, head).same_as(head):
                raise InvalidInput(
                    f"two of the members have a head for task {task!r}, and an adapter holds one: "
                    "merge one adapter a task"
                )
    return found


def one_block(
    updates: Mapping[str, LowRankUpdate], dtype: torch.dtype | None = None
) -> AdapterWeights:
    """An adapter of one dense block of scaling 1, its factors in that dtype or their own."""
    folded = {name: update.folded() for name, update in updates.items()}
    B = {name: u.B.to(dtype or u.B.dtype).contiguous() for name, u in folded.items()}
    A = {name: u.A.to(dtype or u.A.dtype).contiguous() for name, u in folded.items()}
    return AdapterWeights((Block(B, 1.0, tensors=A),))


def concat_adapters(members: Sequence[AdapterWeights], weights: Sequence[float]) -> AdapterWeights:
    """The exact weighted sum of adapters: every block, its scaling times the weight.

    Members may update different modules; ranks add where they meet.
    Raises:
        ValueError: no members, or not one weight per member.
        InvalidInput: a member is routed.
    """
    if not members or len(members) != len(weights):
        raise ValueError(f"got {len(members)} members and {len(weights)} weights")
    for member in members:
        member.check_single()
    return AdapterWeights(
        tuple(
            replace(block, scaling=block.scaling * float(w))
            for member, w in zip(members, weights, strict=True)
            for block in member.blocks
        )
    )


def routed_adapter(members: Sequence[AdapterWeights], router: Router) -> AdapterWeights:
    """The members side by side, each with its own blocks as they are, and their router.

    Raises:
        ValueError: not the members that the router knows.
        InvalidInput: a member is routed itself.
    """
    for member in members:
        member.check_single()
    blocks = tuple(block for member in members for block in member.blocks)
    return AdapterWeights(blocks, router, tuple(len(m.blocks) for m in members))
