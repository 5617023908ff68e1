"""ties: trim each member, elect a sign for each entry, average the members that have it."""

from __future__ import annotations

from collections.abc import Sequence

from lori_manager.engine.weights import AdapterWeights
from lori_manager.merging.entries import elected_mean, keep_largest, merge_entries
from lori_manager.merging.methods import DEFAULTS, MergeOptions, merge_methods


@merge_methods.register(
    "ties",
    source="arXiv:2306.01708",
    identity=False,
    ordered=False,
    options=("max_rank", "space", "density"),
)
def merge_ties(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    options: MergeOptions = DEFAULTS,
) -> AdapterWeights:
    """lambda * sum of w_t x_t / sum of |w_t|, over members whose w_t x_t has the elected sign.

    x_t are the entries of update t trimmed to the `density` largest; the elected sign is
    that of sum_t w_t x_t; lambda, the paper's scale of the result, is sum_t |w_t| over all
    members. So weights 1/T give the paper's TIES at lambda 1, any equal weights w give it
    at lambda T w, and members that all agree give the plain weighted sum.

    Options: `density` and `space` ("core": the members' matrices in their shared frame, the
    result exact; "full": the dense updates, the result kept as factors of rank `max_rank`,
    by default the sum of the members' ranks, and its relative error logged).

    Differs: the paper has no weights. PEFT trims A and B apart, elects the sign without the
    weights and divides by the number of agreeing members, so that at equal weights w its
    result on dense updates is 1/T of this one; mergekit divides by the sum of weights and
    has no lambda by default. Where the members cancel no sign is elected and the entry is 0
    (PEFT and mergekit then take the positive ones). The count of kept entries is rounded.
    One adapter at weight 1 returns itself only at density 1. The order of the members does
    not matter but for rounding.
    """
    return merge_entries("ties", members, weights, options, keep_largest, elected_mean)
