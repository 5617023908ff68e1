"""The gradient of a step: rows in parts, as graphs where they pay, with less memory if asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lori_manager.errors import InvalidInput
from lori_manager.graphs import Graphed, plan_sizes
from lori_manager.labelling import Runner
from lori_manager.ranks import ranks
from lori_manager.tasks.batches import Sizes

T = TypeVar("T")


def micro_batches(rows: list[T], size: int) -> list[list[T]]:
    """A step's rows in parts of up to `size`; 0 is all at once."""
    size = size or len(rows)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


class Late:
    """A number on the device, copied to the host without waiting for it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()
        self._event = None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty((), dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def value(self) -> float:
        """The number, waited for."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._tensor)


class Gradients:
    """The mean loss of a step's rows, with its gradient left in the parameters.

    Where several processes are at it, each runs its share of the rows and all get the sum.
    """

    def __init__(
        self,
        forward: Runner,
        parameters: Sequence[nn.Parameter],
        steps: Sequence[Sequence[Sequence[Any]]],
        graphs: str,
        penalty: Callable[[], Tensor] | None = None,
    ) -> None:
        """Plan for these steps, each in parts of rows.

        Args:
            forward: what runs the rows.
            parameters: what is trained; each gets its gradient as `grad`.
            steps: of all steps to come, the parts of each.
            graphs: "auto" records and replays steps where that pays.
            penalty: a scalar that counts beside the rows' mean loss.
        """
        self._penalty = penalty
        self._forward = forward
        self._parameters = parameters
        for p in parameters:
            p.grad = torch.zeros_like(p)
        parts = [part for step in steps for part in step]
        self._graphed: Graphed | None = None
        self._sizes: dict[int, Sizes | None] = {}
        alone = ranks().world == 1  # a capture does not stand the other processes' sums
        if graphs == "auto" and alone and forward.packed and forward.base.device.type == "cuda":
            weights = sum(p.numel() for p in forward.base.model.parameters())
            planned = plan_sizes(parts, weights)
            self._sizes = {id(part): sizes for part, sizes in zip(parts, planned, strict=True)}
            self._graphed = Graphed(self._add)

    def of(self, parts: Sequence[Sequence[Any]]) -> Tensor:
        """Mean cross-entropy over what the rows of all parts teach, on the device."""
        total = None
        counted = 0
        for p in self._parameters:
            p.grad.zero_()  # type: ignore[union-attr]
        for part in map(ranks().own, parts):
            if not part:
                continue
            sizes = self._sizes.get(id(part))
            batch = self._forward.batch(part, sizes)
            counted += int(batch.counts.sum())
            if self._graphed is not None and sizes is not None:
                (loss,) = self._graphed(batch, sizes)
            else:
                (loss,) = self._add(self._forward.place(batch))
            total = loss.clone() if total is None else total + loss
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        total, every = ranks().summed(gradients, total, counted)
        for gradient in gradients:
            gradient.div_(every)
        if self._penalty is not None:
            self._add_gradient(self._penalty())
        return total / every

    def _add(self, batch: Any) -> tuple[Tensor]:
        """Add the gradient of the summed loss to the parameters' own."""
        loss = self._forward.loss(batch)
        self._add_gradient(loss)
        return (loss.detach(),)

    def _add_gradient(self, loss: Tensor) -> None:
        found = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        for p, gradient in zip(self._parameters, found, strict=True):
            if gradient is not None:
                p.grad.add_(gradient)  # type: ignore[union-attr]


@contextmanager
def checkpointed(model: Any, on: bool) -> Iterator[None]:
    """Gradient checkpointing where the model has it: less memory, a forward more.

    The model stays in eval mode: nothing but the checkpointing is switched.
    """
    if not on:
        yield
        return
    try:
        _switch(model, "enable")({"use_reentrant": False})
    except (ValueError, AttributeError) as e:
        raise InvalidInput(
            f"{type(model).__name__} has no gradient checkpointing: leave --checkpointing out"
        ) from e
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", None) is not None]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        _switch(model, "disable")()


def _switch(model: Any, verb: str) -> Callable[..., None]:
    """The model's own method, by its newer name where transformers has that."""
    newer = f"activation_checkpointing_{verb}"
    name = newer if hasattr(model, newer) else f"gradient_checkpointing_{verb}"
    method: Callable[..., None] = getattr(model, name)
    return method
