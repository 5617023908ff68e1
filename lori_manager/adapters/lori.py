"""LoRI: the frozen A, the masked B, and what a trained adapter is made of.

arXiv:2504.07448. LoRI-D trains all of B, LoRI-S the entries of a mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lori_manager.adapters.spectra import spectra
from lori_manager.config import Config
from lori_manager.engine import mask as masks
from lori_manager.engine.gated import gates_together
from lori_manager.engine.layers import LoriLinear, attached, low_rank_layers
from lori_manager.engine.projection import ORTHOGONAL, ProjectionSpec
from lori_manager.engine.siblings import join_siblings
from lori_manager.engine.trained import TrainedValues
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.errors import InvalidInput
from lori_manager.models import BaseModel, check_rank, resolve_targets

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def fresh_block(
    shapes: Mapping[str, tuple[int, int]], config: Config, line: str, first_row: int = 0
) -> Block:
    """B = 0 on the line's own A.

    Args:
        shapes: every linear module of the base, name -> (out_features, in_features).
        config: rank, alpha, targets, seed and projection count here.
        line: whose A it is; ignored with `projection` "shared" and "orthogonal".
        first_row: of an orthogonal A, see `engine.orthogonal`; ignored with the others.
    Raises:
        InvalidInput: a target that matches nothing, a rank too large.
    """
    chosen = {name: shapes[name] for name in resolve_targets(shapes, config.targets)}
    check_rank(chosen, config.rank)
    modules = {name: shape[1] for name, shape in chosen.items()}
    if config.projection == "orthogonal":
        spec = ProjectionSpec(config.seed, "", config.rank, modules, ORTHOGONAL, first_row)
    else:
        named = "" if config.projection == "shared" else line
        spec = ProjectionSpec(config.seed, named, config.rank, modules)
    B = {name: torch.zeros(shape[0], config.rank) for name, shape in chosen.items()}
    return Block(B, config.scaling, projection=spec)


def svd_block(base: BaseModel, config: Config) -> Block:
    """B = 0 on an A of each module's leading right singular vectors, the same on every line.

    Each row is as long as a random one is on average, 1/sqrt(3), so that a learning rate
    carries over as far as the inputs let it. A is stored: an SVD gives the same bits on one
    machine, but not everywhere.

    Args:
        base: with plain weights. Not modified.
        config: rank, alpha, targets and store_dtype, which A is rounded to, count here.
    Raises:
        InvalidInput: a target that matches nothing, a rank too large, packed weights.
    """
    shapes = base.linear_shapes
    chosen = {name: shapes[name] for name in resolve_targets(shapes, config.targets)}
    check_rank(chosen, config.rank)
    found = spectra(base, dict.fromkeys(chosen, config.rank))
    dtype = DTYPES[config.store_dtype]
    A = {name: (one.V.T / math.sqrt(3)).to(dtype).contiguous() for name, one in found.items()}
    B = {name: torch.zeros(shape[0], config.rank) for name, shape in chosen.items()}
    return Block(B, config.scaling, tensors=A)


def first_block(base: BaseModel, config: Config, line: str) -> Block:
    """What a training from the base begins with: `svd_block` or `fresh_block`, by `init`."""
    if config.init == "svd":
        return svd_block(base, config)
    return fresh_block(base.linear_shapes, config, line)


def continued_block(weights: AdapterWeights, config: Config) -> Block:
    """The adapter as one block to go on training from: same A, B kept.

    An adapter of several blocks (an exact merge) becomes one whose A holds all
    rows of theirs and is stored as it is.
    Raises:
        InvalidInput: the scaling is 0.
    """
    if len(weights.blocks) == 1:
        if weights.blocks[0].scaling == 0:
            raise InvalidInput(
                "this adapter's scaling is 0 (a merge with weight 0): no training can move it"
            )
        return weights.blocks[0]
    updates = weights.updates()
    scaling = config.scaling
    B = {name: u.B * (u.scaling / scaling) for name, u in updates.items()}
    return Block(B, scaling, tensors={name: u.A for name, u in updates.items()})


def used_entries(block: Block) -> dict[str, Tensor]:
    """Entries of B that the block's tasks have taken: its mask, or what is not zero."""
    if block.mask is not None:
        return {name: m.clone() for name, m in block.mask.items()}
    return masks.support(block.B)


def trainable_layers(
    model: nn.Module,
    block: Block,
    mask: Mapping[str, Tensor] | None,
    beside: AdapterWeights | None = None,
) -> dict[str, LoriLinear]:
    """One layer per module of the block, starting from its B; `beside` acts and stays fixed."""
    fixed = {} if beside is None else beside.updates()
    return {
        name: LoriLinear(
            model.get_submodule(name),
            block.A[name],
            block.scaling,
            None if mask is None else mask[name],
            B if bool(B.any()) else None,
            fixed.get(name),
        )
        for name, B in block.B.items()
    }


@contextmanager
def in_training(
    base: BaseModel, layers: Mapping[str, LoriLinear], beside: AdapterWeights | None = None
) -> Iterator[dict[str, nn.Parameter]]:
    """The layers in the model's place for them, on the fastest path that there is.

    Layers that see the same input compute together, gated feed-forwards too where the
    device has the kernels, and all values are one parameter.

    Args:
        base: run once on two tokens, to see which layers see the same input.
        layers: by module name.
        beside: what `trainable_layers` was given, for its modules that have no layer here.
    Yields:
        What to train, by name.
    """
    updates = {} if beside is None else beside.updates()
    others = low_rank_layers(base.model, {n: u for n, u in updates.items() if n not in layers})
    with attached(base.model, {**others, **layers}):
        join_siblings(layers, base.probe)
        values = TrainedValues(list(layers.values()))
        dtype = next(iter(layers.values())).A.dtype

        def make(*_: object) -> None:
            values.make(dtype)

        hook = base.decoder.register_forward_pre_hook(make)
        try:
            with gates_together(base.model):
                yield {"values": values.parameter}
        finally:
            hook.remove()


def trained_B(layers: Mapping[str, LoriLinear]) -> dict[str, Tensor]:
    """Module name -> B (out_features, rank) without what is fixed, float32 on the CPU."""
    return {
        name: layer.B().detach()[:, layer.fixed :].cpu().contiguous()
        for name, layer in layers.items()
    }


def trained_block(
    start: Block,
    B: Mapping[str, Tensor],
    mask: Mapping[str, Tensor] | None,
    store_dtype: str,
) -> Block:
    """The block to store after training.

    B is rounded to the stored dtype, except that a start which bf16 cannot hold
    (float32, or an imported float16) gives float32: rounding would move entries
    that were not to be trained. The new
    mask is what the start used and what was trained; None where either is dense.
    """
    begun = any(bool(b.any()) for b in start.B.values())
    wide = begun and any(b.dtype != torch.bfloat16 for b in start.B.values())
    dtype = torch.float32 if wide else DTYPES[store_dtype]
    rounded = {name: b.to(dtype) for name, b in B.items()}
    if mask is None or (begun and start.mask is None):
        union = None
    elif begun:
        union = masks.union([used_entries(start), mask])
    else:
        union = dict(mask)
    return Block(rounded, start.scaling, start.projection, start.tensors, union)


def capacity_left(blocks: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Module name -> share of B that none of the masks has taken."""
    return masks.capacity(masks.union(blocks))
