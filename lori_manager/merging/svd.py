"""svd: the weighted sum, cut to the best update of a given rank."""

from __future__ import annotations

from collections.abc import Sequence

from lori_manager.engine.update import LowRankUpdate, concat_updates
from lori_manager.engine.weights import AdapterWeights
from lori_manager.merging.methods import DEFAULTS, MergeOptions, merge_methods, module_by_module


@merge_methods.register(
    "svd", source="Eckart and Young 1936", identity=True, ordered=False, options=("max_rank",)
)
def merge_svd(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    options: MergeOptions = DEFAULTS,
) -> AdapterWeights:
    """sum_t weights[t] * delta_t at `max_rank`, by default the largest member's rank.

    Acts on whole updates, through the QR factors of their stacked A and B: the same best
    approximation as an SVD of the dense sum (PEFT's `svd`), without ever making it. One
    adapter at weight 1 returns itself; the order of the members does not matter but for
    rounding.
    """
    rank = options.max_rank or max((m.rank for m in members), default=1)
    if len(members) == len(weights) == 1 and weights[0] == 1 and members[0].rank <= rank:
        return members[0]

    def merge(_: str, updates: list[LowRankUpdate], shares: list[float]) -> LowRankUpdate:
        return concat_updates(updates, shares)

    return module_by_module(members, weights, merge, rank)
