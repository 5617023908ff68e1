"""Router: which member of a routed adapter an input is for, in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FOLDS = 5
# The estimate alone makes shares too sure of themselves: half of every correlation is left
# out at least, which on real tasks is as accurate and calls its mistakes less certain.
LEAST_SHRINKAGE = 0.5
# Of the mean variance, added to every feature's own: one that never varies on the few
# prompts there are must not decide alone.
FLOOR = 1e-3
_WORST = -20.0  # the log share from which one prompt's mistake counts no more


@dataclass(frozen=True)
class Router:
    """A linear discriminant over features of a prompt.

    Attributes:
        reads: name of the base's module whose input the features are made from.
        weights: (members, features) float32.
        bias: (members,) float32.
        held_out: held_out[i][j] of member i's prompts went to member j by routers that
            were fitted without them.
    """

    reads: str
    weights: Tensor
    bias: Tensor
    held_out: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        members = len(self.bias)
        if self.weights.ndim != 2 or self.bias.shape != self.weights.shape[:1]:
            raise ValueError(
                f"expected weights (members, features) and bias (members,), got "
                f"{tuple(self.weights.shape)} and {tuple(self.bias.shape)}"
            )
        if [len(row) for row in self.held_out] != [members] * members:
            raise ValueError(f"`held_out` must be a table of {members} by {members}")

    @property
    def members(self) -> int:
        """How many there are to choose from."""
        return len(self.bias)

    @property
    def accuracy(self) -> float:
        """Share of the held-out prompts that went to their own member."""
        right = sum(row[i] for i, row in enumerate(self.held_out))
        return right / max(sum(map(sum, self.held_out)), 1)

    def shares(self, features: Tensor) -> Tensor:
        """(rows, features) -> the probability of each member, (rows, members) float64."""
        return self._scores(features).softmax(1)

    def choose(self, features: Tensor) -> Tensor:
        """(rows, features) -> the likeliest member's number, (rows,) int64."""
        return self._scores(features).argmax(1)

    def report(self) -> dict[str, Any]:
        """What is kept beside an adapter, as plain JSON."""
        return {
            "accuracy": self.accuracy,
            "reads": self.reads,
            "held_out": [list(row) for row in self.held_out],
        }

    def _scores(self, features: Tensor) -> Tensor:
        weights, bias = (t.to(features.device).double() for t in (self.weights, self.bias))
        return features.double() @ weights.t() + bias


def fit_router(
    features: Sequence[Tensor], reads: str, priors: Sequence[float] | None = None
) -> tuple[Router, float]:
    """The router of members with these features.

    Args:
        features: for each member (rows, features), at least two rows. Not modified.
        reads: what they were made from, kept with the router.
        priors: how often each member is wanted, positive; equal by default.
    Returns:
        The router, on the CPU, and the mean log share that held-out prompts gave to
        their own member, to compare routers by.
    Raises:
        ValueError: fewer than two members, a member with fewer than two rows, priors
            that are not one positive number each.
    """
    priors = [1.0] * len(features) if priors is None else list(priors)
    if len(features) < 2 or min(map(len, features)) < 2:
        raise ValueError("a router needs two members or more, with two rows or more each")
    if len(priors) != len(features) or not min(priors) > 0:
        raise ValueError(f"`priors` must be one positive number a member, got {priors}")
    held_out, told = _held_out(features, priors)
    weights, bias = discriminant(features, priors)
    return Router(reads, weights.float().cpu(), bias.float().cpu(), held_out), told


def discriminant(
    features: Sequence[Tensor], priors: Sequence[float], shrinkage: float | None = None
) -> tuple[Tensor, Tensor]:
    """Weights and bias of the linear discriminant, float64 on the features' device.

    Members are taken for Gaussians with means m_t and one covariance
    (1 - g) S + g D, S the mean outer product of what is left without the means and D its
    diagonal (plus `FLOOR` of its mean). w_t = inverse (m_t - m), m the mean of the means;
    the shares of x are softmax(w_t x + b_t).

    Args:
        features: for each member (rows, features).
        priors: one positive number a member; only their ratios count.
        shrinkage: g in (0, 1]; by default what Schaefer and Strimmer (2005,
            10.2202/1544-6115.1175) estimate for correlations, at least `LEAST_SHRINKAGE`.
    """
    rows = [f.double() for f in features]
    means = torch.stack([f.mean(0) for f in rows])
    center = means.mean(0)
    inner = torch.cat([f - mean for f, mean in zip(rows, means, strict=True)])
    variance = inner.square().mean(0)
    least = FLOOR * variance.mean() + 1e-8 * means.square().mean() + torch.finfo(torch.double).tiny
    scale = (variance + least).sqrt()
    z = inner / scale
    gram = z @ z.t()
    g = _shrinkage(z, gram) if shrinkage is None else shrinkage
    # (g I + c z'z)^-1 = (I - c z' (g I + c z z')^-1 z) / g: rows are fewer than features.
    c = (1 - g) / len(z)
    kernel = c * gram
    kernel.diagonal().add_(g)
    aims = (means - center) / scale
    inside = torch.linalg.solve(kernel, z @ aims.t())
    weights = (aims - c * (z.t() @ inside).t()) / g / scale
    prior = torch.tensor(priors, dtype=torch.double, device=weights.device)
    bias = (prior / prior.sum()).log() - (weights * (means + center) / 2).sum(1)
    return weights, bias


def _shrinkage(z: Tensor, gram: Tensor) -> float:
    """How uncertain the correlations of z (rows, features) are against how large they are.

    Both sums over pairs of features come from `gram`, z z': pairs are far more than rows.
    """
    n = len(z)
    own = float(z.square().mean(0).square().sum())
    large = float((gram / n).square().sum()) - own
    fourth = float(z.square().sum(1).square().mean() - z.pow(4).mean(0).sum())
    if large <= 0:
        return 1.0
    return min(max((fourth - large) / (n - 1) / large, LEAST_SHRINKAGE), 1.0)


def _held_out(
    features: Sequence[Tensor], priors: Sequence[float]
) -> tuple[tuple[tuple[int, ...], ...], float]:
    """The table of `Router.held_out`, and the mean log share of the right member."""
    folds = min(FOLDS, *map(len, features))
    table = [[0] * len(features) for _ in features]
    told: list[float] = []
    for fold in range(folds):
        kept = [f[torch.arange(len(f), device=f.device) % folds != fold] for f in features]
        weights, bias = discriminant(kept, priors)
        for member, f in enumerate(features):
            scores = f[fold::folds].double() @ weights.t() + bias
            for went in scores.argmax(1).tolist():
                table[member][went] += 1
            told += scores.log_softmax(1)[:, member].clamp_min(_WORST).tolist()
    return tuple(map(tuple, table)), math.fsum(told) / len(told)
