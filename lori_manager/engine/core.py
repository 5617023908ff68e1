"""Several updates of one matrix in one small frame, and the best update of a given rank.

With stacked factors B = [B_1 .. B_T] = U R and A' = [A_1' .. A_T'] = V' S, both by QR, every
update is U M_t V with M_t of T r x T r at most: what is linear or a singular value
decomposition needs M_t alone. Lossless. Source: Core Space, arXiv:2509.17786.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lori_manager.engine.decompose import qr, svd
from lori_manager.engine.update import LowRankUpdate


@dataclass(frozen=True)
class Core:
    """Updates as delta_t = U @ cores[t] @ V.

    Shapes: U (out_features, p) with orthonormal columns, V (q, in_features) with
    orthonormal rows, cores (T, p, q); p and q are at most the sum of the ranks.
    """

    U: Tensor
    V: Tensor
    cores: Tensor

    def update(self, core: Tensor, rank: int | None = None) -> LowRankUpdate:
        """U @ core @ V as factors of scaling 1, of the best rank `rank` if one is given."""
        if rank is None or rank >= min(core.shape):
            if core.shape[0] <= core.shape[1]:
                return LowRankUpdate(core @ self.V, self.U)
            return LowRankUpdate(self.V, self.U @ core)
        return self._of_rank(rank, *svd(core))

    def _of_rank(self, rank: int, left: Tensor, values: Tensor, right: Tensor) -> LowRankUpdate:
        root = values[:rank].sqrt()
        return LowRankUpdate(
            root[:, None] * (right[:rank] @ self.V), (self.U @ left[:, :rank]) * root
        )


def core_form(updates: Sequence[LowRankUpdate], dtype: torch.dtype = torch.float32) -> Core:
    """The updates in one frame.

    Args:
        updates: of one matrix; at least one. Not modified.
        dtype: of the result.
    Raises:
        ValueError: none, or shapes that differ.
    """
    if not updates or len({u.shape for u in updates}) > 1:
        raise ValueError(f"expected updates of one matrix, got {[u.shape for u in updates]}")
    A = torch.cat([u.A.to(dtype) for u in updates])
    B = torch.cat([u.B.to(dtype) * u.scaling for u in updates], dim=1)
    U, R = qr(B)
    V, S = qr(A.t())
    ends = torch.tensor([0, *(u.rank for u in updates)]).cumsum(0).tolist()
    cores = [R[:, a:b] @ S[:, a:b].t() for a, b in pairwise(ends)]
    return Core(U, V.t(), torch.stack(cores))


def truncated(update: LowRankUpdate, rank: int) -> tuple[LowRankUpdate, float]:
    """The best update of that rank, and its relative error in the Frobenius norm.

    Returns the update itself and 0 where its rank is no larger.
    """
    if update.rank <= rank:
        return update, 0.0
    core = core_form([update])
    left, values, right = svd(core.cores[0])
    squares = values.square().cpu()
    whole, lost = float(squares.sum()), float(squares[rank:].sum())
    best = core._of_rank(rank, left, values, right)
    return best, (lost / whole) ** 0.5 if whole else 0.0


def truncated_on_inputs(update: LowRankUpdate, root: Tensor, rank: int) -> LowRankUpdate:
    """The update of that rank that errs least on inputs x, E ||(D - D_k) x||^2.

    Args:
        update: (out_features, in_features) as factors.
        root: lower triangular L (in_features, in_features) with E[x x'] = L L'.
        rank: of the result; an update of no larger rank is returned as it is.
    """
    if update.rank <= rank:
        return update
    A = update.A.to(root.dtype) @ root
    core = core_form([LowRankUpdate(A, update.B, update.scaling)], root.dtype)
    best = core.update(core.cores[0], rank)
    back = torch.linalg.solve_triangular(root, best.A, upper=False, left=False)
    return LowRankUpdate(back.to(update.A.dtype), best.B.to(update.B.dtype))
