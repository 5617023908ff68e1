"""core: TIES on small cores between reference bases of the stacked A's and B's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lori_manager.engine.weights import AdapterWeights
from lori_manager.merging.entries import elected_mean, keep_largest, merge_entries
from lori_manager.merging.methods import DEFAULTS, MergeOptions, merge_methods


@merge_methods.register("core", source="arXiv:2509.17786", identity=False, ordered=False,
                        options=("max_rank", "density"))  # fmt: skip
def merge_core(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    options: MergeOptions = DEFAULTS,
) -> AdapterWeights:
    """Core Space: delta_t = U M_t V in bases from the stacked factors, TIES on the M_t.

    U: left singular vectors of [B_1 .. B_T]; V: right ones of the stacked A's; lossless
    (entries.shared_frame). Acts on the entries of the M_t, `density` of each kept; signs and
    weights as `ties` has them, which in space "core" does the same: this name is for the
    paper's method whatever `space` says. One adapter at weight 1 returns itself only at
    density 1. The order of the members does not matter but for rounding; how a member's size
    is split between its A and B does, as in the paper (the scaling counts with B).

    Differs from the paper's code: weights instead of one scale; bases without directions
    that no member has (of a shared A, of equal members), so that `density` is a share of
    entries that can be other than 0. Members of weight 0 take no part in the bases.
    """
    return merge_entries(
        "core", members, weights, replace(options, space="core"), keep_largest, elected_mean
    )
