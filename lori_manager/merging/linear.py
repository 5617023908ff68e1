"""linear: the exact weighted sum at unchanged rank, for members that share one A."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lori_manager.engine import mask as masks
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.errors import InvalidInput
from lori_manager.merging.methods import DEFAULTS, MergeOptions, merge_methods


@merge_methods.register(
    "linear", source="arXiv:2212.04089", identity=True, ordered=False, options=()
)
def merge_linear(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    options: MergeOptions = DEFAULTS,
) -> AdapterWeights:
    """A and sum_t weights[t] * scaling_t / scaling * B_t: exact, because A is the same.

    The result's scaling is that of the first member, or 1 where that is 0.

    Acts on B alone, which is exact only where all members share one A; with
    different A it would add cross terms B_i A_j, so that is refused (PEFT's
    `linear` does it all the same). One adapter at weight 1 returns itself; the
    order of the members does not matter but for rounding. B is kept in float32.
    Raises:
        InvalidInput: members of several blocks, or with different A.
        ValueError: no members, or not one weight per member.
    """
    if not members or len(members) != len(weights):
        raise ValueError(f"got {len(members)} members and {len(weights)} weights")
    if any(len(member.blocks) != 1 for member in members):
        raise InvalidInput(
            "method `linear` takes adapters with a single A; a concat merge has several: "
            "use `--method concat`"
        )
    blocks = [member.blocks[0] for member in members]
    if len({block.projection_digest for block in blocks}) > 1:
        raise InvalidInput(
            "method `linear` is exact only where all members share one A, and these do not: train "
            'them with `projection = "shared"` or in one sequence, or use `--method concat`'
        )
    first = blocks[0]
    if len(blocks) == 1 and weights[0] == 1:
        return AdapterWeights((first,))
    scaling = first.scaling or 1.0
    B = {
        name: torch.stack(
            [
                block.B[name].float() * (w * block.scaling / scaling)
                for block, w in zip(blocks, weights, strict=True)
            ]
        ).sum(0)
        for name in first.B
    }
    dense = any(block.mask is None for block in blocks)
    mask = None if dense else masks.union([block.mask or {} for block in blocks])
    return AdapterWeights((Block(B, scaling, first.projection, first.tensors, mask),))
