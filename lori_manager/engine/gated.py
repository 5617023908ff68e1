"""Gated feed-forwards whose gate and up projections lie side by side, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lori_manager.engine import kernels
from lori_manager.engine.layers import LoriLinear


def _gated(module: nn.Module) -> bool:
    """Whether it is down(silu(gate x) * up x) with gate and up in one group, in this order."""
    gate, up, down = (getattr(module, f"{n}_proj", None) for n in ("gate", "up", "down"))
    if not (isinstance(gate, LoriLinear) and isinstance(up, LoriLinear) and down is not None):
        return False
    act = getattr(module, "act_fn", None)
    silu = isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation"
    return silu and gate.group.layers == [gate, up] and gate.shape == up.shape


@contextmanager
def gates_together(model: nn.Module) -> Iterator[int]:
    """Gate and up of every such module are one product, and their gating one kernel.

    Yields:
        How many modules that is; none where there are no such kernels.
    """
    found: list[Any] = []
    for module in model.modules():
        if _gated(module):
            x = next(module.parameters())
            if kernels.usable(torch.empty(0, dtype=x.dtype, device=x.device)):
                found.append(module)
    before = {id(module): module.__dict__.get("forward") for module in found}

    def forward_of(module: Any) -> Any:
        def forward(x: Tensor) -> Tensor:
            both = module.gate_proj.group.together(x)
            h = kernels.swiglu(both.view(-1, both.shape[-1]))
            out: Tensor = module.down_proj(h.view(*x.shape[:-1], h.shape[-1]))
            return out

        return forward

    for module in found:
        module.forward = forward_of(module)
    try:
        yield len(found)
    finally:
        for module in found:
            del module.forward
            if before[id(module)] is not None:
                module.forward = before[id(module)]
