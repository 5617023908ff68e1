"""magnitude: each member's largest entries, then their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence

from lori_manager.engine.weights import AdapterWeights
from lori_manager.merging.entries import keep_largest, merge_entries, weighted_sum
from lori_manager.merging.methods import DEFAULTS, MergeOptions, merge_methods


@merge_methods.register(
    "magnitude",
    source="arXiv:2306.01708, its trimming alone",
    identity=False,
    ordered=False,
    options=("max_rank", "space", "density"),
)
def merge_magnitude(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    options: MergeOptions = DEFAULTS,
) -> AdapterWeights:
    """sum_t weights[t] * trim(delta_t): trim keeps a share of entries, the largest.

    Options: `density` is the share kept, per member and module; `space` says whose entries:
    "core" (the members' matrices in their shared frame; the result is exact) or "full" (the
    dense updates; the result is kept as factors of rank `max_rank`, by default the sum of the
    members' ranks, and its relative error is logged).

    Differs from PEFT's `magnitude_prune`, which trims A and B apart: the product of trimmed
    factors is not the trimmed update. On dense updates the two agree (the count is rounded
    here, cut off there). One adapter at weight 1 returns itself only at density 1. The order
    of the members does not matter but for rounding.
    """
    return merge_entries("magnitude", members, weights, options, keep_largest, weighted_sum)
