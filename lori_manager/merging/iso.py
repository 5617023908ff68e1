"""iso and iso-cts: the merged update with all its singular values made equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lori_manager.engine.decompose import singular_values, svd
from lori_manager.engine.update import LowRankUpdate
from lori_manager.engine.weights import AdapterWeights
from lori_manager.merging.methods import DEFAULTS, MergeOptions, merge_methods, module_by_module
from lori_manager.merging.spectrum import CoreRule, counted, isometry, joined_in_core

# Of the rank of the sum, before it is rounded so that the tasks get equal parts of the rest.
COMMON = 0.8


def flattened(cores: Tensor, weights: Tensor) -> tuple[Tensor, int]:
    """Iso-C: the weighted sum with each of its singular values at their mean."""
    own = weights[:, None, None] * cores
    left, values, right = svd(own.sum(0))
    rank = counted(values, largest_norm(own))
    if rank == 0:
        return torch.zeros_like(cores[0]), 0
    return values[:rank].mean() * (left[:, :rank] @ right[:rank]), rank


def largest_norm(matrices: Tensor) -> Tensor:
    """What singular values of their sum are held against: what cancels leaves rounding."""
    norm: Tensor = singular_values(matrices).max()
    return norm


def with_task_spaces(cores: Tensor, weights: Tensor) -> tuple[Tensor, int]:
    """Iso-CTS: leading directions of the sum, then of what each task has outside of them."""
    own = weights[:, None, None] * cores
    largest = largest_norm(own)
    left, values, right = svd(own.sum(0))
    rank, tasks = counted(values, largest), len(cores)
    if rank == 0:
        return torch.zeros_like(cores[0]), 0
    each = round((rank - int(COMMON * rank)) / tasks)
    common = rank - each * tasks
    shared = left[:, :common]
    U, S, V = [shared], [values[:common]], [right[:common]]
    for core in own:
        rest = core - shared @ (shared.t() @ core)
        left, values, right = svd(rest)
        k = min(each, counted(values, largest))
        U.append(left[:, :k])
        S.append(values[:k])
        V.append(right[:k])
    joint = torch.cat(S)
    return joint.mean() * (isometry(torch.cat(U, 1)) @ isometry(torch.cat(V))), int(joint.numel())


def merge_isotropic(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    options: MergeOptions,
    rule: CoreRule,
) -> AdapterWeights:
    """Module by module, in the core."""

    def merge(_: str, updates: list[LowRankUpdate], shares: list[float]) -> LowRankUpdate:
        return joined_in_core(updates, shares, rule)

    return module_by_module(members, weights, merge, options.max_rank)


@merge_methods.register(
    "iso", source="arXiv:2502.04959, Iso-C", identity=False, ordered=False, options=("max_rank",)
)
def merge_iso(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    options: MergeOptions = DEFAULTS,
) -> AdapterWeights:
    """Iso-C: sum_t weights[t] * delta_t = U S V', merged mean(S) U V'.

    Acts on whole updates, through the singular values of their sum. One adapter at weight 1
    does not return itself: its singular values are made equal too. The order of the members
    does not matter.

    Differs: the paper takes the mean over all min(out_features, in_features) values, whole
    matrices having so many. Here it is over the rank of the sum, for the others are 0 and
    their vectors arbitrary: a mean over them would shrink the update by rank / min(..) and
    spread the rest over directions that no task knows. On a sum of full rank the two are
    equal. The paper's plain sum is at weights 1. `max_rank` then drops directions of equal
    size: which of them stay is arbitrary.
    """
    return merge_isotropic(members, weights, options, flattened)


@merge_methods.register(
    "iso-cts",
    source="arXiv:2502.04959, Iso-CTS",
    identity=False,
    ordered=False,
    options=("max_rank",),
)
def merge_iso_cts(
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    options: MergeOptions = DEFAULTS,
) -> AdapterWeights:
    """Iso-CTS: the sum's leading directions and some of each task's own, all of equal size.

    Of the sum's rank R about 0.8 R leading triples are kept; the other s = (R - k) / T per
    task are the leading ones of (I - U_k U_k') delta_t. The nearest isometries of all the U
    and of all the V, times the mean of their singular values. Acts on whole updates. One
    adapter at weight 1 does not return itself; the order of the members does not matter.

    Differs: R is the rank of the weighted sum where the paper has min(out_features,
    in_features), for `iso`'s reason; directions that tasks share are not completed, as in
    `tsv`. k is rounded so that tasks get equal parts, as in the paper's code; where that
    rounds to none (T above about 0.4 R), this is `iso`. The paper's sum is at weights 1.
    """
    return merge_isotropic(members, weights, options, with_task_spaces)
