"""iteris: regression on all modules at once, solved again on what the merged model then sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lori_manager.consolidation import ModelMethod, regression_part
from lori_manager.engine.layers import attached, linear_weight, low_rank_layers
from lori_manager.engine.update import LowRankUpdate
from lori_manager.engine.weights import AdapterWeights, one_block
from lori_manager.forward import Forward, place, real_tokens
from lori_manager.merging.least_squares import LeastSquares, Moments, Part
from lori_manager.merging.methods import DEFAULTS, MergeOptions
from lori_manager.models import BaseModel
from lori_manager.registry import Entry
from lori_manager.stages import Stage, grouped, run_watched, stages_of
from lori_manager.tasks.batches import length_batches
from lori_manager.tasks.encoding import Encoded

_BATCH = 32  # rows a forward: all modules' inputs of so many are held twice


def merge_iteris(
    base: BaseModel,
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    rows: Sequence[Sequence[Encoded]],
    options: MergeOptions = DEFAULTS,
    *,
    general: Sequence[Encoded] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> AdapterWeights:
    """All modules fitted at once, `iterations` times, each on the last merge's own inputs.

    For each module min over D of sum_t w_t E ||(W + D_t) x_t - (W + D) z_t||^2 with x_t the
    inputs in member t's own model and z_t those in the merged model of the iteration
    before; in the first z_t = x_t, which is plain regression. The target holds the
    cross moments of x and z.

    Source: IterIS, arXiv:2411.15231. Differs: the update is cut to `max_rank`, by default the
    sum of the members' ranks (the paper merges into the weights); tasks count by their
    weights alone, not also by the size of their outputs; `eps` pulls towards the mean of the
    updates where no input is. The paper shrinks what lies off the diagonal of all moments,
    which is `shrink`, by default 1: not at all. Acts on whole updates. One adapter at weight 1
    returns itself, general text or not; the order of the members does not matter but for
    rounding. `answers` and `span` are not used.

    Where the sums of all modules are more than `stages.ROOM` they are made for some modules at a
    time, by more forwards and with the same result.

    Args, errors: as of `merge_layerwise`.
    """
    members, weights, rows = regression_part(members, weights, rows)
    general = general if options.general else ()
    if len(members) == 1 and weights[0] == 1 and options.max_rank is None:
        return members[0]
    own = [member.updates() for member in members]
    names = sorted({name for one in own for name in one})
    if general:
        rows, weights, own = (
            [*rows, general],
            [*weights, sum(weights) * options.general],
            [*own, {}],
        )
    outs = {name: len(update.B) for one in own for name, update in one.items()}

    def held(stage: Stage) -> int:
        """Bytes: the moments, and of each module the target; all float64."""
        return 8 * stage.features * (stage.features + sum(outs[name] for name in stage.names))

    groups = grouped(stages_of(base, names), held)
    merged: dict[str, LowRankUpdate] = {}
    for iteration in range(options.iterations):
        found: dict[str, LowRankUpdate] = {}
        for number, group in enumerate(groups):
            fits: dict[str, LeastSquares] = {}
            with torch.no_grad():
                for t, (mine, given) in enumerate(zip(own, rows, strict=True)):
                    last = merged or mine
                    _collect(base, fits, t, weights[t], own, mine, last, given, group, options)
            found |= {n: fit.free(options.eps, options.max_rank) for n, fit in fits.items()}
            if on_progress:
                on_progress(iteration * len(groups) + number + 1, options.iterations * len(groups))
        merged = found
    return one_block(merged, next(iter(members[0].blocks[0].B.values())).dtype)


ITERIS: Entry[ModelMethod] = Entry(
    "iteris",
    merge_iteris,
    "arXiv:2411.15231",
    {
        "identity": True,
        "ordered": False,
        "needs": "answers",
        "options": ("max_rank", "eps", "shrink", "general", "iterations"),
    },
)


def _collect(
    base: BaseModel,
    fits: dict[str, LeastSquares],
    member: int,
    weight: float,
    own: Sequence[Mapping[str, LowRankUpdate]],
    mine: Mapping[str, LowRankUpdate],
    merged: Mapping[str, LowRankUpdate],
    rows: Sequence[Encoded],
    group: Sequence[Stage],
    options: MergeOptions,
) -> None:
    """Add one member's rows to every module's sums, which are made at their first use."""
    tokens = sum(len(r.ids) for r in rows)
    forward = Forward(base)
    moments: dict[str, Moments] = {}
    with forward.ready():
        for numbers in length_batches([len(r.ids) for r in rows], _BATCH):
            chosen = [rows[i] for i in numbers]
            x = _inputs(base, forward, mine, chosen, group)
            z = x if merged is mine else _inputs(base, forward, merged, chosen, group)
            for first, x_first in x.items():
                seen, along = x_first[0], z[first][0]
                share = torch.full((len(seen),), weight / tokens, device=seen.device)
                for number, name in enumerate(x_first[1]):
                    if name not in fits:
                        if number == 0:
                            moments[first] = Moments(seen.shape[1], seen.device, options.shrink)
                        parts = [Part(i, u[name]) for i, u in enumerate(own) if name in u]
                        fits[name] = LeastSquares(
                            linear_weight(base.model.get_submodule(name)), parts, moments[first]
                        )
                    if number == 0:
                        fits[name].moments.add(along, share)
                    fits[name].add(member, seen, along, share)


def _inputs(
    base: BaseModel,
    forward: Forward,
    updates: Mapping[str, LowRankUpdate],
    rows: Sequence[Encoded],
    group: Sequence[Stage],
) -> dict[str, tuple[Tensor, list[str]]]:
    """First module that sees an input -> (the input (tokens, in_features), all that see it)."""
    seen: dict[str, tuple[Tensor, list[str]]] = {}
    batch = forward.batch(rows)
    real = forward.real(batch, rows)

    def see(name: str, x: Tensor, first: str) -> None:
        if name == first:
            seen[name] = (real_tokens(x, real).float(), [])
        seen[first][1].append(name)

    layers = low_rank_layers(base.model, updates)
    names = [name for stage in group for name in stage.names]
    watched = {name: layers.get(name, base.model.get_submodule(name)) for name in names}
    calls = sum(stage.calls for stage in group)
    with attached(base.model, layers):
        run_watched(forward, place(batch, base.device), watched, see, calls)
    return seen
