"""What a kind of adapter gives to training and to use, and where it is found.

Every kind but LoRI is a module of `adapters/` by its name, with

    training(base, config, *, steps, start=None)   a context manager: puts what trains into the
                                                   model, yields a `Training`, takes it out again

and, only of kinds that are no low-rank update,

    applied(base, weights)                         a context manager: the stored adapter acts in
                                                   the model
    write(weights, directory, told)                the form that `lori export` writes
    check(model, weights)                          refuses what does not fit, of `own_form`
    write_full(weights, folder, directory, *, fingerprint, told)
                                                   base and adapter as one model, where that
                                                   can be
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lori_manager.config import Config
from lori_manager.engine.weights import KindWeights, Stored
from lori_manager.errors import InvalidInput
from lori_manager.models import BaseModel


@dataclass(frozen=True)
class Training:
    """What the training loop needs of the modules that it trains.

    Attributes:
        parameters: name -> float32 parameter; AdamW moves these and nothing else.
        weights: what is stored once they are trained, its values in that dtype.
        penalty: added to the mean loss of every step, a scalar with gradient.
        after_step: called with the number of steps done, after each step of the optimizer,
            gradients still in place.
        state, load_state: what a checkpoint must hold beside parameters and moments.
        packs: whether rows may stand side by side in one sequence.
        graphs: whether a CUDA graph may hold its forward and backward.
        rates: name -> peak learning rate, of parameters that have one of their own.
        notes: what the user should hear before it begins, a sentence each.
        facts: plain values, kept with the adapter.
    """

    parameters: Mapping[str, nn.Parameter]
    weights: Callable[[torch.dtype], Stored]
    penalty: Callable[[], Tensor] | None = None
    after_step: Callable[[int], None] | None = None
    state: Callable[[], dict[str, Tensor]] | None = None
    load_state: Callable[[Mapping[str, Tensor]], None] | None = None
    packs: bool = True
    graphs: bool = True
    rates: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class KindModule(Protocol):
    """The functions of a kind's module."""

    def training(
        self, base: BaseModel, config: Config, *, steps: int, start: Stored | None = None
    ) -> AbstractContextManager[Training]:
        """Put what trains into the model.

        Args:
            base: the frozen base; the same again after.
            config: resolved, see `kinds.resolved`.
            steps: that the optimizer will make.
            start: an adapter to go on from; None is the kind's own beginning, drawn from
                `config.seed` alone.
        Raises:
            InvalidInput: settings that the base cannot have, a start that cannot be gone
                on from.
        """

    def applied(self, base: BaseModel, weights: KindWeights) -> AbstractContextManager[None]:
        """Let a stored adapter act in the model, for a forward and for `generate`."""

    def write(self, weights: KindWeights, directory: Path, told: Mapping[str, Any]) -> None:
        """Write the adapter for use elsewhere, see `staging.staged_directory`.

        Args:
            weights: as stored.
            directory: made if missing; whole or without what a loader reads first.
            told: `folder`, the base's, and the keyword arguments of `peft_export.write_peft`.
        """

    def check(self, model: nn.Module, weights: KindWeights) -> None:
        """Refuse an adapter that does not fit a model, which may be on the meta device.

        Raises:
            WrongBase: it was made for another.
        """


def module_of(kind: str) -> KindModule:
    """The module of a kind.

    Raises:
        InvalidInput: there is none in this lori.
    """
    name = f"{__package__}.{kind}"
    try:
        return cast(KindModule, importlib.import_module(name))
    except ModuleNotFoundError as e:
        if e.name != name:
            raise
        raise InvalidInput(f"this lori has no kind {kind!r}: update it") from e


def no_start(kind: str, start: Stored | None) -> None:
    """Refuse to go on from an adapter, for kinds that cannot.

    Raises:
        InvalidInput: `start` is given.
    """
    if start is not None:
        raise InvalidInput(
            f"a training of kind `{kind}` begins at the base: leave --from and --sequence out"
        )


def own_start(kind: str, start: Stored | None) -> KindWeights | None:
    """The adapter to go on from, where it is of that very kind.

    Raises:
        InvalidInput: it is of another.
    """
    if start is None:
        return None
    if not isinstance(start, KindWeights) or start.kind != kind:
        found = start.kind if isinstance(start, KindWeights) else "a low-rank update"
        raise InvalidInput(
            f"a training of kind `{kind}` goes on from adapters of that kind, got {found}: "
            "leave --from out, or train with the parent's kind"
        )
    return start
