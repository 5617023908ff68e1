"""A short training of a merged adapter on probe rows, with each task's own adapter as teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lori_manager.adapters import lori
from lori_manager.config import Config
from lori_manager.consolidation import ModelMethod, taking_part
from lori_manager.distillation import taught_rows, teacher_words
from lori_manager.engine.layers import LoriLinear
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.errors import InvalidInput
from lori_manager.layerwise import merge_layerwise
from lori_manager.merging.methods import DEFAULTS, MergeOptions
from lori_manager.models import BaseModel
from lori_manager.registry import Entry
from lori_manager.tasks.encoding import Encoded
from lori_manager.training import OnProgress, TrainResult, fit, steps_told

USUAL = 3**-0.5  # length of a row of a random A, whose entries are uniform in +-d_in ** -0.5


def repair(
    base: BaseModel,
    merged: AdapterWeights,
    members: Sequence[AdapterWeights],
    rows: Sequence[Sequence[Encoded]],
    config: Config,
    *,
    steps: int,
    peak: float,
    labels: float = 0.5,
    on_progress: OnProgress | None = None,
) -> tuple[AdapterWeights, TrainResult]:
    """Train every B of a merge where its mask allows; every A stays as it is.

    Args:
        base: the model; left as it was.
        merged: what to begin with. Not modified.
        members: the teachers, one for each of `rows`.
        rows: for each member rows of its task, with completions.
        config: batch, schedule, clipping and seed count.
        steps, peak: of the training.
        labels: share of the completions' own tokens in what is learned; the rest is what
            the teachers say there.
    Raises:
        InvalidInput: the merge is routed, or a block's scaling is 0.
    """
    merged.check_single()
    if any(block.scaling == 0 for block in merged.blocks):
        raise InvalidInput(
            "a part of this merge has scaling 0 (a member of weight 0): no training can move it, "
            "leave that member out"
        )
    parts = [
        teacher_words(base, member.updates(), own, config.score_batch, labels=labels)
        for member, own in zip(members, rows, strict=True)
    ]
    taught, table = taught_rows(parts, base.device)
    layers = _layers(base, merged)
    with lori.in_training(base, layers) as parameters:
        result = fit(
            base,
            parameters,
            taught,
            config,
            steps=steps,
            peak=peak,
            phase="repairing",
            on_progress=on_progress,
            soft=table,
        )
    return _split(merged, lori.trained_B(layers)), result


def merge_repair(
    base: BaseModel,
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    rows: Sequence[Sequence[Encoded]],
    options: MergeOptions = DEFAULTS,
    *,
    general: Sequence[Encoded] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> AdapterWeights:
    """`layerwise` on the rows, then `repair` of what it gives for `steps` steps at `rate`.

    Acts on whole updates, then on B where its mask allows. One adapter at weight 1 returns
    itself; the order of the members matters as the order of rows does in a training.

    Args, errors: as of `merge_layerwise`; the rows have their own completions. `labels`
        counts too.
    """
    members, weights, rows = taking_part(members, weights, rows)
    if len(members) == 1 and weights[0] == 1 and options.max_rank is None:
        return members[0]
    merged = merge_layerwise(base, members, weights, rows, options, general=general)
    config = Config(batch=32, steps=options.steps, seed=options.seed)
    found, _ = repair(
        base,
        merged,
        members,
        rows,
        config,
        steps=options.steps,
        peak=options.rate,
        labels=options.labels,
        on_progress=steps_told(on_progress),
    )
    return found


REPAIR: Entry[ModelMethod] = Entry(
    "repair",
    merge_repair,
    "layerwise, then distillation",
    {
        "identity": True,
        "ordered": True,
        "needs": "labels",
        "options": (
            "max_rank",
            "eps",
            "shrink",
            "general",
            "answers",
            "span",
            "steps",
            "rate",
            "labels",
            "seed",
        ),
    },
)


def _sizes(block: Block, name: str) -> Tensor:
    """(rank,) what each row of A is divided by and its column of B multiplied with.

    So that one learning rate suits all of them: an optimizer's step moves every entry of B
    alike, and what that does to the output grows with the row. After it the rows are as
    long as those of a random A, and B's scaling is 1.
    """
    norms = block.A[name].float().norm(dim=1)
    least = float(norms.max()) * 1e-6 or 1.0
    return torch.clamp(norms / USUAL, min=least)


def _layers(base: BaseModel, merged: AdapterWeights) -> dict[str, LoriLinear]:
    """One layer a module, all blocks' factors side by side in it."""
    out = {}
    for name in merged.modules:
        parts = [block for block in merged.blocks if name in block.B]
        mask = None
        if any(block.mask is not None for block in parts):
            mask = torch.cat([
                torch.ones(block.B[name].shape, dtype=torch.bool)
                if block.mask is None
                else block.mask[name]
                for block in parts
            ], dim=1)  # fmt: skip
        A, B = [], []
        for block in parts:
            sizes = _sizes(block, name)
            A.append(block.A[name].float() / sizes[:, None])
            B.append(block.B[name].float() * sizes * block.scaling)
        out[name] = LoriLinear(
            base.model.get_submodule(name), torch.cat(A), 1.0, mask, torch.cat(B, dim=1)
        )
    return out


def _split(merged: AdapterWeights, B: dict[str, Tensor]) -> AdapterWeights:
    """The blocks with their own columns of the trained B's, in their own dtype and scaling."""
    found: list[dict[str, Tensor]] = [{} for _ in merged.blocks]
    for name, whole in B.items():
        column = 0
        for block, mine in zip(merged.blocks, found, strict=True):
            if name not in block.B:
                continue
            old = block.B[name]
            own = whole[:, column : column + old.shape[1]]
            mine[name] = (own / (_sizes(block, name) * block.scaling)).to(old.dtype)
            column += old.shape[1]
    return AdapterWeights(
        tuple(
            Block(mine, block.scaling, block.projection, block.tensors, block.mask)
            for block, mine in zip(merged.blocks, found, strict=True)
        )
    )
