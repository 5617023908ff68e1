"""Prompts -> features of the base alone -> a router, and the merge that keeps all members."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lori_manager.blockwise import decoder_blocks
from lori_manager.consolidation import ModelMethod, check_counts, prompts_of
from lori_manager.engine.router import Router, fit_router
from lori_manager.engine.weights import AdapterWeights, routed_adapter
from lori_manager.errors import InvalidInput
from lori_manager.forward import Forward, place, real_tokens
from lori_manager.merging.methods import DEFAULTS, MergeOptions
from lori_manager.models import BaseModel
from lori_manager.registry import Entry
from lori_manager.tasks.batches import length_batches
from lori_manager.tasks.encoding import Encoded

DEPTHS = (0.25, 0.5, 0.75)  # of the decoder, where features may be read
BATCH = 32  # prompts a forward


class _Enough(Exception):
    """All that is wanted was seen: the rest of the forward need not run."""


def features_of(
    base: BaseModel,
    rows: Sequence[Encoded],
    names: Sequence[str],
    batch: int,
    packing: str = "auto",
) -> dict[str, Tensor]:
    """What the model makes of prompts on its way: two vectors a prompt.

    A token's state is the input of a decoder block, scaled to length 1, since a few states
    (a first token's, above all) are hundreds of times as long as the rest. Features are the
    mean of all the prompt's states and the last one, (rows, 2 * hidden).

    Args:
        base: the model without any adapter. It runs up to the last of `names` only.
        rows: their prompts alone are read, whatever completions they have.
        names: of decoder blocks, in the order in which they are called.
        batch: rows a forward; it changes the result by rounding only.
        packing: see `Forward`.
    Returns:
        Name -> float32 (rows, 2 * hidden) on the model's device, in the rows' order.
    Raises:
        InvalidInput: a block that the model does not have, or does not call.
    """
    prompts = prompts_of(rows)
    forward = Forward(base, packing=packing)
    found: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in names}
    with torch.no_grad(), forward.ready():
        for numbers in length_batches([len(p.ids) for p in prompts], batch):
            chosen = [prompts[i] for i in numbers]
            given = forward.batch(chosen)
            real = forward.real(given, chosen)
            states = _states(forward, place(given, base.device), names)
            for name, state in states.items():
                own = F.normalize(real_tokens(state, real).float(), dim=1)
                parts = torch.split(own, [len(p.ids) for p in chosen])
                vectors = [torch.cat([part.mean(0), part[-1]]) for part in parts]
                found[name] += zip(numbers.tolist(), vectors, strict=True)
    return {
        name: torch.stack([v for _, v in sorted(pairs, key=lambda pair: pair[0])])
        for name, pairs in found.items()
    }


def _states(forward: Forward, batch: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Name -> what the block is given, from one forward that ends at the last of them."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name] = args[0] if args else kwargs["hidden_states"]
            if len(seen) == len(names):
                raise _Enough

        return hook

    hooks = []
    try:
        for name in names:
            block = forward.base.model.get_submodule(name)
            hooks.append(block.register_forward_pre_hook(watch(name), with_kwargs=True))
        forward.run(batch)
    except _Enough:
        return seen
    except AttributeError as e:
        if len(hooks) == len(names):
            raise
        raise InvalidInput(f"the router reads {names[len(hooks)]}, which the base lacks") from e
    finally:
        for one in hooks:
            one.remove()
    missing = [name for name in names if name not in seen]
    raise InvalidInput(f"the router reads {missing[0]}, which the base does not call")


def build_router(
    base: BaseModel,
    modules: Sequence[str],
    rows: Sequence[Sequence[Encoded]],
    priors: Sequence[float],
    batch: int,
) -> Router:
    """The router of members, read at the depth where held-out prompts are told apart best.

    Best is the largest mean log share of the right member: on a few prompts depths that
    make equally many mistakes differ in how sure they are of them.

    Args:
        base: the model without any adapter.
        modules: names of modules that the members update, which lie in decoder blocks.
        rows: for each member rows of its tasks; their prompts alone count.
        priors: how often each member is wanted.
        batch: rows a forward.
    Raises:
        InvalidInput: a member with one prompt only, a model without a list of blocks.
    """
    if min(map(len, rows)) < 2:
        raise InvalidInput("a router needs two probe prompts of each member or more")
    prefix, blocks = decoder_blocks(base.model, modules)
    last = len(blocks) - 1
    depths = sorted({min(max(int(len(blocks) * share), 1), last) for share in DEPTHS})
    names = [f"{prefix}.{depth}" for depth in depths]
    ends = [len(own) for own in rows]
    found = features_of(base, [row for own in rows for row in own], names, batch)
    if base.device.type == "mps":  # which has no float64
        found = {name: features.cpu() for name, features in found.items()}
    fits = [fit_router(torch.split(found[name], ends), name, priors) for name in names]
    return max(fits, key=lambda fit: fit[1])[0]


def merge_routed(
    base: BaseModel,
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    rows: Sequence[Sequence[Encoded]],
    options: MergeOptions = DEFAULTS,
    *,
    general: Sequence[Encoded] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> AdapterWeights:
    """Every member kept as it is; for each input one acts, chosen by its prompt.

    The choice is a linear discriminant on what the base, without any adapter, makes of the
    prompt: closed form on probe prompts, no training, no labels but whose prompts they are.
    One adapter returns itself, whatever its weight; the order of the members does not matter.

    Args:
        base: the model; left as it was.
        members: adapters, none routed itself.
        weights: how often each member is wanted (the prior of the choice), positive.
        rows: for each member its probe rows, whose prompts alone are read.
        options: `max_rank` must be None, since nothing is cut; no other counts.
        general, on_progress: not used: text of no task has no member, and it takes seconds.
    Raises:
        InvalidInput: weights or options that mean nothing here, too few rows.
        ValueError: no members, or not one weight and one set of rows per member.
    """
    check_counts(members, weights, rows)
    if options.max_rank is not None:
        raise InvalidInput("`routed` keeps every member whole: leave --max-rank out")
    if not min(weights) > 0:
        raise InvalidInput(
            "`weights` of routed members say how often each is wanted: expected positive "
            f"numbers, got {', '.join(f'{w:g}' for w in weights)}"
        )
    if len(members) == 1:
        return members[0]
    modules = sorted({name for member in members for name in member.modules})
    return routed_adapter(members, build_router(base, modules, rows, weights, BATCH))


ROUTED: Entry[ModelMethod] = Entry(
    "routed",
    merge_routed,
    "10.2202/1544-6115.1175 on states of the base",
    {"identity": True, "ordered": False, "needs": "labels", "options": ()},
)
