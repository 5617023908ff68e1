"""regmean: the update that answers each task's own inputs as that task's adapter does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lori_manager.engine.core import truncated_on_inputs
from lori_manager.engine.update import LowRankUpdate, concat_updates
from lori_manager.engine.weights import AdapterWeights, Block, one_block
from lori_manager.errors import InvalidInput
from lori_manager.merging.least_squares import root_of
from lori_manager.merging.methods import DEFAULTS, Grams, Groups, MergeOptions, merge_methods


@merge_methods.register(
    "regmean",
    source="arXiv:2212.09849",
    identity=True,
    ordered=False,
    needs="grams",
    options=("max_rank", "eps", "shrink"),
)
def merge_regmean(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    options: MergeOptions = DEFAULTS,
) -> AdapterWeights:
    """Least squares on probe inputs: min over D of sum_t w_t E ||(D - D_t) x_t||^2.

    D = (sum_t D_t G_t) (sum_t G_t)^-1 with G_t = w_t E[x_t x_t'], the second moments of the
    inputs that member t sees with itself in the model. As D_t = B_t A_t, this keeps every
    B and its mask and only re-aims A: A'_t = A_t (G_t + e/T I) (sum G + e I)^-1, rank the
    sum of the ranks. `options.eps` times the mean diagonal of sum G is e: directions that
    no input takes get the mean of the updates. `options.shrink` is the paper's alpha: every
    G_t is replaced by alpha G_t + (1 - alpha) diag(G_t). At 1, the default, nothing is; at 0
    each column of D is a mean of the members' columns, by how loud each one's input is there.

    Acts on whole updates, on A alone. One adapter at weight 1 returns itself; the order of
    the members does not matter but for rounding. Differs from the paper: on updates
    instead of weights, and the e/T, without which a lone adapter would shrink; alpha is 1 and
    not the paper's 0.9, because e does what that is for (sums that have an inverse) and does
    not depend on the axes. Members of weight 0 are left out. With `max_rank`: cut
    afterwards to the best update of that rank on the probe inputs, not in the Frobenius norm.

    Memory: the moments of one member, and their sum in float64, for as many modules as
    `options.groups` puts together.
    Raises:
        InvalidInput: no probe inputs for these members, or negative weights.
        ValueError: no members, or not one weight per member.
    """
    chosen, grams, shares = counted(members, weights, options, "regmean")
    if len(chosen) == 1 and shares[0] == 1 and options.max_rank is None:
        return chosen[0]
    if grams is None:
        raise InvalidInput("method `regmean` needs the inputs of every member's probe rows")
    blocks = [(t, block) for t, member in enumerate(chosen) for block in member.blocks]
    whole = AdapterWeights(tuple(block for _, block in blocks)).rank
    rank = None if options.max_rank is None or whole <= options.max_rank else options.max_rank
    aims: list[dict[str, Tensor]] = [{} for _ in blocks]
    cut: dict[str, LowRankUpdate] = {}
    for group in _groups(grams, options.groups):
        for stage, aimed, root in _aimed(group, grams, shares, blocks, options):
            for name in stage:
                found = {i: A for (i, of), A in aimed.items() if of == name}
                if rank is None:
                    for i, A in found.items():
                        kept = blocks[i][1].B[name].dtype
                        aims[i][name] = A.to("cpu", kept).contiguous()
                else:
                    cut[name] = _cut(name, found, blocks, root, rank)
    if rank is not None:
        return one_block(cut)
    return AdapterWeights(tuple(
        Block(block.B, block.scaling, tensors={n: A[n] for n in block.B}, mask=block.mask)
        for (_, block), A in zip(blocks, aims, strict=True)
    ))  # fmt: skip


def counted(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    options: MergeOptions,
    name: str,
) -> tuple[list[AdapterWeights], Grams | None, list[float]]:
    """Members of a regression that count, their moments (None: not all are there), weights.

    Raises:
        InvalidInput: negative weights, or none above 0.
        ValueError: no members, or not one weight per member.
    """
    if not members or len(members) != len(weights):
        raise ValueError(f"got {len(members)} members and {len(weights)} weights")
    if min(weights) < 0:
        raise InvalidInput(f"`weights` of a regression (`{name}`) must not be negative")
    counting = [i for i, weight in enumerate(weights) if weight > 0]
    if not counting:
        raise InvalidInput(f"`weights` of a regression (`{name}`) must not all be 0")
    grams = options.grams
    if grams is not None:
        grams = [grams[i] for i in counting] if len(grams) == len(members) else None
    return [members[i] for i in counting], grams, [float(weights[i]) for i in counting]


def _groups(grams: Grams, groups: Groups | None) -> list[list[list[str]]]:
    """Groups of stages: modules that see one input, and that the same members have."""
    if groups is None:  # all are held: the same tensors are those of the same input
        shared: dict[tuple[int | None, ...], list[str]] = {}
        for name in dict.fromkeys(name for gram in grams for name in gram):
            key = tuple(id(gram[name]) if name in gram else None for gram in grams)
            shared.setdefault(key, []).append(name)
        return [list(shared.values())]
    out = []
    for group in groups:
        stages: dict[tuple[int, tuple[bool, ...]], list[str]] = {}
        for number, names in enumerate(group):
            for name in names:
                having = tuple(name in gram for gram in grams)
                if any(having):
                    stages.setdefault((number, having), []).append(name)
        out.append(list(stages.values()))
    return out


def _aimed(
    group: Sequence[Sequence[str]],
    grams: Grams,
    shares: Sequence[float],
    blocks: Sequence[tuple[int, Block]],
    options: MergeOptions,
) -> Iterator[tuple[Sequence[str], dict[tuple[int, str], Tensor], Tensor]]:
    """For each stage of a group: its modules, every (block, module)'s A', and the root.

    The moments are read member by member and let go of. Shapes: A' (rank, in_features)
    float32; the root L (in_features, in_features) float64 with L L' = sum G + e I.
    """
    sums: dict[int, Tensor] = {}
    sides: list[dict[tuple[int, str], tuple[Tensor, Tensor]]] = [{} for _ in group]
    for t, (gram, share) in enumerate(zip(grams, shares, strict=True)):
        for k, stage in enumerate(group):
            if stage[0] not in gram:
                continue
            G = gram[stage[0]].to(torch.float64, copy=True).mul_(share)
            for i, name in ((i, n) for i, (owner, b) in enumerate(blocks) if owner == t
                            for n in stage if n in b.B):  # fmt: skip
                A = blocks[i][1].A[name].to(G.device, torch.float64)
                shrunk = options.shrink * (A @ G) + (1 - options.shrink) * (A * G.diagonal())
                sides[k][i, name] = (A, shrunk)
            sums[k] = sums[k].add_(G) if k in sums else G
            del G
    for k, stage in enumerate(group):
        root, e = root_of(sums.pop(k), options.eps, options.shrink)
        mean = e / sum(stage[0] in gram for gram in grams)
        yield (
            stage,
            {
                of: torch.cholesky_solve((side + mean * A).t(), root).t().float()
                for of, (A, side) in sides[k].items()
            },
            root,
        )


def _cut(
    name: str,
    aims: Mapping[int, Tensor],
    blocks: Sequence[tuple[int, Block]],
    root: Tensor,
    rank: int,
) -> LowRankUpdate:
    """The module's merged update at that rank, on the CPU."""
    parts = []
    for i, A in aims.items():
        block = blocks[i][1]
        parts.append(LowRankUpdate(A, block.B[name].to(A.device, A.dtype), block.scaling))
    found = truncated_on_inputs(concat_updates(parts, [1.0] * len(parts)), root, rank)
    return LowRankUpdate(found.A.cpu(), found.B.cpu(), found.scaling)
