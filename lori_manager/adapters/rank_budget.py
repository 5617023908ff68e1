"""AdaLoRA's allocation of ranks (arXiv:2303.10512, section 3.2), over all modules at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Triplets:
    """One module's A (rank, in), E (rank, 1), B (out, rank): a triplet is row, value, column."""

    A: nn.Parameter
    E: nn.Parameter
    B: nn.Parameter


@dataclass(frozen=True)
class Schedule:
    """How many triplets are left after each step, and how their sensitivity is smoothed.

    Attributes:
        begin, end: triplets over all modules before the first cut, and after the last.
        tinit: steps before the first cut.
        last: the step of the last cut; after it what is left stays.
        every: steps between cuts.
        beta1, beta2: share of the past in the smoothed sensitivity, and in its uncertainty.
    """

    begin: int
    end: int
    tinit: int
    last: int
    every: int
    beta1: float
    beta2: float

    def left(self, step: int) -> int | None:
        """Triplets to keep after that step, falling by a cubic; None where nothing is cut."""
        if step != self.last and (step <= self.tinit or step % self.every):
            return None
        share = (self.last - step) / (self.last - self.tinit)
        return int((self.begin - self.end) * share**3 + self.end)


class RankBudget:
    """Which triplets are left. As PEFT's `RankAllocator`, without waiting for the device.

    A triplet's score is that of its value in E and the means over its row of A and its column
    of B; an entry's is its smoothed |value x gradient| times how much that varies.
    """

    def __init__(self, modules: Mapping[str, Triplets], schedule: Schedule) -> None:
        self._modules, self._schedule = modules, schedule
        self._parameters = {
            f"{name}.{part}": getattr(triplets, part)
            for name, triplets in modules.items()
            for part in ("A", "E", "B")
        }
        self._sensitivity = {n: torch.zeros_like(p) for n, p in self._parameters.items()}
        self._uncertainty = {n: torch.zeros_like(p) for n, p in self._parameters.items()}
        self._kept: Tensor | None = None  # bool (modules, rank)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Learn from the gradients of the step done, counted from 1, and cut where it is time."""
        plan = self._schedule
        if step < plan.last:
            self._learn()
        left = plan.left(step) if step <= plan.last else None
        if left is not None:
            scores = self._scores()
            least = torch.kthvalue(scores.flatten(), plan.begin - left).values
            self._kept = scores > least
        if self._kept is not None and (left is not None or step > plan.last):
            E = torch.stack([m.E.flatten() for m in self._modules.values()])
            E = E.where(self._kept, 0.0)
            for m, values in zip(self._modules.values(), E.unbind(), strict=True):
                m.E.copy_(values.view_as(m.E))

    def _learn(self) -> None:
        beta1, beta2 = self._schedule.beta1, self._schedule.beta2
        parameters = list(self._parameters.values())
        smoothed, uncertain = list(self._sensitivity.values()), list(self._uncertainty.values())
        found = torch._foreach_mul(parameters, [p.grad for p in parameters])
        torch._foreach_abs_(found)
        torch._foreach_mul_(smoothed, beta1)
        torch._foreach_add_(smoothed, found, alpha=1 - beta1)
        torch._foreach_sub_(found, smoothed)
        torch._foreach_abs_(found)
        torch._foreach_mul_(uncertain, beta2)
        torch._foreach_add_(uncertain, found, alpha=1 - beta2)

    def _scores(self) -> Tensor:
        """Of every triplet, (modules, rank)."""
        names = list(self._parameters)
        products = torch._foreach_mul(
            list(self._sensitivity.values()), list(self._uncertainty.values())
        )
        entry = dict(zip(names, products, strict=True))
        total = torch.stack([entry[f"{name}.E"].flatten() for name in self._modules])
        for part, over in (("A", -1), ("B", -2)):
            own = [entry[f"{name}.{part}"] for name in self._modules]
            total += torch.stack(by_shape(own, partial(torch.mean, dim=over)))
        return total

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        held = {f"sensitivity|{n}": t for n, t in self._sensitivity.items()}
        held |= {f"uncertainty|{n}": t for n, t in self._uncertainty.items()}
        return held if self._kept is None else held | {"kept": self._kept}

    def load_state(self, held: Mapping[str, Tensor]) -> None:
        """What `state` gave."""
        for own, key in ((self._sensitivity, "sensitivity"), (self._uncertainty, "uncertainty")):
            for name, tensor in own.items():
                tensor.copy_(held[f"{key}|{name}"])
        if "kept" in held:
            self._kept = held["kept"].to(next(iter(self._sensitivity.values())).device)


def orthogonality(modules: Mapping[str, Triplets]) -> Tensor:
    """Mean over all A and B of the Frobenius norms of A A' - I and B'B - I, a scalar."""
    norms: list[Tensor] = []
    for factors in ([m.A for m in modules.values()], [m.B.T for m in modules.values()]):
        norms += by_shape(factors, _off_identity)
    return torch.stack(norms).mean()


def _off_identity(rows: Tensor) -> Tensor:
    """(n, rank, any) -> (n,)"""
    products = rows @ rows.mT
    eye = torch.eye(products.shape[-1], dtype=rows.dtype, device=rows.device)
    norms: Tensor = torch.linalg.matrix_norm(products - eye)
    return norms


def by_shape(tensors: Sequence[Tensor], work: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What `work` gives for each tensor, done once a shape: it gets stacks, and gives stacks.

    >>> [t.tolist() for t in by_shape([torch.ones(2), torch.ones(3), torch.zeros(2)],
    ...                               lambda t: t.sum(-1))]
    [2.0, 3.0, 0.0]
    """
    places: dict[torch.Size, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        places[tensor.shape].append(i)
    found: dict[int, Tensor] = {}
    for indices in places.values():
        stack = work(torch.stack([tensors[i] for i in indices]))
        found |= dict(zip(indices, stack.unbind(), strict=True))
    return [found[i] for i in range(len(tensors))]
