"""The kernels behind `fp8.py`; imported only where Triton is.

One program holds a row in registers: it is read once, its largest entry found, and written
as e4m3. The product is that of `triton_products.py` with e4m3 factors: their scales come in
when the sum is complete, the low-rank part follows in bf16, then the only write.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lori_manager.engine.triton_products import _place, _processors, _tiles, _write

TILE_M, TILE_N, TILE_K, TILE_R, GROUP = 128, 256, 128, 32, 8
_LARGEST = tl.constexpr(448.0)
_LEAST = tl.constexpr(2.0**-100)


@triton.jit
def _row(x, start, W, by, BY: tl.constexpr, BLOCK: tl.constexpr):
    """One part of a row in float32, its columns times `by`."""
    at = tl.arange(0, BLOCK)
    part = tl.load(x + start + at, mask=at < W, other=0.0).to(tl.float32)
    if BY:
        part *= tl.load(by + at, mask=at < W, other=0.0)
    return part


@triton.jit
def _keep(q, part, inverse, W, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(q + at, (part * inverse).to(tl.float8e4nv), mask=at < W)


@triton.jit
def _scaled(largest, scales, row):
    """Write the row's scale; returns its inverse."""
    # Not `largest / 448`, and divided exactly: the same numbers as on the CPU.
    scale = tl.maximum(largest * (1.0 / _LARGEST), _LEAST)
    tl.store(scales + row, scale)
    return tl.div_rn(1.0, scale)


@triton.jit
def _quantize_rows(x0, x1, x2, s0, s1, s2, by, q, scales, W0, W1, W2, COUNT: tl.constexpr,
                   BY: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
                   B2: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = _row(x0, row * s0, W0, by, BY, B0)
    largest = tl.max(tl.abs(first))
    if COUNT > 1:
        second = _row(x1, row * s1, W1, by + W0, BY, B1)
        largest = tl.maximum(largest, tl.max(tl.abs(second)))
    if COUNT > 2:
        third = _row(x2, row * s2, W2, by + W0 + W1, BY, B2)
        largest = tl.maximum(largest, tl.max(tl.abs(third)))
    inverse = _scaled(largest, scales, row)
    q += row * (W0 + W1 + W2)
    _keep(q, first, inverse, W0, B0)
    if COUNT > 1:
        _keep(q + W0, second, inverse, W1, B1)
    if COUNT > 2:
        _keep(q + W0 + W1, third, inverse, W2, B2)


@triton.jit
def _gate(both, h, q, scales, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    g = tl.load(both + row * 2 * F + at, mask=at < F, other=0.0).to(tl.float32)
    u = tl.load(both + row * 2 * F + F + at, mask=at < F, other=0.0).to(tl.float32)
    out = (g * tl.sigmoid(g) * u).to(tl.bfloat16)
    tl.store(h + row * F + at, out, mask=at < F)
    part = out.to(tl.float32)
    inverse = _scaled(tl.max(tl.abs(part)), scales, row)
    _keep(q + row * F, part, inverse, F, BLOCK)


@triton.jit
def _gate_gradient(both, dh, by, out, q, scales, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < F
    g = tl.load(both + row * 2 * F + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(both + row * 2 * F + F + at, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dh + row * F + at, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    dg = (d * u * s * (1 + g * (1 - s))).to(tl.bfloat16)
    du = (d * g * s).to(tl.bfloat16)
    tl.store(out + row * 2 * F + at, dg, mask=mask)
    tl.store(out + row * 2 * F + F + at, du, mask=mask)
    left = dg.to(tl.float32) * tl.load(by + at, mask=mask, other=0.0)
    right = du.to(tl.float32) * tl.load(by + F + at, mask=mask, other=0.0)
    largest = tl.maximum(tl.max(tl.abs(left)), tl.max(tl.abs(right)))
    inverse = _scaled(largest, scales, row)
    _keep(q + row * 2 * F, left, inverse, F, BLOCK)
    _keep(q + row * 2 * F + F, right, inverse, F, BLOCK)


def _warps(columns: int) -> int:
    """So that a thread holds 64 entries of a row at most."""
    return min(32, max(4, columns // 2048))


def _empty(n: int, k: int, like: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.empty(n, k, dtype=torch.float8_e4m3fn, device=like.device)
    return values, torch.empty(n, 1, dtype=torch.float32, device=like.device)


def quantize_rows(parts: Sequence[Tensor], by: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `fp8.quantize_rows`; up to three parts of bf16, 32768 columns with those filled up."""
    widths = [part.shape[1] for part in parts]
    values, scales = _empty(parts[0].shape[0], sum(widths), parts[0])
    more = 3 - len(parts)
    blocks = [triton.next_power_of_2(width) for width in widths] + [1] * more
    _quantize_rows[(len(values),)](
        *parts, *[parts[0]] * more, *(part.stride(0) for part in parts), *[0] * more,
        scales if by is None else by, values, scales, *widths, *[0] * more, COUNT=len(parts),
        BY=by is not None, B0=blocks[0], B1=blocks[1], B2=blocks[2],
        num_warps=_warps(sum(blocks)),
    )  # fmt: skip
    return values, scales


def gate(both: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h = silu(g) * u of contiguous bf16 [g u] (n, 2 f), and h quantised: values, scales."""
    n, f = both.shape[0], both.shape[1] // 2
    h = torch.empty(n, f, dtype=both.dtype, device=both.device)
    values, scales = _empty(n, f, both)
    block = triton.next_power_of_2(f)
    _gate[(n,)](both, h, values, scales, f, BLOCK=block, num_warps=_warps(2 * block))
    return h, values, scales


def gate_gradient(both: Tensor, dh: Tensor, by: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient for [g u] of contiguous dh (n, f), and it quantised after columns times `by`."""
    n, f = dh.shape
    out = torch.empty_like(both)
    values, scales = _empty(n, 2 * f, both)
    block = triton.next_power_of_2(f)
    _gate_gradient[(n,)](
        both, dh, by, out, values, scales, f, BLOCK=block, num_warps=_warps(2 * block)
    )
    return out, values, scales


@triton.jit
def _linear_plus(x, w, z, c, y, rows, columns, bias, M, N, K, R, BIAS: tl.constexpr,
                 TURNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 BR: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr):  # fmt: skip
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        m, n = _place(tile, M, N, BM, BN, GROUP)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            acc = tl.dot(x.load([m, k]), w.load([n, k]).T, acc)
        down, across = m + tl.arange(0, BM), n + tl.arange(0, BN)
        acc *= tl.load(rows + down, mask=down < M, other=0.0)[:, None]
        acc *= tl.load(columns + across, mask=across < N, other=0.0)[None, :]
        for r in range(0, R, BR):
            if TURNED:
                acc = tl.dot(z.load([m, r]), c.load([n, r]).T, acc)
            else:
                acc = tl.dot(z.load([m, r]), c.load([r, n]), acc)
        if BIAS:
            acc += tl.load(bias + across, mask=across < N, other=0.0).to(tl.float32)[None, :]
        _write(y, m, n, acc, BM, BN)


def linear_plus(
    x: Tensor, rows: Tensor, W: Tensor, columns: Tensor, bias: Tensor | None, z: Tensor, C: Tensor
) -> Tensor:
    """(x * rows) (W' * columns) + bias + z C, bf16 (n, out).

    Shapes: x e4m3 (n, in), rows float32 (n, 1), W e4m3 (out, in), columns float32 (1, out),
    bias (out,), z bf16 (n, rank), C bf16 (rank, out) in either order of memory.
    """
    M, K = x.shape
    N, R = W.shape[0], z.shape[1]
    y = torch.empty(M, N, dtype=z.dtype, device=z.device)
    programs = _processors(z.device.index)
    turned = C.stride(1) != 1
    factor = _tiles(C.t(), TILE_N, TILE_R) if turned else _tiles(C, TILE_R, TILE_N)
    _linear_plus[(programs,)](
        _tiles(x, TILE_M, TILE_K), _tiles(W, TILE_N, TILE_K), _tiles(z, TILE_M, TILE_R), factor,
        _tiles(y, TILE_M, TILE_N // 2), rows, columns, y if bias is None else bias, M, N, K, R,
        BIAS=bias is not None, TURNED=turned, BM=TILE_M, BN=TILE_N, BK=TILE_K, BR=TILE_R,
        GROUP=GROUP, PROGRAMS=programs, num_warps=8, num_stages=3,
    )  # fmt: skip
    return y
