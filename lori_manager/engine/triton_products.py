"""The kernels behind `kernels.py`; imported only where Triton is.

The products are persistent: a program for every multiprocessor walks over the tiles, so
that loads of the next tile overlap the writing of this one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

TILE_M, TILE_N, TILE_K, TILE_R, GROUP = 128, 256, 64, 32, 8


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _place(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Tiles in groups of GROUP rows, so that neighbours share what is in the cache."""
    high = tl.cdiv(M, BM)
    width = GROUP * tl.cdiv(N, BN)
    first = tile // width * GROUP
    size = min(high - first, GROUP)
    return (first + tile % width % size) * BM, tile % width // size * BN


@triton.jit
def _write(y, m, n, acc, BM: tl.constexpr, BN: tl.constexpr):
    """In two halves: a staging buffer half as large leaves room for loads."""
    halves = tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1))
    left, right = tl.split(halves)
    y.store([m, n], left.to(tl.bfloat16))
    y.store([m, n + BN // 2], right.to(tl.bfloat16))


@triton.jit
def _linear_plus(x, w, z, b, y, bias, M, N, K, R, BIAS: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
                 PROGRAMS: tl.constexpr):  # fmt: skip
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        m, n = _place(tile, M, N, BM, BN, GROUP)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            acc = tl.dot(x.load([m, k]), w.load([n, k]).T, acc)
        for r in range(0, R, BR):
            acc = tl.dot(z.load([m, r]), b.load([n, r]).T, acc)
        if BIAS:
            at = n + tl.arange(0, BN)
            acc += tl.load(bias + at, mask=at < N, other=0.0).to(tl.float32)[None, :]
        _write(y, m, n, acc, BM, BN)


@triton.jit
def _gradient_plus(d0, d1, d2, w, dz, a, dx, M, N, K0, K1, K2, R, COUNT: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
                   GROUP: tl.constexpr, PROGRAMS: tl.constexpr):  # fmt: skip
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        m, n = _place(tile, M, N, BM, BN, GROUP)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K0, BK):
            acc = tl.dot(d0.load([m, k]), w.load([k, n]), acc)
        if COUNT > 1:
            for k in range(0, K1, BK):
                acc = tl.dot(d1.load([m, k]), w.load([K0 + k, n]), acc)
        if COUNT > 2:
            for k in range(0, K2, BK):
                acc = tl.dot(d2.load([m, k]), w.load([K0 + K1 + k, n]), acc)
        for r in range(0, R, BR):
            acc = tl.dot(dz.load([m, r]), a.load([r, n]), acc)
        _write(dx, m, n, acc, BM, BN)


def _tiles(tensor: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, list(block))


def linear_plus(x: Tensor, W: Tensor, b: Tensor | None, z: Tensor, B: Tensor) -> Tensor:
    """See `kernels.linear_plus`."""
    M, K = x.shape
    N, R = B.shape
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    programs = _processors(x.device.index)
    _linear_plus[(programs,)](
        _tiles(x, TILE_M, TILE_K), _tiles(W, TILE_N, TILE_K), _tiles(z, TILE_M, TILE_R),
        _tiles(B, TILE_N, TILE_R), _tiles(y, TILE_M, TILE_N // 2), y if b is None else b,
        M, N, K, R, BIAS=b is not None, BM=TILE_M, BN=TILE_N, BK=TILE_K, BR=TILE_R,
        GROUP=GROUP, PROGRAMS=programs, num_warps=8, num_stages=3,
    )  # fmt: skip
    return y


def gradient_plus(dys: Sequence[Tensor], W: Tensor, dz: Tensor, A: Tensor) -> Tensor:
    """See `kernels.gradient_plus`."""
    M, R = dz.shape
    N = W.shape[1]
    dx = torch.empty(M, N, dtype=W.dtype, device=W.device)
    programs = _processors(W.device.index)
    given = [_tiles(dy, TILE_M, TILE_K) for dy in dys]
    widths = [dy.shape[1] for dy in dys]
    more = 3 - len(dys)
    _gradient_plus[(programs,)](
        *given, *[given[0]] * more, _tiles(W, TILE_K, TILE_N), _tiles(dz, TILE_M, TILE_R),
        _tiles(A, TILE_R, TILE_N), _tiles(dx, TILE_M, TILE_N // 2),
        M, N, *widths, *[0] * more, R, COUNT=len(dys), BM=TILE_M, BN=TILE_N, BK=TILE_K,
        BR=TILE_R, GROUP=GROUP, PROGRAMS=programs, num_warps=8, num_stages=3,
    )  # fmt: skip
    return dx


@triton.jit
def _gate_out(both, out, m, n, F, dh):
    """The gradient of gate and up at one tile, from that of what they made."""
    g = both.load([m, n]).to(tl.float32)
    u = both.load([m, F + n]).to(tl.float32)
    s = tl.sigmoid(g)
    out.store([m, n], (dh * u * s * (1 + g * (1 - s))).to(tl.bfloat16))
    out.store([m, F + n], (dh * g * s).to(tl.bfloat16))


@triton.jit
def _gated_gradient(dy, w, dz, a, both, out, M, F, K, R, BM: tl.constexpr, BN: tl.constexpr,
                    BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
                    PROGRAMS: tl.constexpr):  # fmt: skip
    tiles = tl.cdiv(M, BM) * tl.cdiv(F, BN)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        m, n = _place(tile, M, F, BM, BN, GROUP)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            acc = tl.dot(dy.load([m, k]), w.load([k, n]), acc)
        for r in range(0, R, BR):
            acc = tl.dot(dz.load([m, r]), a.load([r, n]), acc)
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        one, two = tl.split(tl.permute(tl.reshape(left, (BM, 2, BN // 4)), (0, 2, 1)))
        three, four = tl.split(tl.permute(tl.reshape(right, (BM, 2, BN // 4)), (0, 2, 1)))
        _gate_out(both, out, m, n, F, one)
        _gate_out(both, out, m, n + BN // 4, F, two)
        _gate_out(both, out, m, n + BN // 2, F, three)
        _gate_out(both, out, m, n + 3 * BN // 4, F, four)


def gated_gradient(dy: Tensor, W: Tensor, dz: Tensor, A: Tensor, both: Tensor) -> Tensor:
    """The gradient for [g u] (n, 2 f) of y = h W' + (h A') B' with h = silu(g) * u.

    W (out, f), dz = dy B (n, rank), A (rank, f); f is a multiple of 128.
    """
    M, K = dy.shape
    F, R = W.shape[1], A.shape[0]
    out = torch.empty_like(both)
    programs = _processors(dy.device.index)
    quarter = TILE_N // 4
    _gated_gradient[(programs,)](
        _tiles(dy, TILE_M, TILE_K), _tiles(W, TILE_K, TILE_N), _tiles(dz, TILE_M, TILE_R),
        _tiles(A, TILE_R, TILE_N), _tiles(both, TILE_M, quarter), _tiles(out, TILE_M, quarter),
        M, F, K, R, BM=TILE_M, BN=TILE_N, BK=TILE_K, BR=TILE_R, GROUP=GROUP,
        PROGRAMS=programs, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit
def _swiglu(both, h, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < F
    g = tl.load(both + row * 2 * F + at, mask).to(tl.float32)
    u = tl.load(both + row * 2 * F + F + at, mask).to(tl.float32)
    tl.store(h + row * F + at, (g * tl.sigmoid(g) * u).to(tl.bfloat16), mask)


@triton.jit
def _swiglu_backward(both, dh, out, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < F
    g = tl.load(both + row * 2 * F + at, mask).to(tl.float32)
    u = tl.load(both + row * 2 * F + F + at, mask).to(tl.float32)
    d = tl.load(dh + row * F + at, mask).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(out + row * 2 * F + at, (d * u * s * (1 + g * (1 - s))).to(tl.bfloat16), mask)
    tl.store(out + row * 2 * F + F + at, (d * g * s).to(tl.bfloat16), mask)


def swiglu(both: Tensor) -> Tensor:
    """silu(g) * u of contiguous bf16 (n, 2 f) = [g u]: (n, f)."""
    n, f = both.shape[0], both.shape[1] // 2
    h = torch.empty(n, f, dtype=both.dtype, device=both.device)
    _swiglu[(n, triton.cdiv(f, 2048))](both, h, f, BLOCK=2048, num_warps=8)
    return h


def swiglu_backward(both: Tensor, dh: Tensor) -> Tensor:
    """The gradient for `both` (n, 2 f), of dh (n, f)."""
    n, f = dh.shape
    out = torch.empty_like(both)
    _swiglu_backward[(n, triton.cdiv(f, 2048))](both, dh, out, f, BLOCK=2048, num_warps=8)
    return out
