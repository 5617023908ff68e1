"""Several processes at one training, as `torchrun` or `accelerate launch` start them.

All of them run the same code on the same workspace. Rank 0 alone reads and writes the store's
records: the others are handed its answers (see `led_store`), so that they cannot take another
way. The rows of every step and of every scoring are split over the ranks, and what they found is
summed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lori_manager.errors import EndedElsewhere, InvalidInput, LoriError, first_line

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

T = TypeVar("T")

PATIENCE = timedelta(hours=6)  # for a rank that works while the others have nothing to do
MOST_SUMMED = 1 << 26  # values that are sent at once


@dataclass
class Ranks:
    """The processes at this work, and which one this is."""

    rank: int = 0
    world: int = 1
    _apart: bool = False
    _store: Any = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes and tells."""
        return self.rank == 0

    def own(self, rows: Sequence[T]) -> Sequence[T]:
        """This rank's share of some rows."""
        return rows if self.world == 1 else rows[self.rank :: self.world]

    def led(self, action: Callable[[], T], name: str = "") -> T:
        """What rank 0 gets from `action`, on every rank; nobody else does it.

        Args:
            action: what may fail with a LoriError, which then every rank raises.
            name: checked to be the same on all ranks.
        Raises:
            EndedElsewhere: rank 0 has ended.
        """
        if self.world == 1 or (self._apart and self.first):
            return action()
        failure: LoriError | None = None
        told: list[Any] = [name, None, None]
        if self.first:
            try:
                found = action()
                told[1] = list(found) if isinstance(found, Iterator) else found
            except LoriError as e:
                failure = told[2] = e
        self._collective(lambda dist: dist.broadcast_object_list(told, src=0, device=_cpu()))
        if told[0] != name:
            raise EndedElsewhere(f"rank {self.rank} asks for {name!r}, rank 0 for {told[0]!r}")
        if told[2] is not None:
            raise failure or told[2]
        return cast(T, told[1])

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, rank 0 tidies up after a failure and nobody listens any more."""
        was, self._apart = self._apart, True
        try:
            yield
        finally:
            self._apart = was

    def alike(self, tensors: Sequence[Tensor]) -> None:
        """Give every rank the values that rank 0 has, in place."""
        import torch

        if self.world == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([t.detach().reshape(-1) for t in bucket])
            self._collective(partial(_from_first, flat))
            with torch.no_grad():
                for t, part in zip(
                    bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True
                ):
                    t.copy_(part.view_as(t))

    def summed(
        self, gradients: Sequence[Tensor], total: Tensor | None, counted: int
    ) -> tuple[Tensor, Tensor | int]:
        """Sums over all ranks; every rank has the same bits after.

        Args:
            gradients: float32, summed in place.
            total: a scalar on their device; None where this rank had no rows.
            counted: an integer.
        Returns:
            `total` and `counted` of all ranks.
        """
        import torch

        if total is None:
            if self.world == 1:
                raise ValueError("a step needs at least one row")
            total = torch.zeros((), device=gradients[0].device)
        if self.world == 1:
            return total, counted
        for bucket in _buckets(gradients):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            self._collective(partial(_sum, flat))
            parts = torch.split(flat, [g.numel() for g in bucket])
            for g, part in zip(bucket, parts, strict=True):
                g.copy_(part.view_as(g))
        both = torch.stack([total.double(), torch.tensor(counted).to(total.device).double()])
        self._collective(partial(_sum, both))
        return both[0].to(total.dtype), both[1].to(total.dtype)

    def by_row(
        self,
        count: int,
        score: Callable[[Sequence[int]], tuple[np.ndarray, np.ndarray | None]],
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Outcomes and weights of `count` rows, each scored by one rank.

        Args:
            score: gives those of some rows by their numbers.
        Returns:
            As if one rank had scored all: (count,) outcomes, (count,) weights or None.
        """
        import numpy as np

        numbers = range(count)
        if self.world == 1 or count < self.world:  # too few to give every rank one
            return score(numbers)
        mine = score(self.own(numbers))
        shares: list[Any] = [None] * self.world
        self._collective(lambda dist: dist.all_gather_object(shares, mine))
        outcomes = np.empty(count, mine[0].dtype)
        weights = np.ones(count, np.float32)
        for rank, (own, weighed) in enumerate(shares):
            outcomes[rank :: self.world] = own
            if weighed is not None:
                weights[rank :: self.world] = weighed
        return outcomes, None if all(w is None for _, w in shares) else weights

    def may_tell(self) -> bool:
        """Whether this rank is the first to tell of a failure: what the others meet follows."""
        if self._store is None:
            return True
        try:
            return bool(self._store.add("lori/told", 1) == 1)
        except RuntimeError:  # whoever keeps that count has ended
            return self.first

    def _collective(self, act: Callable[[Any], object]) -> None:
        import torch.distributed as dist

        if self._apart:
            raise EndedElsewhere("another process of this training has ended")
        try:
            act(dist)
        except RuntimeError as e:
            raise EndedElsewhere(
                f"another process of this training has ended ({first_line(e)}): the same command "
                "goes on from the last checkpoint"
            ) from e


_now = Ranks()


def ranks() -> Ranks:
    """The processes at this work; this one alone unless they were `joined`."""
    return _now


def launched(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes a launcher has started for this command; 1 without one."""
    if "RANK" not in environment or "MASTER_ADDR" not in environment:
        return 1
    try:
        return int(environment["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 1


@contextmanager
def joined() -> Iterator[Ranks]:
    """Work together with the other processes that the launcher started, inside.

    Each rank takes the GPU of its number on its machine, where there are any.
    Raises:
        InvalidInput: the processes do not find one another, or are more than there are GPUs.
    """
    global _now
    world = launched()
    if world == 1:
        yield _now
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
    if gpus and here > gpus:  # every one of them ends, so that none waits for another
        raise InvalidInput(
            f"there are {gpus} GPUs for {here} processes here: start at most {gpus} "
            f"(torchrun --nproc-per-node {gpus})"
        )
    if gpus:
        torch.cuda.set_device(local)
    try:
        store, rank, world = next(rendezvous("env://", timeout=PATIENCE))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank, world_size=world,
            timeout=PATIENCE,
        )  # fmt: skip
    except (RuntimeError, ValueError) as e:
        raise InvalidInput(f"the processes do not find one another: {first_line(e)}") from e
    alone, _now = _now, Ranks(rank, world, _store=store)
    # No `finally`: after a failure the others may be anywhere, and this process can but end.
    yield _now
    _now._collective(lambda dist: dist.barrier())
    dist.destroy_process_group()
    _now = alone


class _LedStore:
    """A store whose records rank 0 alone reads and writes; the others hear its answers.

    Objects are read by every rank for itself, each as many as it needs: their names are the
    digests of what is in them, so that no two ranks can see different ones.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self.root, self.runs, self.objects = store.root, store.runs, store.objects

    def __getattr__(self, name: str) -> Any:
        def ask(*args: Any, **options: Any) -> Any:
            return ranks().led(lambda: getattr(self._store, name)(*args, **options), name)

        return ask

    def close(self) -> None:
        """Nobody waits for the others here: they may have ended."""
        self._store.close()


def led_store(open_store: Callable[[], T]) -> T:
    """A store of which rank 0 holds the records; alone, the store itself."""
    if ranks().world == 1:
        return open_store()
    mine: list[T] = []
    ranks().led(lambda: mine.append(open_store()), "open")  # whatever it has to do, it does alone
    return cast(T, _LedStore(mine[0] if mine else open_store()))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in their order, together at most `MOST_SUMMED` values, or one larger."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > MOST_SUMMED:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def _sum(tensor: Tensor, dist: Any) -> None:
    dist.all_reduce(tensor)


def _from_first(tensor: Tensor, dist: Any) -> None:
    dist.broadcast(tensor, src=0)


def _cpu() -> Any:
    import torch

    return torch.device("cpu")
