"""Triton kernels for Hopper GPUs: products that add the low-rank part while they store.

cuBLAS writes x W' and a second product reads and writes all of it again to add z B'. These
kernels add it in registers, before the only write. Each function says by `None` that it
does not take its arguments; the caller then goes the plain way.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_ROWS, _WIDTH = 2048, 1024  # below this many rows or columns cuBLAS and two products win
_enabled = True


def enable(on: bool) -> None:
    """Switch all kernels of this module on or off."""
    global _enabled
    _enabled = on


def enabled() -> bool:
    """Whether kernels may be used, where there are any."""
    return _enabled


@functools.cache
def available(device: int) -> bool:
    """Whether the GPU of that number can run them: Hopper, with Triton installed."""
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def usable(x: Tensor) -> bool:
    """Whether kernels are on and there for a tensor of this dtype and device."""
    if not (_enabled and x.is_cuda and x.dtype == torch.bfloat16):
        return False
    return available(x.device.index)


def takes(rows: Tensor, W: Tensor) -> bool:
    """Whether products of so many rows with W (out, in) are made here.

    Tensor descriptors want rows that lie 16-byte steps apart.
    """
    large = rows.shape[0] >= _ROWS and min(W.shape) >= _WIDTH
    return large and usable(rows) and _fits(W)


def _fits(*matrices: Tensor) -> bool:
    return all(
        t.dtype == torch.bfloat16 and t.stride(1) == 1 and t.stride(0) % 8 == 0
        and t.data_ptr() % 16 == 0
        for t in matrices
    )  # fmt: skip


def linear_plus(x: Tensor, W: Tensor, b: Tensor | None, z: Tensor, B: Tensor) -> Tensor | None:
    """x W' + b + z B' as one product, or None.

    Shapes: x (n, in), W (out, in), b (out,) or None, z (n, rank), B (out, rank); bf16.
    """
    if not (takes(x, W) and _fits(x, z, B)):
        return None
    from lori_manager.engine import triton_products

    return triton_products.linear_plus(x, W, b, z, B)


def gradient_plus(dys: Sequence[Tensor], W: Tensor, dz: Tensor, A: Tensor) -> Tensor | None:
    """[dy_1 dy_2 ..] W + dz A as one product, or None.

    Shapes: dy_i (n, out_i) with the out_i summing to out, W (out, in), dz (n, rank),
    A (rank, in); bf16; up to three dy.
    """
    if not (takes(dz, W) and len(dys) <= 3 and _fits(*dys, dz, A)):
        return None
    from lori_manager.engine import triton_products

    return triton_products.gradient_plus(dys, W, dz, A)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Tensor) -> Tensor:
        from lori_manager.engine import triton_products as products

        W, A, B, W_down, A_down, B_down = given
        z = F.linear(x, A)
        both = products.linear_plus(x, W, None, z, B)
        h = products.swiglu(both)
        z_down = F.linear(h, A_down)
        ctx.save_for_backward(z, both, z_down, *given)
        return products.linear_plus(h, W_down, None, z_down, B_down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from lori_manager.engine import triton_products as products

        z, both, z_down, W, A, B, W_down, A_down, B_down = ctx.saved_tensors
        dz_down = dy.mm(B_down)
        dB_down = dy.t().mm(z_down)
        dboth = products.gated_gradient(dy, W_down, dz_down, A_down, both)
        dz = dboth.mm(B)
        dB = dboth.t().mm(z)
        dx = products.gradient_plus([dboth], W, dz, A) if ctx.needs_input_grad[0] else None
        return dx, None, None, dB, None, None, dB_down


def gated_mlp(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, W_down: Tensor, A_down: Tensor, B_down: Tensor
) -> Tensor | None:
    """A gated feed-forward with LoRI on all three layers, or None.

    [g u] = x W' + (x A') B', h = silu(g) * u, y = h W_down' + (h A_down') B_down'. What is
    kept for the backward are [g u] and both z; neither x nor h.
    Shapes: x (n, in), W (2 f, in), A (ranks, in), B (2 f, ranks), W_down (out, f),
    A_down (rank, f), B_down (out, rank); gives y (n, out); bf16. Gradients for x, B and
    B_down.
    """
    fitting = _fits(x, A, B, A_down, B_down) and W_down.shape[1] % 256 == 0
    if not (takes(x, W) and takes(x, W_down) and fitting):
        return None
    out: Tensor = _GatedMLP.apply(x, W, A, B, W_down, A_down, B_down)  # type: ignore[no-untyped-call]
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        from lori_manager.engine import triton_products

        ctx.save_for_backward(both)
        return triton_products.swiglu(both)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Tensor:
        from lori_manager.engine import triton_products

        (both,) = ctx.saved_tensors
        return triton_products.swiglu_backward(both, dh.contiguous())


def swiglu(both: Tensor) -> Tensor:
    """silu(g) * u of (n, 2 f), g in the first half of the columns: (n, f), with gradient."""
    out: Tensor = _SwiGLU.apply(both)  # type: ignore[no-untyped-call]
    return out
