"""Regression layer by layer, on the inputs that the merged model itself produces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lori_manager.engine.core import truncated_on_inputs
from lori_manager.engine.layers import LowRankLinear, attached, low_rank_layers
from lori_manager.engine.siblings import inputs_watched
from lori_manager.engine.update import LowRankUpdate, concat_updates
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.errors import InvalidInput
from lori_manager.forward import Forward, place
from lori_manager.models import BaseModel
from lori_manager.registry import Entry
from lori_manager.tasks.encoding import Encoded


@dataclass(frozen=True)
class _Part:
    """One block of one member: its place in the result and its factors by module."""

    member: int
    updates: Mapping[str, LowRankUpdate]


class _Reached(Exception):
    """The layer that was waited for is about to be called with this input."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def merge_layerwise(
    base: BaseModel,
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    rows: Sequence[Sequence[Encoded]],
    *,
    eps: float = 1e-3,
    max_rank: int | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> AdapterWeights:
    """Every B kept, every A aimed anew, from the first decoder block to the last.

    For each module, with x_t what member t's own model gives it, X_t what the merged
    model gives it (all modules before it being merged already) and y_t = (W + D_t) x_t:
    min over A' of sum_t w_t E ||y_t - (W + B A') X_t||^2, where B holds the members' B side
    by side. So each module also makes good, as far as the span of B allows, what the
    modules before it lost. `eps` times the mean diagonal of the moments pulls
    directions that no input takes to the mean of the updates.

    Source: RegMean (arXiv:2212.09849), on the merged model's inputs in forward order as
    RegMean++ (arXiv:2508.03121) does, with the cross moments of IterIS (arXiv:2411.15231);
    differs from them in fitting the whole output over the span of all B.

    Args:
        base: the model; left as it was.
        members, weights: adapters and what each one's task counts, none negative.
        rows: for each member its probe rows; all of their tokens count.
        max_rank: each module's update is cut to the one of that rank that errs least on the
            merged model's inputs, before the next module is fitted, which makes good what
            that loses. The result is one dense block then.
        on_block: called with (blocks done, blocks in all).
    Raises:
        InvalidInput: a model without a list of decoder blocks, negative weights.
    """
    if min(weights) < 0:
        raise InvalidInput("`weights` of a regression must not be negative")
    counting = [i for i, weight in enumerate(weights) if weight > 0]
    if not counting:
        raise InvalidInput("`weights` of a regression must not all be 0")
    members, rows = [members[i] for i in counting], [rows[i] for i in counting]
    weights = [weights[i] for i in counting]
    if len(members) == 1 and weights[0] == 1 and max_rank is None:
        return members[0]
    parts = [_Part(i, b.updates()) for i, m in enumerate(members) for b in m.blocks]
    names = sorted({name for part in parts for name in part.updates})
    prefix, blocks = _blocks(base.model, names)
    forward = Forward(base)
    aims: list[dict[str, Tensor]] = [{} for _ in parts]
    cut: dict[str, LowRankUpdate] = {}
    smaller = False
    with torch.no_grad(), forward.ready():
        streams = [_Stream(base, forward, own, blocks) for own in rows]
        own_layers = [low_rank_layers(base.model, member.updates()) for member in members]
        for number, block in enumerate(blocks):
            inside = [n for n in names if n.startswith(f"{prefix}.{number}.")]
            own = [
                s.own_pass(number, block, base.model, own_layers[t], inside)
                for t, s in enumerate(streams)
            ]
            merged: dict[str, nn.Module] = {}
            for group in _stages(own):
                mixed = [s.input_of(number, block, base.model, merged, group[0]) for s in streams]
                for name in group:
                    found, root = _solve(base.model, name, parts, weights, own, mixed, eps)
                    for aim, A in zip(aims, found, strict=True):
                        if A is not None:
                            aim[name] = A
                    update = _stacked(parts, aims, name)
                    if max_rank is not None:
                        smaller = smaller or update.rank > max_rank
                        update = truncated_on_inputs(update, root.cpu(), max_rank)
                        cut[name] = update
                    merged[name] = LowRankLinear(base.model.get_submodule(name), update)
            for s in streams:
                s.advance(number, block, base.model, merged)
            if on_block:
                on_block(number + 1, len(blocks))
    if smaller:
        folded = {name: update.folded() for name, update in cut.items()}
        B = {name: u.B.contiguous() for name, u in folded.items()}
        return AdapterWeights(
            (Block(B, 1.0, tensors={name: u.A.contiguous() for name, u in folded.items()}),)
        )
    out, at = [], 0
    for member in members:
        for old in member.blocks:
            dtype = next(iter(old.B.values())).dtype
            aimed = {n: aims[at][n].to("cpu", dtype).contiguous() for n in old.B}
            out.append(Block(old.B, old.scaling, tensors=aimed, mask=old.mask))
            at += 1
    return AdapterWeights(tuple(out))


LAYERWISE: Entry[Callable[..., AdapterWeights]] = Entry(
    "layerwise",
    merge_layerwise,
    "arXiv:2212.09849 in forward order",
    {"identity": True, "ordered": False, "needs": "model"},
)


def _blocks(model: nn.Module, names: Sequence[str]) -> tuple[str, nn.ModuleList]:
    """The decoder blocks that hold all of the modules, and their name in the model."""
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and all(n.startswith(f"{prefix}.") for n in names):
            return prefix, module
    raise InvalidInput(f"{type(model).__name__} has no list of blocks: use `--method regmean`")


class _Stream:
    """One member's probe tokens on their way through the blocks, by its model and the merged."""

    def __init__(
        self, base: BaseModel, forward: Forward, rows: Sequence[Encoded], blocks: nn.ModuleList
    ) -> None:
        batch = forward.batch(list(rows))
        self.real = forward.real(batch, rows)
        self.given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            first.append(args[0] if args else kwargs.pop("hidden_states"))
            self.given.append((args[1:], kwargs))

        hooks = [b.register_forward_pre_hook(hook, with_kwargs=True) for b in blocks]
        try:
            forward.run(place(batch, base.device))
        finally:
            for one in hooks:
                one.remove()
        self.own = self.mixed = first[0]

    def _call(self, number: int, block: nn.Module, x: Tensor) -> Tensor:
        args, kwargs = self.given[number]
        out: Any = block(x, *args, **kwargs)
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden

    def _flat(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return flat if self.real is None else flat[self.real]

    def own_pass(
        self,
        number: int,
        block: nn.Module,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        names: Sequence[str],
    ) -> dict[str, Tensor]:
        """The block with the member's own adapter; inputs by module in the order of calls."""
        seen: dict[str, Tensor] = {}

        def see(name: str, x: Tensor, first: str) -> None:
            # The same tensor for those that see the same input: the same stage.
            seen[name] = self._flat(x) if name == first else seen[first]

        with (
            attached(model, {n: layers[n] for n in names if n in layers}),
            inputs_watched({n: model.get_submodule(n) for n in names}, see),
        ):
            self.own = self._call(number, block, self.own)
        missing = [n for n in names if n not in seen]
        if missing:
            raise InvalidInput(
                f"{missing[0]} is not called in every forward: use `--method concat`"
            )
        return seen

    def input_of(
        self,
        number: int,
        block: nn.Module,
        model: nn.Module,
        merged: Mapping[str, nn.Module],
        name: str,
    ) -> Tensor:
        """What the merged model gives the module, those before it in the block being merged."""

        def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _Reached(inputs[0])

        hook = model.get_submodule(name).register_forward_pre_hook(stop)
        try:
            with attached(model, merged):
                self._call(number, block, self.mixed)
        except _Reached as reached:
            return self._flat(reached.x)
        finally:
            hook.remove()
        raise InvalidInput(f"{name} is not called in every forward: use `--method concat`")

    def advance(
        self, number: int, block: nn.Module, model: nn.Module, merged: Mapping[str, nn.Module]
    ) -> None:
        """The merged block, for the next one's input."""
        with attached(model, merged):
            self.mixed = self._call(number, block, self.mixed)


def _stages(own: Sequence[Mapping[str, Tensor]]) -> list[list[str]]:
    """Modules in the order of their calls, those that see one input together."""
    stages: list[list[str]] = []
    for name, x in own[0].items():
        if stages and own[0][stages[-1][0]] is x:
            stages[-1].append(name)
        else:
            stages.append([name])
    return stages


def _solve(
    model: nn.Module,
    name: str,
    parts: Sequence[_Part],
    weights: Sequence[float],
    own: Sequence[Mapping[str, Tensor]],
    mixed: Sequence[Tensor],
    eps: float,
) -> tuple[list[Tensor | None], Tensor]:
    """A' of each part, (rank, in_features), None where a part lacks the module; and the root
    of the moments, see `truncated_on_inputs`."""
    base: Any = model.get_submodule(name)
    W = base.weight if isinstance(base, nn.Linear) else base.weight.t()
    device = W.device
    having = [p for p in parts if name in p.updates]
    Bs = [(p.updates[name].B * p.updates[name].scaling).to(device, torch.float32) for p in having]
    As = [p.updates[name].A.to(device, torch.float32) for p in having]
    moments = torch.zeros(W.shape[1], W.shape[1], dtype=torch.float64, device=device)
    target = torch.zeros(W.shape, dtype=torch.float64, device=device)
    for t, (mine, other) in enumerate(zip(own, mixed, strict=True)):
        x, z = mine[name].float(), other.float()
        share = float(weights[t]) / len(x)
        y = (x - z) @ W.float().t()
        for p, B, A in zip(having, Bs, As, strict=True):
            if p.member == t:
                y += (x @ A.t()) @ B.t()
        moments += (z.t() @ z).double() * share
        target += (y.t() @ z).double() * share
    e = eps * float(moments.diagonal().mean()) or 1.0
    B = torch.cat(Bs, dim=1).double()
    tasks = len({p.member for p in having})
    target += (B @ torch.cat(As).double()) * (e / tasks)
    moments.diagonal().add_(e)
    factor = torch.linalg.cholesky(moments)
    pull = torch.linalg.pinv(B, rtol=1e-6) @ target
    found = torch.cholesky_solve(pull.t(), factor).t().float()
    pieces = iter(torch.split(found, [len(A) for A in As]))
    return [next(pieces) if name in p.updates else None for p in parts], factor


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
