"""A step's forward and backward as a CUDA graph: fixed shapes, no launch gaps."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from lori_manager.errors import first_line
from lori_manager.graphs import WARMUP, no_collection

logger = logging.getLogger(__name__)


class Captured:
    """A function of tensors, captured once for each set of shapes and then replayed.

    The function must only launch work: no value may come back to the host in it. What it
    returns must be used before the next call.
    """

    def __init__(self, run: Callable[..., Tensor]) -> None:
        self._run = run
        self._calls: dict[object, int] = {}
        self._graphs: dict[object, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._broken = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's result for tensors on the GPU."""
        key = tuple((t.shape, t.dtype) for t in inputs)
        known = self._graphs.get(key)
        if known is not None:
            graph, held, out = known
            for place, tensor in zip(held, inputs, strict=True):
                place.copy_(tensor, non_blocking=True)
            graph.replay()
            return out
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._broken or self._calls[key] <= WARMUP:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                out = self._run(*inputs)
            torch.cuda.current_stream().wait_stream(self._stream)
            return out
        held = [t.clone() for t in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            with no_collection(), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                out = self._run(*held)
        except RuntimeError as e:
            logger.info("no CUDA graphs: %s", first_line(e))
            self._broken = True
            return self(*inputs)
        self._graphs[key] = (graph, held, out)
        graph.replay()
        return out
