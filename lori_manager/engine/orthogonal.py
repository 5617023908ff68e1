"""Rows of a seeded orthogonal matrix, made by integer arithmetic alone.

The matrix is a product of ROUNDS rounds. Each permutes the coordinates, flips signs
and puts a Walsh-Hadamard transform on blocks of them whose sizes are powers of 4, so
that each block's norm, 1/sqrt(size), is a power of 2: 576 coordinates are two blocks
of 256 and one of 64, and the next round's permutation mixes the blocks. Every entry is
then an integer over one power of 2, the rows are orthogonal without any error, and only
the last product rounds: the same bits on every processor and with every library.

Related: the fast Hadamard transforms of SORF (arXiv:1610.09072), on any size.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lori_manager.engine.streams import random_words

ROUNDS = 3  # after two, rows that began in a small block are still uneven


def orthogonal_rows(seed: int, module: str, first: int, rank: int, in_features: int) -> Tensor:
    """Rows first .. first + rank - 1 of a module's endless list of rows.

    Rows 0 .. in_features - 1 of the list are those of one orthogonal matrix, the next
    in_features those of another, and so on. Rows of one matrix are orthogonal, rows of
    two matrices are as independent random ones.

    Args:
        seed: the user's seed, 0 or more.
        module: the module's full name in the model.
        first: the first row, 0 or more.
        rank, in_features: the shape.
    Returns:
        (rank, in_features) float32. Each row has the squared norm 1/3, as a row that is
        uniform on [-1/sqrt(in_features), 1/sqrt(in_features)) has on the average: a
        learning rate that suits the one suits the other.
    """
    parts = []
    last = first + rank
    while first < last:
        number, row = divmod(first, in_features)
        count = min(last - first, in_features - row)
        whole, bits = integer_rows(seed, module, number, row, count, in_features)
        parts.append(whole * (math.sqrt(1 / 3) * 2.0**-bits))
        first += count
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


def integer_rows(
    seed: int, module: str, number: int, row: int, count: int, size: int
) -> tuple[NDArray[np.int64], int]:
    """Rows of the orthogonal matrix of that number, as integers.

    Returns:
        M (count, size) and bits, such that M 2^-bits are the rows: M M' = 4^bits I exactly.
    """
    blocks = _blocks(size)
    largest = max(_halves(b) for b in blocks)
    label = f"orthogonal|{seed}|{number}|{module}|{size}"
    words = random_words(label, ROUNDS * size).reshape(ROUNDS, size)
    # Coordinates first, so that every step of the transform works on long runs of memory.
    kind = np.int32 if ROUNDS * largest <= 30 else np.int64
    x = np.zeros((size, count), kind)
    x[np.arange(row, row + count), np.arange(count)] = 1
    edges = [0, *np.cumsum(blocks).tolist()]
    for drawn in words:
        x = x[np.argsort(drawn, kind="stable")]
        x *= np.where(drawn & 1, -1, 1).astype(kind)[:, None]
        for begin, end in pairwise(edges):
            _hadamard(x[begin:end])
            x[begin:end] <<= largest - _halves(end - begin)
    return np.ascontiguousarray(x.T).astype(np.int64), ROUNDS * largest


def _blocks(size: int) -> list[int]:
    """Powers of 4 that sum to `size`, largest first."""
    blocks = []
    while size:
        blocks.append(4 ** ((size.bit_length() - 1) // 2))
        size -= blocks[-1]
    return blocks


def _halves(block: int) -> int:
    """log2 of the square root of a power of 4."""
    return (block.bit_length() - 1) // 2


def _hadamard(x: NDArray[np.signedinteger]) -> None:
    """The Walsh-Hadamard transform of x (a power of 2, columns) along its rows, in place."""
    size, columns = x.shape
    step = 1
    while step < size:
        pairs = x.reshape(-1, 2, step, columns)
        difference = pairs[:, 0] - pairs[:, 1]
        pairs[:, 0] += pairs[:, 1]
        pairs[:, 1] = difference
        step *= 2
