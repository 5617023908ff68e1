"""wudi: the update that answers each member's own directions as that member does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lori_manager.engine.decompose import svd
from lori_manager.engine.update import LowRankUpdate
from lori_manager.engine.weights import AdapterWeights
from lori_manager.merging.entries import shared_frame, single
from lori_manager.merging.methods import DEFAULTS, MergeOptions, merge_methods, module_by_module


@merge_methods.register(
    "wudi", source="arXiv:2503.08099", identity=True, ordered=False, options=("max_rank",)
)
def merge_wudi(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    options: MergeOptions = DEFAULTS,
) -> AdapterWeights:
    """The least-norm minimiser of sum_t |w_t| / |delta_t|^2 * |(D - sign(w_t) delta_t) delta_t'|^2.

    The rows of an update span about the inputs that it was trained on, so they stand in for
    data: D shall act on them as delta_t does. The result is D times sum_t |w_t| over all
    members, so that equal weights 1/T give the paper's objective unscaled, and one adapter
    at weight w gives w times itself.

    Acts on whole updates, through their shared frame, which is exact: with delta_t = U M_t V,
    U and V orthonormal, the part of D outside the rows of V changes no term, the part outside
    the columns of U only adds to them, and for D = U M V every term is |(M - M_t) M_t'|^2.
    There it is an ordinary least-squares problem, solved in float64 by an SVD.

    Differs: the paper goes 300 steps of Adam (rate 1e-5) from sum_t delta_t towards this
    minimum and stops before it, where the result depends on the scale of the weights; and it
    has no weights. At the minimum, members whose rows are nearly parallel but disagree can
    make D larger than any of them. `max_rank` cuts the result to its best update of that
    rank. One adapter at weight 1 returns itself; the order of the members does not matter
    but for rounding.
    """
    alone = len(members) == len(weights) == 1 and weights[0] == 1
    if alone and (options.max_rank is None or members[0].rank <= options.max_rank):
        return members[0]
    whole = float(sum(abs(w) for w in weights))

    def merge(_: str, updates: list[LowRankUpdate], shares: list[float]) -> LowRankUpdate:
        frame = shared_frame(updates)
        rows, targets = [], []  # D @ rows = targets, as nearly as can be
        for core, w in zip(frame.cores, shares, strict=True):
            norm = torch.linalg.matrix_norm(core)
            if norm > 0:
                row = core.t() * (abs(w) ** 0.5 / norm)
                rows.append(row)
                targets.append(core @ row if w > 0 else -(core @ row))
        if not rows:
            return updates[0].zero()
        left, values, right = svd(torch.cat(rows, dim=1))
        count = int((values > 1e-10 * values[0]).sum())
        solved = torch.cat(targets, dim=1) @ right[:count].t() / values[:count]
        return single(frame.update(whole * solved @ left[:, :count].t()))

    return module_by_module(members, weights, merge, options.max_rank)
