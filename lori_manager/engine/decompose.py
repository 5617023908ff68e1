"""Orthonormal bases and singular values of matrices that have few rows or few columns.

A GPU's own solvers are slow on these: a singular value decomposition of 256 x 256 takes tens
of milliseconds there, and now and then does not converge at first. So what is small goes to
the host's LAPACK, and what is tall is made orthonormal by products.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

# The smaller side of what the host decomposes faster.
SMALL = 1024
MOST_THREADS = 16

T = TypeVar("T")
R = TypeVar("R")


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,) falling, V' (k, n) of a matrix (m, n), k = min(m, n); on its device."""
    here, device = _host(matrix)
    left, values, right = torch.linalg.svd(here, full_matrices=False)
    return left.to(device), values.to(device), right.to(device)


def left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """U (m, m) and S (m,) falling of a wide float64 matrix (m, n), by its Gram matrix.

    Many times faster than `svd`; what is below 1e-7 of the largest value is rounding. With an
    orthonormal U in any case, U'M is S V' and U U'M is M.
    """
    here, device = _host(matrix @ matrix.mT)
    squares, left = torch.linalg.eigh(here)
    values = squares.flip(-1).clamp(min=0).sqrt()
    return left.flip(-1).to(device), values.to(device)


def singular_values(matrix: Tensor) -> Tensor:
    """S (k,) falling of a matrix (m, n), or (T, k) of T matrices; on its device."""
    here, device = _host(matrix)
    values: Tensor = torch.linalg.svdvals(here)
    return values.to(device)


def _host(matrix: Tensor) -> tuple[Tensor, torch.device]:
    moved = matrix.is_cuda and min(matrix.shape[-2:]) <= SMALL
    return matrix.cpu() if moved else matrix, matrix.device


def qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Q (m, k) with orthonormal columns and R (k, n), k = min(m, n), whose product is (m, n).

    On a GPU of a tall matrix by `cholesky_qr` where that is exact, which it is not of one
    whose columns are nearly dependent.
    """
    if matrix.is_cuda and matrix.shape[0] >= matrix.shape[1]:
        found = cholesky_qr(matrix)
        if found is not None:
            return found
    Q, R = torch.linalg.qr(matrix)
    return Q, R


def cholesky_qr(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Q and R of a tall matrix by the Cholesky factor of its Gram matrix, twice, in float64.

    Returns:
        In the matrix' dtype; None where Q did not come out orthonormal to rounding.
    Source: CholeskyQR2, Yamamoto, Nakatsukasa, Yanagisawa and Fukaya 2015.
    """
    Q, R = matrix.double(), None
    for _ in range(2):
        upper, _ = torch.linalg.cholesky_ex(Q.mT @ Q, upper=True)
        Q = torch.linalg.solve_triangular(upper, Q, upper=True, left=False)
        R = upper if R is None else upper @ R
    off = (Q.mT @ Q).fill_diagonal_(0).abs().max() if Q.shape[1] else Q.new_zeros(())
    if R is None or not float(off) < 1e-12:  # NaN too
        return None
    return Q.to(matrix.dtype), R.to(matrix.dtype)


def side_by_side(work: Callable[[T], R], items: Iterable[T], device: torch.device) -> Iterator[R]:
    """`work` of every item, in their order; on a GPU several at a time.

    What runs on the host for one item then overlaps what the GPU does for another.
    """
    threads = min(os.cpu_count() or 1, MOST_THREADS)
    if device.type != "cuda" or threads == 1:
        yield from map(work, items)
        return
    remaining = iter(items)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a thread an item is enough
    # LAPACK keeps to it in a thread of ours only where that thread was told so too.
    own = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        # Alone: what a GPU's libraries load at their first call does not bear several threads.
        for item in remaining:
            yield work(item)
            break
        with own as pool:
            yield from pool.map(work, remaining)
    finally:
        torch.set_num_threads(before)
