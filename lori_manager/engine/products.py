"""The products of a LoRI layer with their gradients: what is frozen costs no memory.

They keep z = A x for the backward and not x, where A is frozen, and add with one fused call
into what is there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lori_manager.engine import kernels


def frozen_plus_low_rank(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    Bs: Sequence[Tensor],
    widths: Sequence[int],
) -> tuple[Tensor, ...]:
    """y = x W' + b + the low-rank parts, for one matrix or several side by side.

    W (out, in) and A (rank, in) may hold several layers that see the same x, one below
    the other: B i then adds (x A_i') B_i' to its own columns of y. W, b and A are
    frozen: there are gradients for x and every B alone.
    Shapes: x (n, in), b (out,) or None, B_i (out_i, rank_i) with the out_i summing to
    out and the rank_i to rank, or a single block-diagonal B (out, rank).
    Returns:
        y (n, out) cut into columns of these widths.
    """
    out: tuple[Tensor, ...] = _FrozenPlusLowRank.apply(x, W, b, A, widths, *Bs)  # type: ignore[no-untyped-call]
    return out


def plus_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """y + (x A') B', in the place of y: for a base layer that is not a plain matrix.

    Shapes: y (n, out), x (n, in), A (rank, in), B (out, rank). A is frozen.
    """
    out: Tensor = _PlusLowRank.apply(y, x, A, B)  # type: ignore[no-untyped-call]
    return out


def plus_trained(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y + scaling (x A') B', in the place of y, with gradients for both factors.

    Shapes: y (n, out), x (n, in), A (rank, in), B (out, rank). The factors may be wider than
    y, in whose dtype the products are; x is in that dtype too.
    """
    out: Tensor = _PlusTrained.apply(y, x, A, B, scaling)  # type: ignore[no-untyped-call]
    return out


class _FrozenPlusLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        widths: Sequence[int],
        *Bs: Tensor,
    ) -> tuple[Tensor, ...]:
        z = F.linear(x, A)
        ctx.save_for_backward(z, A, W, *Bs)
        ys = _in_parts(x, W, b, z, Bs[0], widths) if len(Bs) == 1 else None
        if ys is not None:
            return ys
        if x.device.type == "cpu" and len(Bs) == len(widths) > 1:
            return _apart(x, W, b, z, Bs, widths)
        y = F.linear(x, W, b)
        _add_low_rank(y, z, Bs)
        return torch.split(y, list(widths), dim=1) if len(widths) > 1 else (y,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        z, A, W, *Bs = ctx.saved_tensors
        if len(dys) > 1 and len(Bs) == 1 and kernels.takes(z, W):
            parts = torch.split(Bs[0], [dy.shape[1] for dy in dys])
            dz = dys[0].mm(parts[0])
            for dy, B in zip(dys[1:], parts[1:], strict=True):
                dz.addmm_(dy, B)
            dBs = [torch.cat([dy.t().mm(z) for dy in dys])]
        elif len(dys) == len(Bs) > 1:
            return _apart_backward(ctx, dys, z, A, W, Bs)
        else:
            dys = dys if len(dys) == 1 else (torch.cat(dys, dim=1),)
            dz, dBs = _dz(dys[0], z, Bs), _dBs(dys[0], z, Bs)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = kernels.gradient_plus(dys, W, dz, A)
            if dx is None:
                dx = dys[0].mm(W)
                dx.addmm_(dz, A)
        return (dx, None, None, None, None, *dBs)


class _PlusLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        z = F.linear(x, A)
        ctx.mark_dirty(y)
        ctx.save_for_backward(z, A, B)
        return y.addmm_(z, B.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, A, B = ctx.saved_tensors
        dx = dy.mm(B).mm(A) if ctx.needs_input_grad[1] else None
        return dy, dx, None, dy.t().mm(z)


class _PlusTrained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        a, b = A.to(y.dtype), (B * scaling).to(y.dtype)
        z = F.linear(x, a)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, z, a, b)
        ctx.scaling, ctx.wide = scaling, B.dtype
        return y.addmm_(z, b.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, a, b = ctx.saved_tensors
        dz = dy.mm(b)
        dx = dz.mm(a) if ctx.needs_input_grad[1] else None
        dB = dy.t().mm(z).to(ctx.wide) * ctx.scaling
        return dy, dx, dz.t().mm(x).to(ctx.wide), dB, None


def _parts(Bs: Sequence[Tensor]) -> list[tuple[slice, slice]]:
    """For each B its columns of y and of z."""
    out, row, column = [], 0, 0
    for B in Bs:
        rows, rank = B.shape
        out.append((slice(row, row + rows), slice(column, column + rank)))
        row, column = row + rows, column + rank
    return out


def _in_parts(
    x: Tensor, W: Tensor, b: Tensor | None, z: Tensor, B: Tensor, widths: Sequence[int]
) -> tuple[Tensor, ...] | None:
    """y by one fused product a part, or None: it costs no more, and every y lies in one piece."""
    parts = torch.split(W, list(widths))
    if not all(kernels.takes(x, part) for part in parts):
        return None
    biases = [None] * len(parts) if b is None else torch.split(b, list(widths))
    ys = []
    for part, bias, rows in zip(parts, biases, torch.split(B, list(widths)), strict=True):
        y = kernels.linear_plus(x, part, bias, z, rows)
        if y is None:
            return None
        ys.append(y)
    return tuple(ys)


def _apart(
    x: Tensor, W: Tensor, b: Tensor | None, z: Tensor, Bs: Sequence[Tensor], widths: Sequence[int]
) -> tuple[Tensor, ...]:
    """y by one product a part: on a CPU, what follows is faster on parts of one piece each."""
    biases = [None] * len(Bs) if b is None else torch.split(b, list(widths))
    zs = torch.split(z, [B.shape[1] for B in Bs], dim=1)
    return tuple(
        F.linear(x, part, bias).addmm_(own, B.t())
        for part, bias, own, B in zip(torch.split(W, list(widths)), biases, zs, Bs, strict=True)
    )


def _apart_backward(
    ctx: Any, dys: Sequence[Tensor], z: Tensor, A: Tensor, W: Tensor, Bs: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients from those of the parts, which are not laid side by side for it."""
    dz = torch.empty_like(z)
    zs, dzs = (torch.split(t, [B.shape[1] for B in Bs], dim=1) for t in (z, dz))
    for dy, own, B in zip(dys, dzs, Bs, strict=True):
        torch.mm(dy, B, out=own)
    dx = None
    if ctx.needs_input_grad[0]:
        dx = dz.mm(A)
        for dy, part in zip(dys, torch.split(W, [dy.shape[1] for dy in dys]), strict=True):
            dx.addmm_(dy, part)
    dBs = [dy.t().mm(own) for dy, own in zip(dys, zs, strict=True)]
    return (dx, None, None, None, None, *dBs)


def _add_low_rank(y: Tensor, z: Tensor, Bs: Sequence[Tensor]) -> None:
    for B, (mine, own) in zip(Bs, _parts(Bs), strict=True):
        y[:, mine].addmm_(z[:, own], B.t())


def _dz(dy: Tensor, z: Tensor, Bs: Sequence[Tensor]) -> Tensor:
    if len(Bs) == 1:
        return dy.mm(Bs[0])
    dz = torch.empty_like(z)
    for B, (mine, own) in zip(Bs, _parts(Bs), strict=True):
        torch.mm(dy[:, mine], B, out=dz[:, own])
    return dz


def _dBs(dy: Tensor, z: Tensor, Bs: Sequence[Tensor]) -> list[Tensor]:
    return [dy[:, mine].t().mm(z[:, own]) for mine, own in _parts(Bs)]
