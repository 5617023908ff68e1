"""lorm: one B on the A that all members share, which answers each task's inputs as its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.errors import InvalidInput
from lori_manager.merging.methods import DEFAULTS, MergeOptions, merge_methods
from lori_manager.merging.regmean import counted


@merge_methods.register("lorm", source="arXiv:2410.17961", identity=True, ordered=False,
                        needs="grams", options=("eps",))  # fmt: skip
def merge_lorm(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    options: MergeOptions = DEFAULTS,
) -> AdapterWeights:
    """Least squares on probe inputs with A held: min over B of sum_t w_t E ||(B - B_t) A x_t||^2.

    B = (sum_t B_t H_t + e/T sum_t B_t) (sum_t H_t + e I)^-1 with H_t = w_t A E[x_t x_t'] A',
    rank x rank: the rank stays that of one member, and A stays as it is, regenerated where
    it is. For adapters trained with `--projection shared`. `options.eps` times the mean
    diagonal of sum H is e. The result is dense: a row of B mixes all of its entries.

    Acts on B alone. One adapter at weight 1 returns itself; the order of the members does not
    matter but for rounding. Differs from the paper: both of its steps are taken at its
    aggregation, A being frozen; the e/T, without which a lone adapter would shrink. Members of
    weight 0 are left out; `max_rank` is not used, there is nothing to cut, nor is `shrink`: H_t
    is in the directions of a random A, whose diagonal means nothing.
    Raises:
        InvalidInput: members whose A differ, or that have several blocks; no probe inputs for
            them, or negative weights.
        ValueError: no members, or not one weight per member.
    """
    chosen, grams, shares = counted(members, weights, options, "lorm")
    if len(chosen) == 1 and shares[0] == 1:
        return chosen[0]
    blocks = [member.blocks[0] for member in chosen]
    alike = {block.projection_digest for block in blocks}
    if len(alike) > 1 or any(len(member.blocks) > 1 for member in chosen):
        raise InvalidInput(
            "method `lorm` needs members on one A, each of one block: train them with "
            "`--projection shared`, or use `--method layerwise`"
        )
    if grams is None:
        raise InvalidInput("method `lorm` needs the inputs of every member's probe rows")
    first = blocks[0]
    scaling = first.scaling or 1.0  # 0 of a merge with weight 0: no B could answer anything
    inner: dict[str, list[Tensor]] = {name: [] for name in first.A}
    for names in options.groups or [[list(inner)]]:  # read group by group, member by member
        for gram, share in zip(grams, shares, strict=True):
            for name in (n for stage in names for n in stage if n in inner):
                G = gram[name]
                rows = first.A[name].to(G.device, torch.float64)
                inner[name].append(rows @ G.double() @ rows.t() * share)
    B: dict[str, Tensor] = {}
    for name, moments in inner.items():
        device = moments[0].device
        whole = torch.stack(moments).sum(0)
        e = options.eps * float(whole.diagonal().mean()) or 1.0
        eye = torch.eye(len(whole), dtype=whole.dtype, device=device)
        target = torch.zeros(first.B[name].shape, dtype=torch.float64, device=device)
        for block, H in zip(blocks, moments, strict=True):
            own = block.B[name].to(device, torch.float64) * block.scaling
            target += own @ (H + e / len(blocks) * eye)
        found = torch.cholesky_solve(target.t(), torch.linalg.cholesky(whole + e * eye)).t()
        B[name] = (found / scaling).to("cpu", first.B[name].dtype).contiguous()
    return AdapterWeights((Block(B, scaling, first.projection, first.tensors),))
