"""regmean: the update that answers each task's own inputs as that task's adapter does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lori_manager.engine.core import truncated_on_inputs
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.errors import InvalidInput
from lori_manager.merging.methods import (
    DEFAULTS,
    Grams,
    MergeOptions,
    merge_methods,
    module_by_module,
)


@merge_methods.register(
    "regmean", source="arXiv:2212.09849", identity=True, ordered=False, needs="grams"
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
    no input takes get the mean of the updates.

    Acts on whole updates, on A alone. One adapter at weight 1 returns itself; the order of
    the members does not matter but for rounding. Differs from the paper: on updates
    instead of weights, no shrinking of what lies off the diagonal, and the e/T, without
    which a lone adapter would shrink. Members of weight 0 are left out. With `max_rank`: cut
    afterwards to the best update of that rank on the probe inputs, not in the Frobenius norm.
    Raises:
        InvalidInput: no probe inputs for these members, or negative weights.
        ValueError: no members, or not one weight per member.
    """
    chosen, grams, shares = counted(members, weights, options, "regmean")
    if len(chosen) == 1 and shares[0] == 1 and options.max_rank is None:
        return chosen[0]
    if grams is None:
        raise InvalidInput("method `regmean` needs the inputs of every member's probe rows")
    aims, roots = re_aiming(grams, shares, options.eps)
    blocks = []
    for member, aim in zip(chosen, aims, strict=True):
        for block in member.blocks:
            kept = block.B[next(iter(block.B))].dtype
            A = {name: block.A[name].to(aim[name].device).float() @ aim[name] for name in block.B}
            A = {name: a.to("cpu", kept).contiguous() for name, a in A.items()}
            blocks.append(Block(block.B, block.scaling, tensors=A, mask=block.mask))
    merged = AdapterWeights(tuple(blocks))
    if options.max_rank is None or merged.rank <= options.max_rank:
        return merged
    rank = options.max_rank
    return module_by_module(
        [merged],
        [1.0],
        lambda name, updates, _: truncated_on_inputs(updates[0], roots[name].cpu(), rank),
        rank,
    )


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


def re_aiming(
    grams: Grams, weights: Sequence[float], eps: float
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """What each A is multiplied by, and the root of the summed moments.

    Members that lack a module have no part in its sum. Modules that share one Gram matrix
    share the results.
    Returns:
        For each member module -> (G_t + e/T I) (sum G + e I)^-1, float32; and module ->
        lower triangular L with L L' = sum G + e I, float64; (in_features, in_features) all.
    """
    names = sorted({name for gram in grams for name in gram})
    out: list[dict[str, Tensor]] = [{} for _ in grams]
    roots: dict[str, Tensor] = {}
    known: dict[tuple[int, ...], tuple[list[Tensor], Tensor]] = {}
    for name in names:
        having = [i for i, gram in enumerate(grams) if name in gram]
        key = tuple(id(grams[i][name]) for i in having)
        if key not in known:
            parts = [grams[i][name].double() * float(weights[i]) for i in having]
            whole = torch.stack(parts).sum(0)
            e = eps * float(whole.diagonal().mean()) or 1.0
            eye = torch.eye(len(whole), dtype=whole.dtype, device=whole.device)
            root = torch.linalg.cholesky(whole + e * eye)
            known[key] = (
                [
                    torch.cholesky_solve(part + e / len(parts) * eye, root).t().float()
                    for part in parts
                ],
                root,
            )
        roots[name] = known[key][1]
        for i, aim in zip(having, known[key][0], strict=True):
            out[i][name] = aim
    return out, roots
