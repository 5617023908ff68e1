"""Gated feed-forwards whose gate and up projections lie side by side, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lori_manager.engine import fp8, kernels
from lori_manager.engine.layers import LoriLinear


def _gated(module: nn.Module) -> bool:
    """Whether it is down(silu(gate x) * up x) with gate and up in one group, in this order."""
    gate, up, down = (getattr(module, f"{n}_proj", None) for n in ("gate", "up", "down"))
    if not (isinstance(gate, LoriLinear) and isinstance(up, LoriLinear) and down is not None):
        return False
    act = type(getattr(module, "act_fn", None)).__name__
    silu = act in ("SiLU", "SiLUActivation") or type(module).__name__ == "LigerSwiGLUMLP"
    return silu and gate.group.layers == [gate, up] and gate.shape == up.shape


def _whole(module: Any, x: Tensor) -> Tensor | None:
    """The module's output in as few products as there can be, or None."""
    first, down = module.gate_proj.group, module.down_proj
    if not (isinstance(down, LoriLinear) and down.plain(x)):
        return None
    W, b, A = first.laid()
    W_down, b_down, A_down = down.group.laid()
    Bs, Bs_down = first.factors(x.dtype), down.group.factors(x.dtype)
    if b is not None or b_down is not None or len(Bs) != 1 or len(Bs_down) != 1:
        return None
    rows = x.reshape(-1, x.shape[-1])
    gated_mlp: Any = fp8.gated_mlp if isinstance(W, fp8.Matrix) else kernels.gated_mlp
    y = gated_mlp(rows, W, A, Bs[0], W_down, A_down, Bs_down[0])
    return None if y is None else y.view(*x.shape[:-1], y.shape[-1])


@contextmanager
def gates_together(model: nn.Module) -> Iterator[int]:
    """Gate and up of every such module are one product, and their gating one kernel.

    Yields:
        How many modules that is; none where there are no such kernels.
    """
    found: list[Any] = []
    for module in model.modules():
        if _gated(module):
            x = cast(LoriLinear, module.gate_proj).A
            if kernels.usable(torch.empty(0, dtype=x.dtype, device=x.device)):
                found.append(module)
    before = {id(module): module.__dict__.get("forward") for module in found}

    def forward_of(module: Any) -> Any:
        def forward(x: Tensor) -> Tensor:
            whole = _whole(module, x)
            if whole is not None:
                return whole
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
