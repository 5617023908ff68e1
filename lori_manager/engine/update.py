"""LowRankUpdate: what one adapter adds to one weight matrix, kept as factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRankUpdate:
    """delta = scaling * B @ A, never formed unless asked for.

    Shapes: A (rank, in_features), B (out_features, rank). arXiv:2106.09685.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ValueError(
                "expected A (rank, in_features) and B (out_features, rank), got "
                f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)}"
            )

    @property
    def rank(self) -> int:
        """The inner dimension; the update's true rank may be lower."""
        return int(self.A.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the matrix that it updates."""
        return int(self.B.shape[0]), int(self.A.shape[1])

    def delta(self) -> Tensor:
        """The dense update, (out_features, in_features), in B's dtype."""
        return self.scaling * (self.B @ self.A.to(self.B.dtype))

    def folded(self) -> LowRankUpdate:
        """The same update with the scaling multiplied into B."""
        return LowRankUpdate(self.A, self.B * self.scaling, 1.0)

    def zero(self) -> LowRankUpdate:
        """The zero update of the same matrix, of rank 1."""
        return LowRankUpdate(torch.zeros_like(self.A[:1]), torch.zeros_like(self.B[:, :1]))

    def padded(self, rank: int) -> LowRankUpdate:
        """The same update with zero rows of A and zero columns of B up to `rank`."""
        missing = rank - self.rank
        if missing < 0:
            raise ValueError(f"cannot pad rank {self.rank} to {rank}")
        if missing == 0:
            return self
        A = torch.cat([self.A, self.A.new_zeros(missing, self.A.shape[1])])
        B = torch.cat([self.B, self.B.new_zeros(self.B.shape[0], missing)], dim=1)
        return LowRankUpdate(A, B, self.scaling)


@dataclass(frozen=True)
class Rescaled:
    """diag(rows) (W + update) diag(columns): what a weight becomes, where that is no sum.

    Shapes: rows (out_features,), columns (in_features,); None is ones, or no update.

    Attributes:
        bias: whether `rows` scale the layer's bias too.
    """

    shape: tuple[int, int]
    update: LowRankUpdate | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        sizes = [(self.rows, self.shape[0]), (self.columns, self.shape[1])]
        if any(t is not None and tuple(t.shape) != (n,) for t, n in sizes) or (
            self.update is not None and self.update.shape != self.shape
        ):
            raise ValueError(f"rows, columns or update do not fit a weight of {self.shape}")


Change = LowRankUpdate | Rescaled


def concat_updates(updates: Sequence[LowRankUpdate], weights: Sequence[float]) -> LowRankUpdate:
    """The exact weighted sum of updates, by putting their factors side by side.

    Args:
        updates: of one matrix; at least one. Not modified.
        weights: one per update.
    Returns:
        sum_t weights[t] * updates[t].delta(), of rank sum_t rank_t and scaling 1.
    Raises:
        ValueError: none, unequal counts, or shapes that differ.
    """
    if not updates or len(updates) != len(weights):
        raise ValueError(f"got {len(updates)} updates and {len(weights)} weights")
    if len({u.shape for u in updates}) > 1:
        raise ValueError(f"updates of different matrices: {sorted({u.shape for u in updates})}")
    A = torch.cat([u.A for u in updates])
    B = torch.cat([u.B * (w * u.scaling) for u, w in zip(updates, weights, strict=True)], dim=1)
    return LowRankUpdate(A, B, 1.0)
