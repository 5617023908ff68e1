"""Regression layer by layer, on the inputs that the merged model itself produces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lori_manager.blockwise import Stream, decoder_blocks
from lori_manager.consolidation import ModelMethod, regression_part
from lori_manager.engine.core import truncated_on_inputs
from lori_manager.engine.layers import LowRankLinear, linear_weight, low_rank_layers
from lori_manager.engine.update import LowRankUpdate, concat_updates
from lori_manager.engine.weights import AdapterWeights, Block, one_block
from lori_manager.labelling import runner
from lori_manager.merging.least_squares import LeastSquares, Moments, Part
from lori_manager.merging.methods import DEFAULTS, MergeOptions
from lori_manager.models import BaseModel
from lori_manager.registry import Entry
from lori_manager.tasks.encoding import Encoded


@dataclass(frozen=True)
class _Part:
    """One block of one member: its place in the result and its factors by module."""

    member: int
    updates: Mapping[str, LowRankUpdate]


def merge_layerwise(
    base: BaseModel,
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    rows: Sequence[Sequence[Encoded]],
    options: MergeOptions = DEFAULTS,
    *,
    general: Sequence[Encoded] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> AdapterWeights:
    """Each module's update fitted anew, from the first decoder block to the last.

    For each module, with x_t what member t's own model gives it, z_t what the merged
    model gives it (all modules before it being merged already) and y_t = (W + D_t) x_t:
    min over D of sum_t w_t E ||y_t - (W + D) z_t||^2. So each module also makes good what
    the modules before it lost. `eps` times the mean diagonal of the moments pulls
    directions that no input takes to the mean of the updates, and `shrink` below 1 multiplies
    what lies off the diagonal of all moments, as RegMean does.

    With `span` "free" D is any update, cut to the one of rank `max_rank` (by default the sum
    of the members') that errs least on the merged model's inputs; the result is one dense
    block. With "members" D = B A', where B holds the members' B side by side: every B and
    its mask is kept and A alone aimed anew, unless `max_rank` cuts it. What a cut loses the
    next modules make good.

    Source: RegMean (arXiv:2212.09849), on the merged model's inputs in forward order as
    RegMean++ (arXiv:2508.03121) does, with the cross moments of IterIS (arXiv:2411.15231);
    differs from them in fitting the whole output, and in counting the places that answers
    are read from for more (`answers`). Acts on whole updates. One adapter at weight 1
    returns itself, general text or not; the order of the members does not matter but for
    rounding.

    Args:
        base: the model; left as it was.
        members, weights: adapters and what each one's task counts, none negative; members of
            weight 0 are left out.
        rows: for each member its probe rows; all of their tokens count.
        options: `max_rank`, `eps`, `shrink`, `answers`, `general` and `span` count.
        general: rows of no task, on which the merged model shall do what the base does;
            together they count `general` times as much as all members.
        on_progress: called with (blocks done, blocks in all).
    Raises:
        InvalidInput: a model without a list of decoder blocks, weights that are negative or
            all 0.
        ValueError: no members, or not one weight and one set of rows per member.
    """
    members, weights, rows = regression_part(members, weights, rows)
    general = general if options.general else ()
    if len(members) == 1 and weights[0] == 1 and options.max_rank is None:
        return members[0]
    max_rank, eps, free = options.max_rank, options.eps, options.span == "free"
    rows = [*rows, *([general] if general else [])]
    weights = [*weights, *([sum(weights) * options.general] if general else [])]
    parts = [_Part(i, b.updates()) for i, m in enumerate(members) for b in m.blocks]
    names = sorted({name for part in parts for name in part.updates})
    prefix, blocks = decoder_blocks(base.model, names)
    forward = runner(base)
    aims: list[dict[str, Tensor]] = [{} for _ in parts]
    cut: dict[str, LowRankUpdate] = {}
    smaller = False
    with torch.no_grad(), forward.ready():
        streams = [Stream(base, forward, own, blocks) for own in rows]
        own_layers = [low_rank_layers(base.model, member.updates()) for member in members]
        own_layers += [{}] * (len(streams) - len(members))
        shares = [
            w * s.token_weights(r, options.answers)
            for w, s, r in zip(weights, streams, rows, strict=True)
        ]
        for number, block in enumerate(blocks):
            inside = [n for n in names if n.startswith(f"{prefix}.{number}.")]
            own = [
                s.own_pass(number, block, base.model, own_layers[t], inside)
                for t, s in enumerate(streams)
            ]
            merged: dict[str, nn.Module] = {}
            for group in _stages(own):
                mixed = [s.input_of(number, block, base.model, merged, group[0]) for s in streams]
                moments = Moments(mixed[0].shape[1], base.device, options.shrink)
                for z, share in zip(mixed, shares, strict=True):
                    moments.add(z.float(), share)
                for name in group:
                    having = [i for i, p in enumerate(parts) if name in p.updates]
                    mine = [Part(parts[i].member, parts[i].updates[name]) for i in having]
                    fit = LeastSquares(linear_weight(base.model.get_submodule(name)), mine, moments)
                    for t, (x, z, share) in enumerate(zip(own, mixed, shares, strict=True)):
                        fit.add(t, x[name].float(), z.float(), share)
                    if free:
                        update = fit.free(eps, max_rank)
                    else:
                        for i, A in zip(having, fit.re_aimed(eps), strict=True):
                            aims[i][name] = A
                        update = _stacked(parts, aims, name)
                        if max_rank is not None:
                            smaller = smaller or update.rank > max_rank
                            root = moments.root(eps)[0].cpu()
                            update = truncated_on_inputs(update, root, max_rank)
                    cut[name] = update
                    merged[name] = LowRankLinear(base.model.get_submodule(name), update)
            for s in streams:
                s.advance(number, block, base.model, merged)
            if on_progress:
                on_progress(number + 1, len(blocks))
    if smaller or free:
        return one_block(cut, next(iter(members[0].blocks[0].B.values())).dtype)
    out, at = [], 0
    for member in members:
        for old in member.blocks:
            dtype = next(iter(old.B.values())).dtype
            aimed = {n: aims[at][n].to("cpu", dtype).contiguous() for n in old.B}
            out.append(Block(old.B, old.scaling, tensors=aimed, mask=old.mask))
            at += 1
    return AdapterWeights(tuple(out))


LAYERWISE: Entry[ModelMethod] = Entry(
    "layerwise",
    merge_layerwise,
    "arXiv:2212.09849 in forward order",
    {
        "identity": True,
        "ordered": False,
        "needs": "answers",
        "encoders": True,
        "options": ("max_rank", "eps", "shrink", "general", "answers", "span"),
    },
)


def _stages(own: Sequence[Mapping[str, Tensor]]) -> list[list[str]]:
    """Modules in the order of their calls, those that see one input together."""
    stages: list[list[str]] = []
    for name, x in own[0].items():
        if stages and own[0][stages[-1][0]] is x:
            stages[-1].append(name)
        else:
            stages.append([name])
    return stages


def _stacked(
    parts: Sequence[_Part], aims: Sequence[Mapping[str, Tensor]], name: str
) -> LowRankUpdate:
    """The merged update of a module, so far as it is found."""
    found = [
        replace(p.updates[name], A=aim[name].cpu(), B=p.updates[name].B.float())
        for p, aim in zip(parts, aims, strict=True)
        if name in p.updates
    ]
    return concat_updates(found, [1.0] * len(found))
