"""The leading singular triples of a weight, the same whenever they are asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lori_manager.engine.decompose import svd

FULL = "full"
RANDOMISED = "randomised"

_FULL_SIDE = 1024  # of the shorter side: up to it a full SVD takes about a second
_OVERSAMPLING = 16
_ITERATIONS = 4


@dataclass(frozen=True)
class Spectrum:
    """The largest singular values of W with their vectors: W V = U diag(s).

    Shapes: U (out_features, rank), s (rank,) from the largest on, V (in_features, rank), all
    float32; the columns of U and of V are orthonormal.

    Attributes:
        energy: the share of ||W||_F^2 that these values hold, in [0, 1].
    """

    U: Tensor
    s: Tensor
    V: Tensor
    energy: float


def choose_method(shape: tuple[int, int], rank: int) -> str:
    """`FULL` for a small matrix or where much of it is wanted, else `RANDOMISED`."""
    short = min(shape)
    return FULL if short <= _FULL_SIDE or rank > short // 4 else RANDOMISED


def top_svd(W: Tensor, rank: int, method: str) -> Spectrum:
    """The `rank` leading singular triples.

    The sign that an SVD leaves open is fixed: the entry of largest magnitude in each column
    of V is positive. So one machine gives one result, bit for bit.

    Args:
        W: (out_features, in_features), any float dtype and device. Not modified.
        rank: in 1..min(W.shape).
        method: `FULL`, or `RANDOMISED`: four power iterations over `rank` + 16 random directions
            of a fixed seed (arXiv:0909.4061), whose smallest values are a little low.
    Raises:
        ValueError: a rank or a method that there is not.
    """
    if not 1 <= rank <= min(W.shape) or method not in (FULL, RANDOMISED):
        raise ValueError(f"expected a rank in 1..{min(W.shape)} and a method, got {rank}, {method}")
    wide = W.detach().float()
    if method == FULL:
        U, s, Vh = svd(wide)
        V = Vh.mT
    else:
        width = min(rank + _OVERSAMPLING, *W.shape)
        devices = [wide.device] if wide.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            U, s, V = torch.svd_lowrank(wide, q=width, niter=_ITERATIONS)
    U, s, V = U[:, :rank], s[:rank], V[:, :rank]
    largest = V.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(V.gather(0, largest) < 0, -1.0, 1.0)
    total = float(wide.double().square().sum())
    energy = min(1.0, float(s.double().square().sum()) / total) if total else 1.0
    return Spectrum(
        (U * signs).contiguous(), s.clone().contiguous(), (V * signs).contiguous(), energy
    )
