"""concat: the exact weighted sum of updates, by putting factors side by side."""

from __future__ import annotations

from collections.abc import Sequence

from lori_manager.engine.weights import AdapterWeights, concat_adapters
from lori_manager.merging.methods import DEFAULTS, MergeOptions, merge_methods, module_by_module


@merge_methods.register(
    "concat",
    source="arXiv:2504.07448, section 3.3",
    identity=True,
    ordered=False,
    options=("max_rank",),
)
def merge_concat(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    options: MergeOptions = DEFAULTS,
) -> AdapterWeights:
    """sum_t weights[t] * delta_t, exactly; ranks add.

    Acts on whole updates. One adapter at weight 1 returns itself; the order of the
    members does not matter but for rounding. Each member's A stays regenerable and
    its B sparse. With `max_rank` below the sum of ranks: the best update of that rank,
    dense, as `svd` gives it.
    """
    merged = concat_adapters(members, weights)
    if options.max_rank is None or merged.rank <= options.max_rank:
        return merged
    return module_by_module([merged], [1.0], lambda _, updates, __: updates[0], options.max_rank)
