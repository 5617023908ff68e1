"""knots: TIES in the frame of a joint SVD of the updates laid side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lori_manager.engine.core import core_form
from lori_manager.engine.decompose import left_singular
from lori_manager.engine.update import LowRankUpdate
from lori_manager.engine.weights import AdapterWeights
from lori_manager.merging.entries import Matrix, elected_mean, keep_largest
from lori_manager.merging.methods import DEFAULTS, MergeOptions, merge_methods, module_by_module
from lori_manager.merging.spectrum import counted

# The S V_t', each (k, in_features) float32, and the members' weights -> the merged one.
Rule = Callable[[list[Tensor], list[float]], Tensor]


def in_joint_frame(
    updates: Sequence[LowRankUpdate], weights: Sequence[float], rule: Rule
) -> LowRankUpdate:
    """U rule(S V_1', .., S V_T') where [delta_1 .. delta_T] = U S [V_1' .. V_T'].

    U S and the V_t come from the SVD of the cores side by side: the frame's V is the same
    for all of them and has orthonormal rows. Rank k: that of the updates side by side.

    Args:
        updates: of one matrix; at least one. Not modified.
        weights: one per update, for `rule`.
    """
    form = core_form(updates, torch.float64)
    cores = torch.cat(list(form.cores), 1)
    left, values = left_singular(cores)
    k = max(counted(values), 1)
    scaled = (left[:, :k].mT @ cores).chunk(len(updates), 1)
    merged = rule([(one @ form.V).float() for one in scaled], list(weights))
    return LowRankUpdate(merged, (form.U @ left[:, :k]).float())


@merge_methods.register(
    "knots",
    source="arXiv:2410.19735",
    identity=False,
    ordered=False,
    options=("max_rank", "density"),
)
def merge_knots(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    options: MergeOptions = DEFAULTS,
) -> AdapterWeights:
    """KnOTS-TIES: the updates as U S [V_1' .. V_T'], TIES on the S V_t', mapped back with U.

    Acts on the entries of the S V_t', each (rank of all, in_features), `density` of each
    kept; signs and weights as `ties` has them. One adapter at weight 1 returns itself only
    at density 1. The order of the members does not matter but for rounding: U is that of
    sum_t delta_t delta_t', up to signs, which TIES does not see. With the weighted sum in
    place of TIES it would be `concat`.

    Differs from the paper's code, which trims over all modules of a model at once, scales
    by one number instead of weights, and drops singular values up to 1e-5: here one module
    at a time, and 1e-5 of the largest. The paper's text speaks of merging the V_t; its code,
    in the configurations it comes with, and this trim the S V_t. Members of weight 0 take
    no part in the frame.
    """
    whole = float(sum(abs(w) for w in weights))

    def trimmed(one: Tensor) -> Tensor:
        matrix = Matrix((one.shape[0], one.shape[1]), lambda: iter([one]), lambda: 0)
        return next(keep_largest(matrix, options.density)())

    def ties(parts: list[Tensor], shares: list[float]) -> Tensor:
        return elected_mean([trimmed(one) for one in parts], shares, whole)

    def merge(_: str, updates: list[LowRankUpdate], shares: list[float]) -> LowRankUpdate:
        return in_joint_frame(updates, shares, ties)

    return module_by_module(members, weights, merge, options.max_rank)
