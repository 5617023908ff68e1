"""tsv: each task's leading singular triples, with singular vectors of tasks made orthogonal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lori_manager.engine.decompose import svd
from lori_manager.engine.update import LowRankUpdate
from lori_manager.engine.weights import AdapterWeights
from lori_manager.merging.methods import DEFAULTS, MergeOptions, merge_methods, module_by_module
from lori_manager.merging.spectrum import counted, isometry, joined_in_core


@merge_methods.register(
    "tsv", source="arXiv:2412.00081", identity=True, ordered=False, options=("max_rank",)
)
def merge_tsv(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    options: MergeOptions = DEFAULTS,
) -> AdapterWeights:
    """TSV-M: concatenate the tasks' U, S, V, replace U and V by their nearest isometries.

    Acts on whole updates, through their singular triples. Of each of T tasks the leading
    min(out_features, in_features) // T triples are kept, at least one: the paper's count,
    which on updates of rank r is all r of them wherever T r fits the matrix. Weights
    multiply the singular values, so the paper's sum is at weights 1; T counts the members
    that have the module and a weight other than 0. One adapter at weight 1 returns itself;
    the order of the members does not matter.

    Differs: triples whose singular value is 0 are no triples. On a low-rank matrix a dense
    SVD fills them with arbitrary vectors, which would then push the others about. For the
    same reason directions that tasks share (with one A for all: every one of V) are shared
    out between them and not completed to a full set of orthonormal ones.
    """
    fits = options.max_rank is None or all(m.rank <= options.max_rank for m in members)
    if len(members) == len(weights) == 1 and weights[0] == 1 and fits:
        return members[0]

    def merge(_: str, updates: list[LowRankUpdate], shares: list[float]) -> LowRankUpdate:
        smaller = min(updates[0].shape)

        def join(cores: Tensor, scales: Tensor) -> tuple[Tensor, int]:
            U, S, V = [], [], []
            for core, scale in zip(cores, scales, strict=True):
                left, values, right = svd(core)
                k = min(counted(values), max(smaller // len(cores), 1))
                U.append(left[:, :k])
                S.append(scale * values[:k])
                V.append(right[:k])
            joint = torch.cat(S)
            core = isometry(torch.cat(U, 1)) * joint @ isometry(torch.cat(V))
            return core, int(joint.numel())

        return joined_in_core(updates, shares, join)

    return module_by_module(members, weights, merge, options.max_rank)
