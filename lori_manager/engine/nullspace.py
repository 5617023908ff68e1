"""The directions that hold most of the inputs' energy, and A's part outside them."""

from __future__ import annotations

import torch
from torch import Tensor


def leading_directions(moments: Tensor, energy: float, known: Tensor | None = None) -> Tensor:
    """An orthonormal basis that holds a share of the inputs' energy, a known one widened.

    The directions added are the leading ones of what the known ones leave, as few as
    do: so the share is held of every task whose moments were given, not of their sum.

    Args:
        moments: (in_features, in_features), E[x x'] of a task's inputs. Not modified.
        energy: the share of its trace to hold, in [0, 1).
        known: (in_features, k) orthonormal columns; None is none. Not modified.
    Returns:
        (in_features, k') float64, k' >= k, whose first k columns span what `known` spans.
    Raises:
        ValueError: energy outside [0, 1).
    Source: GPM, arXiv:2103.09762, algorithm 2, as in InfLoRA, arXiv:2404.00228.
    """
    if not 0 <= energy < 1:
        raise ValueError(f"`energy` must be in [0, 1), got {energy}")
    G = moments.double()
    Q = G.new_zeros(len(G), 0) if known is None else known.to(G)
    left = outside(outside(G, Q).t(), Q)
    values, vectors = torch.linalg.eigh((left + left.t()) / 2)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    # What is still outside once the first 0, 1, 2, ... of them are in.
    rest = torch.cat([values.sum()[None], values.sum() - values.cumsum(0)])
    enough = (rest <= (1 - energy) * float(G.trace())).nonzero()
    count = min(int(enough[0]) if len(enough) else len(G), len(G) - Q.shape[1])
    if count == 0:
        return Q
    basis: Tensor = torch.linalg.qr(torch.cat([Q, vectors[:, :count]], dim=1))[0]
    return basis


def outside(rows: Tensor, Q: Tensor) -> Tensor:
    """Rows (n, in_features) without their parts in the span of Q (in_features, k)."""
    rows = rows.to(Q)
    # Twice: what rounding leaves of a large part is taken out by the second time.
    for _ in range(2):
        rows = rows - (rows @ Q) @ Q.t()
    return rows


def response(A: Tensor, moments: Tensor) -> float:
    """E ||A x||^2 of inputs with these second moments."""
    A = A.to(moments.device, torch.float64)
    return float(((A @ moments.double()) * A).sum())
