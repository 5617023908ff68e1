"""One module's regression: the update that answers merged inputs as the members answer theirs.

With x_t what member t's own model gives the module, z_t what the merged model gives it and
y_t = (W + D_t) x_t: min over D of sum_t w_t E ||y_t - (W + D) z_t||^2. The normal equations
need the moments E[z z'] of the inputs, which modules that see the same input share, and for
each module E[(y - W z) z'].

With a shrinkage s below 1 (RegMean, arXiv:2212.09849, equation 2 and section 3.3; IterIS,
arXiv:2411.15231, takes it over to cross moments) every M = E[x z'] or E[z z'] in them is
replaced by s M + (1 - s) diag(M).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lori_manager.engine.update import LowRankUpdate


class Moments:
    """sum_t w_t E[z z'] of the inputs of modules that see the same, (in_features, in_features)."""

    def __init__(self, size: int, device: torch.device, shrink: float = 1.0) -> None:
        """Begin with nothing summed; `shrink` is what multiplies entries off the diagonal."""
        self.shrink = shrink
        self.sum = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._root: tuple[float, Tensor, float] | None = None

    def add(self, z: Tensor, share: Tensor) -> None:
        """Add inputs z (tokens, in_features) with a weight each, (tokens,)."""
        self.sum += (z.t() @ (z * share[:, None])).double()
        self._root = None

    def root(self, eps: float) -> tuple[Tensor, float]:
        """Lower triangular L with L L' = sum, shrunk, + e I, and e = `eps` x mean diagonal."""
        if self._root is None or self._root[0] != eps:
            self._root = None
            self._root = (eps, *root_of(self.sum.clone(), eps, self.shrink))
        return self._root[1:]


def root_of(moments: Tensor, eps: float, shrink: float) -> tuple[Tensor, float]:
    """Lower triangular L with L L' = s M + (1 - s) diag(M) + e I, and e.

    Args:
        moments: M (in_features, in_features), float64. Overwritten: it may take gigabytes.
        eps: e against M's mean diagonal; where that is 0, e is 1.
        shrink: s, in [0, 1].
    """
    diagonal = moments.diagonal().clone()
    e = eps * float(diagonal.mean()) or 1.0
    if shrink != 1:
        moments *= shrink
    moments.diagonal().copy_(diagonal + e)
    return torch.linalg.cholesky(moments), e


@dataclass(frozen=True)
class Part:
    """One block of one member: whose it is, and its update of the module."""

    member: int
    update: LowRankUpdate


class LeastSquares:
    """The sums of one module, and their solutions.

    Shapes: W (out_features, in_features), frozen; of the parts B_i (out_features, rank_i) and
    A_i (rank_i, in_features).
    """

    def __init__(self, W: Tensor, parts: Sequence[Part], moments: Moments) -> None:
        """Begin with nothing summed."""
        self._W, self.moments = W, moments
        self._members = [p.member for p in parts]
        # Widened first: a stored bf16 times a scaling would be rounded again.
        self._Bs = [p.update.B.to(W.device, torch.float32) * p.update.scaling for p in parts]
        self._As = [p.update.A.to(W.device, torch.float32) for p in parts]
        self._target = torch.zeros(W.shape, dtype=torch.float64, device=W.device)
        # Member -> the diagonal of w_t E[x z'].
        self._cross = {p.member: torch.zeros_like(moments.sum[0]) for p in parts}
        self._others = torch.zeros_like(moments.sum[0])  # of members without this module

    def add(self, member: int, x: Tensor, z: Tensor, share: Tensor) -> None:
        """Add a member's inputs; what `Moments` were given too.

        Shapes: x (tokens, in_features) of its own model, z of the merged one, share (tokens,).
        """
        y = (x - z) @ self._W.float().t()
        for owner, B, A in zip(self._members, self._Bs, self._As, strict=True):
            if owner == member:
                y += (x @ A.t()) @ B.t()
        weighed = z * share[:, None]
        self._target += (y.t() @ weighed).double()
        if self.moments.shrink != 1:
            self._cross.get(member, self._others).add_((x * weighed).double().sum(0))

    def _solvable(self, eps: float) -> tuple[Tensor, Tensor]:
        """The right side and the root: directions that no input takes get the mean update."""
        root, e = self.moments.root(eps)
        B, A = torch.cat(self._Bs, dim=1).double(), torch.cat(self._As).double()
        target, shrink = self._target, self.moments.shrink
        if shrink != 1:
            cross = self._others + torch.stack(list(self._cross.values())).sum(0)
            along = self._W.double() * (cross - self.moments.sum.diagonal())
            for owner, own_B, own_A in zip(self._members, self._Bs, self._As, strict=True):
                along += own_B.double() @ (own_A.double() * self._cross[owner])
            target = shrink * target + (1 - shrink) * along
        return target + (B @ A) * (e / len(set(self._members))), root

    def re_aimed(self, eps: float) -> list[Tensor]:
        """The A' of each part with which the given B's do best, (rank, in_features) float32."""
        target, root = self._solvable(eps)
        pull = torch.linalg.pinv(torch.cat(self._Bs, dim=1).double(), rtol=1e-6) @ target
        found = torch.cholesky_solve(pull.t(), root).t().float()
        return list(torch.split(found, [len(A) for A in self._As]))

    def free(self, eps: float, rank: int | None) -> LowRankUpdate:
        """The update of that rank (None: the sum of the parts') that errs least, on the CPU."""
        target, root = self._solvable(eps)
        rank = min(rank or sum(len(A) for A in self._As), *target.shape)
        whole = torch.cholesky_solve(target.t(), root).t()
        on_inputs = whole @ root
        if len(whole) <= whole.shape[1]:
            left = torch.linalg.eigh(on_inputs @ on_inputs.t())[1][:, -rank:]
        else:
            right = torch.linalg.eigh(on_inputs.t() @ on_inputs)[1][:, -rank:]
            left = torch.linalg.qr(on_inputs @ right)[0]
        return LowRankUpdate((left.t() @ whole).float().cpu(), left.float().cpu())
