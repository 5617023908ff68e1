"""soups: a learned weight for every member in every module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lori_manager.config import Config
from lori_manager.consolidation import ModelMethod, taking_part
from lori_manager.distillation import taught_rows, teacher_words
from lori_manager.engine.layers import attached, product_dtype
from lori_manager.engine.update import LowRankUpdate
from lori_manager.engine.weights import AdapterWeights
from lori_manager.merging.concat import merge_concat
from lori_manager.merging.methods import DEFAULTS, MergeOptions, module_by_module
from lori_manager.models import BaseModel
from lori_manager.registry import Entry
from lori_manager.tasks.encoding import Encoded
from lori_manager.training import fit, steps_told


class _Weighed(nn.Module):
    """h = W x + sum_t c_t B_t A_t x, where c alone is trained: entries of one parameter."""

    def __init__(
        self, base: nn.Module, parts: Sequence[LowRankUpdate], c: nn.Parameter, first: int
    ) -> None:
        super().__init__()
        self.base = base
        like = next(base.parameters())
        dtype = product_dtype(base)
        self._A = torch.cat([p.A for p in parts]).to(like.device, dtype)
        self._B = torch.cat([p.B * p.scaling for p in parts], dim=1).to(like.device, dtype)
        owner = [i for i, p in enumerate(parts) for _ in range(p.rank)]
        self._places = first + torch.tensor(owner, device=like.device)
        self._c = [c]  # a list: the parameter belongs to no single layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        out: Tensor = self.base(x)
        z = F.linear(x, self._A) * self._c[0][self._places].to(x.dtype)
        return out + F.linear(z, self._B)


def merge_soups(
    base: BaseModel,
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    rows: Sequence[Sequence[Encoded]],
    options: MergeOptions = DEFAULTS,
    *,
    general: Sequence[Encoded] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> AdapterWeights:
    """sum_t c_tm D_tm in every module m, with c trained on rows of all tasks.

    c begins at the given weights and is trained for `steps` steps of AdamW at 10 times
    `rate`; what is learned is the rows' completions (`labels`) mixed with what each task's
    own adapter says there. Exact in what it adds: all factors are kept, c goes into B.

    Source: LoRA Soups (CAT), arXiv:2410.13025, which learns the weights on labels alone.
    Acts on whole updates. One adapter at weight 1 returns itself; the order of the members
    decides which batch a row is in. A member of weight 0 takes no part. `general` rows are
    not used.

    Args, errors: as of `merge_layerwise`; the rows have their own completions.
    """
    members, weights, rows = taking_part(members, weights, rows)
    if len(members) == 1 and weights[0] == 1 and options.max_rank is None:
        return members[0]
    words = [
        teacher_words(base, member.updates(), own, 32, labels=options.labels)
        for member, own in zip(members, rows, strict=True)
    ]
    taught, table = taught_rows(words, base.device)
    updates = [member.updates() for member in members]
    names = sorted({name for one in updates for name in one})
    owners = {name: [t for t, one in enumerate(updates) if name in one] for name in names}
    begin = torch.tensor([float(weights[t]) for name in names for t in owners[name]])
    c = nn.Parameter(begin.to(base.device))
    counts = [len(owners[name]) for name in names]
    places = dict(zip(names, accumulate(counts, initial=0), strict=False))
    config = Config(batch=16, steps=options.steps, seed=options.seed, graphs="off", clip=0.0)

    def layer(name: str) -> _Weighed:
        parts = [updates[t][name] for t in owners[name]]
        return _Weighed(base.model.get_submodule(name), parts, c, places[name])

    with attached(base.model, {name: layer(name) for name in names}):
        fit(
            base,
            {"weights": c},
            taught,
            config,
            steps=options.steps,
            peak=options.rate * 10,
            soft=table,
            on_progress=steps_told(on_progress),
        )
    found = [part.tolist() for part in torch.split(c.detach().cpu(), counts)]
    learned = dict(zip(names, found, strict=True))
    merged = merge_concat(
        [_times(m, t, owners, learned) for t, m in enumerate(members)], [1.0] * len(members)
    )
    if options.max_rank is None:
        return merged
    return module_by_module([merged], [1.0], lambda _, u, __: u[0], options.max_rank)


def _times(
    member: AdapterWeights,
    t: int,
    owners: Mapping[str, Sequence[int]],
    learned: Mapping[str, Sequence[float]],
) -> AdapterWeights:
    """The member with its learned weights in its B's."""
    blocks = []
    for block in member.blocks:
        B = {
            name: (b.float() * learned[name][owners[name].index(t)]).to(b.dtype)
            for name, b in block.B.items()
        }
        blocks.append(replace(block, B=B))
    return AdapterWeights(tuple(blocks))


SOUPS: Entry[ModelMethod] = Entry(
    "soups",
    merge_soups,
    "arXiv:2410.13025",
    {
        "identity": True,
        "ordered": True,
        "needs": "labels",
        "options": ("max_rank", "steps", "rate", "labels", "seed"),
    },
)
