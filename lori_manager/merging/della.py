"""della: drop small entries more often than large ones, then elect signs and average."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lori_manager.engine.weights import AdapterWeights
from lori_manager.merging.entries import Blocks, Matrix, elected_mean, merge_entries
from lori_manager.merging.methods import DEFAULTS, MergeOptions, merge_methods

# How far the probability of an entry to be kept goes to either side of the density.
EPSILON = 0.15


@merge_methods.register(
    "della",
    source="arXiv:2406.11617",
    identity=False,
    ordered=False,
    options=("max_rank", "space", "density", "seed"),
)
def merge_della(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    options: MergeOptions = DEFAULTS,
) -> AdapterWeights:
    """MAGPRUNE, then sign election and the mean of the agreeing members, as in `ties`.

    MAGPRUNE keeps an entry with a probability that grows with the rank of its magnitude
    within its row, evenly from density - epsilon (the smallest) to density + epsilon (the
    largest), and divides it by that probability: before the election the expectation over
    seeds is the update. epsilon is half the paper's window: 0.15, or less where that would
    come closer than half-way to 0 or 1. Draws are seeded as in `dare`; weights enter as in
    `ties`: 1/T each give the paper's method at lambda 1.

    Options: `density`, `seed` and `space` ("core": entries, and rows, of the members'
    matrices in their shared frame, the result exact; "full": of the dense updates, the
    result kept as factors of rank `max_rank`, by default the sum of the members' ranks,
    and its relative error logged).

    Differs: probabilities are spread as in the authors' code, from one end of the window to
    the other, where the paper's formula stops one step short; mergekit's `della` rescales by
    a norm instead; no sign is elected where members cancel. One adapter at weight 1 returns
    itself only at density 1. The order of the members does not matter but for rounding.
    """
    return merge_entries("della", members, weights, options, keep_by_rank, elected_mean)


def keep_by_rank(matrix: Matrix, density: float) -> Blocks:
    """Each entry over its probability with that probability, else zero."""
    if density == 1:
        return matrix.blocks
    epsilon = min(EPSILON, density / 2, (1 - density) / 2)
    columns = matrix.shape[1]

    def blocks() -> Iterator[Tensor]:
        draws = matrix.draws()
        steps = torch.linspace(density - epsilon, density + epsilon, columns)
        if columns == 1:
            steps = torch.tensor([density])
        for block in matrix.blocks():
            smallest_first = block.abs().argsort(dim=1, stable=True)
            spread = steps.to(block).expand_as(block)
            chance = torch.empty_like(block).scatter_(1, smallest_first, spread)
            del smallest_first
            drawn = torch.from_numpy(draws.random(tuple(block.shape), dtype=np.float32))
            dropped = drawn.to(block.device) >= chance
            del drawn
            yield chance.reciprocal_().mul_(block).masked_fill_(dropped, 0.0)

    return blocks
