"""Whole forwards and backwards as CUDA graphs: a small model's step without launch gaps."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from lori_manager.errors import first_line
from lori_manager.forward import DeviceBatch, as_batch, flatten
from lori_manager.tasks.batches import Batch, Sizes
from lori_manager.tasks.encoding import Encoded

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=tuple[Tensor, ...])
WARMUP = 2  # times that the first sizes run as usual before they are captured; others once
WORTH = 6  # sizes that come up less often than this are not captured
MOST = 4  # different sizes, each captured in about half a second, ...
EACH = 32  # ... one for so many batches
# Above this many multiplications a pass hides its launches by itself (about 40 ms).
LARGE = 5e12


def plan_sizes(batches: Sequence[Sequence[Encoded]], weights: int) -> list[Sizes | None]:
    """For each batch the sizes to fill it up to, None where a graph would not pay.

    Args:
        batches: rows of each, in the order in which they will come.
        weights: how many the model has.

    The batches are put into up to `MOST` classes of equal count by their tokens, so
    that few graphs serve all.
    """
    if not batches:
        return []
    tokens = [sum(len(row.ids) for row in rows) for rows in batches]
    longest = max(len(row.ids) for rows in batches for row in rows)
    wanted = max(sum(len(r.ids) - max(r.prompt_length, 1) for r in rows) for rows in batches)
    rows = max(len(b) for b in batches)
    ordered = sorted(tokens)
    classes = min(MOST, max(1, len(batches) // EACH))
    tops = sorted({
        64 * math.ceil(ordered[math.ceil(len(ordered) * (i + 1) / classes) - 1] / 64)
        for i in range(classes)
    })  # fmt: skip
    out = []
    for count in tokens:
        top = next(t for t in tops if t >= count)
        out.append(Sizes(top, 64 * math.ceil(wanted / 64), rows, longest))
    # What fills up is a row of its own, which may be the longest.
    gaps = {s: max(s.tokens - n for o, n in zip(out, tokens, strict=True) if o == s) for s in out}
    fitting = {s: Sizes(s.tokens, s.wanted, s.rows, max(longest, gap)) for s, gap in gaps.items()}
    pays = {s for s in fitting if out.count(s) >= WORTH and s.tokens * weights <= LARGE}
    return [fitting[s] if s in pays else None for s in out]


@contextmanager
def no_collection() -> Iterator[None]:
    """What the collector frees may call the driver, and a capture does not survive that."""
    gc.collect()
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


class Graphed:
    """A function of a batch, captured once for each size and then replayed.

    The function must only launch work: no value may come back to the host in it. What
    it returns must be used before the next call.
    """

    def __init__(self, run: Callable[[DeviceBatch], T]) -> None:
        self._run = run
        self._uses: dict[Sizes, int] = {}
        self._graphs: dict[Sizes, tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, ...]]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.broken = False

    def __call__(self, batch: Batch, sizes: Sizes) -> tuple[Tensor, ...]:
        """The function's result for a batch that was filled up to `sizes`."""
        flat = flatten(batch).pin_memory()
        known = self._graphs.get(sizes)
        if known is not None:
            graph, held, out = known
            held.copy_(flat, non_blocking=True)
            graph.replay()
            return out
        flat = flat.cuda(non_blocking=True)
        self._uses[sizes] = self._uses.get(sizes, 0) + 1
        if self.broken or self._uses[sizes] <= (1 if self._graphs else WARMUP):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                out = self._run(as_batch(flat, batch))
            torch.cuda.current_stream().wait_stream(self._stream)
            return out
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                no_collection(),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream),
            ):
                out = self._run(as_batch(flat, batch))
        except RuntimeError as e:
            logger.info("no CUDA graphs: %s", first_line(e))
            self.broken = True
            return self(batch, sizes)
        self._graphs[sizes] = (graph, flat, out)
        graph.replay()
        return out
