"""What the spectral methods share: which directions count, and how tasks are joined in a core.

Factors come in float32. Frames and singular vectors are found in float64: a direction that
is only rounding must not pass for one of the update's own, since most of these methods
would then give it a full share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lori_manager.engine.core import core_form
from lori_manager.engine.decompose import svd
from lori_manager.engine.update import LowRankUpdate
from lori_manager.merging.entries import single

# Singular values below this share of the largest are rounding of float32 factors.
NEGLIGIBLE = 1e-5

# Cores (T, p, q) in float64, weights (T,) -> the merged core (p, q) and its rank.
CoreRule = Callable[[Tensor, Tensor], tuple[Tensor, int]]


def counted(values: Tensor, largest: Tensor | None = None) -> int:
    """How many of these descending singular values are more than rounding.

    `largest` is what they are held against; None takes the first of them.
    """
    if not values.numel():
        return 0
    top = values[0] if largest is None else largest
    return int(((values > NEGLIGIBLE * top) & (values > 0)).sum())


def isometry(matrix: Tensor) -> Tensor:
    """U V' of the matrix' own SVD U S V': the nearest with orthonormal columns or rows.

    Of a matrix that lacks rank only the directions that it has: completing U V' there, as
    a plain SVD does, would add arbitrary ones with the weight of the rest.
    """
    left, values, right = svd(matrix)
    n = counted(values)
    nearest: Tensor = left[:, :n] @ right[:n]
    return nearest


def joined_in_core(
    updates: Sequence[LowRankUpdate], weights: Sequence[float], rule: CoreRule
) -> LowRankUpdate:
    """U M V where `rule` makes M out of the cores; exact for what sees singular triples only.

    With orthonormal U and V the SVD of U M_t V is that of M_t, taken there.
    Args:
        updates: of one matrix; at least one. Not modified.
        weights: one per update, for `rule`.
    """
    form = core_form(updates, torch.float64)
    core, rank = rule(form.cores, form.cores.new_tensor(weights))
    return single(form.update(core, max(rank, 1)))
