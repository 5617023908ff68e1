"""One module's regression: the update that answers merged inputs as the members answer theirs.

With x_t what member t's own model gives the module, z_t what the merged model gives it and
y_t = (W + D_t) x_t: min over D of sum_t w_t E ||y_t - (W + D) z_t||^2. The normal equations
need the moments E[z z'] of the inputs, which modules that see the same input share, and for
each module E[(y - W z) z'].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lori_manager.engine.update import LowRankUpdate


class Moments:
    """sum_t w_t E[z z'] of the inputs of modules that see the same, (in_features, in_features)."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.sum = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._root: tuple[float, Tensor, float] | None = None

    def add(self, z: Tensor, share: Tensor) -> None:
        """Add inputs z (tokens, in_features) with a weight each, (tokens,)."""
        self.sum += (z.t() @ (z * share[:, None])).double()
        self._root = None

    def root(self, eps: float) -> tuple[Tensor, float]:
        """Lower triangular L with L L' = sum + e I, and e = `eps` times the mean diagonal."""
        if self._root is None or self._root[0] != eps:
            e = eps * float(self.sum.diagonal().mean()) or 1.0
            eye = torch.eye(len(self.sum), dtype=torch.float64, device=self.sum.device)
            self._root = (eps, torch.linalg.cholesky(self.sum + e * eye), e)
        return self._root[1:]


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

    def add(self, member: int, x: Tensor, z: Tensor, share: Tensor) -> None:
        """Add a member's inputs; what `Moments` were given too.

        Shapes: x (tokens, in_features) of its own model, z of the merged one, share (tokens,).
        """
        y = (x - z) @ self._W.float().t()
        for owner, B, A in zip(self._members, self._Bs, self._As, strict=True):
            if owner == member:
                y += (x @ A.t()) @ B.t()
        self._target += (y.t() @ (z * share[:, None])).double()

    def _solvable(self, eps: float) -> tuple[Tensor, Tensor]:
        """The right side and the root: directions that no input takes get the mean update."""
        root, e = self.moments.root(eps)
        B, A = torch.cat(self._Bs, dim=1).double(), torch.cat(self._As).double()
        return self._target + (B @ A) * (e / len(set(self._members))), root

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
