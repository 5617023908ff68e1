"""dare: drop entries at random, rescale what is left, then the weighted sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lori_manager.engine.weights import AdapterWeights
from lori_manager.merging.entries import Blocks, Matrix, merge_entries, weighted_sum
from lori_manager.merging.methods import DEFAULTS, MergeOptions, merge_methods


@merge_methods.register(
    "dare",
    source="arXiv:2311.03099",
    identity=False,
    ordered=False,
    options=("max_rank", "space", "density", "seed"),
)
def merge_dare(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    options: MergeOptions = DEFAULTS,
) -> AdapterWeights:
    """sum_t weights[t] * drop(delta_t) / density: an entry is kept with that probability.

    The expectation over seeds is the exact weighted sum. Draws are seeded by `seed`, the
    module and the member's own content: the other members and their order have no part in
    them, and equal members drop the same entries.

    Options: `density`, `seed` and `space` ("core": entries of the members' matrices in their
    shared frame, the result exact; "full": of the dense updates, the result kept as factors
    of rank `max_rank`, by default the sum of the members' ranks, and its relative error
    logged: most of what dropping adds is of full rank and goes with the rest of the rank).

    Differs from PEFT's `dare_linear`, which drops entries of A and of B apart and rescales
    both, so that what it keeps of an update is not a sample of its entries. One adapter at
    weight 1 returns itself only at density 1. The order of the members does not matter but
    for rounding.
    """
    return merge_entries("dare", members, weights, options, keep_at_random, weighted_sum)


def keep_at_random(matrix: Matrix, density: float) -> Blocks:
    """Each entry over `density` with that probability, else zero."""
    if density == 1:
        return matrix.blocks

    def blocks() -> Iterator[Tensor]:
        draws = matrix.draws()
        for block in matrix.blocks():
            chance = torch.from_numpy(draws.random(tuple(block.shape), dtype=np.float32))
            dropped = chance.to(block.device) >= density
            del chance
            yield (block / density).masked_fill_(dropped, 0.0)

    return blocks
