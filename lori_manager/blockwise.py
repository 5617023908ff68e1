"""Probe rows on their way through a model's decoder blocks, two ways at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lori_manager.engine.layers import attached
from lori_manager.engine.siblings import inputs_watched
from lori_manager.errors import InvalidInput
from lori_manager.forward import real_tokens
from lori_manager.labelling import Runner
from lori_manager.models import BaseModel


class _Reached(Exception):
    """The layer that was waited for is about to be called with this input."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def decoder_blocks(model: nn.Module, names: Sequence[str]) -> tuple[str, nn.ModuleList]:
    """The decoder blocks that hold all of the modules, and their name in the model."""
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and all(n.startswith(f"{prefix}.") for n in names):
            return prefix, module
    raise InvalidInput(f"{type(model).__name__} has no list of blocks: use `--method regmean`")


class Stream:
    """One member's probe tokens on their way through the blocks, by its model and the merged."""

    def __init__(
        self, base: BaseModel, forward: Runner, rows: Sequence[Any], blocks: nn.ModuleList
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
            forward.run(forward.place(batch))
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
        return real_tokens(x, self.real)

    def token_weights(self, rows: Sequence[Any], answers: float) -> Tensor:
        """The weight of every real token, (tokens,) float32 of sum 1.

        Args:
            rows: as given.
            answers: share on the places that answers are read from, see `Encoded.read_from`.
        """
        places = []
        # Rows of images are all as long as each other, and nothing of theirs says how long.
        alike = self.real is None and self.own.shape[0] == len(rows)
        for row in rows:
            place = torch.zeros(self.own.shape[1] if alike else row.length)
            place[row.read_from] = 1.0
            places.append(place)
        at = torch.cat(places)
        weights = (1 - answers) / len(at) + at * (answers / float(at.sum()))
        return weights.to(self.own.device)

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
