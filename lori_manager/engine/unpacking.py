"""Weights of 4 bits on a CPU, unpacked right by bitsandbytes of any version.

From 0.49 to 0.50.2 at least its kernel for AVX-512 takes the first value of a row for the first of
a block of 64, so that matrices whose rows are no whole number of blocks come out wrong, by a fifth
to a half of their norm. Values lie row after row: as one row they are unpacked right everywhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

_UNPACKS = ("cdequantize_blockwise_cpu_nf4_", "cdequantize_blockwise_cpu_fp4_")


def unpack_as_one_row() -> None:
    """Have bitsandbytes unpack such matrices on a CPU as one row; once is enough."""
    from bitsandbytes.backends.cpu import ops

    kernels: Any = ops
    if not isinstance(kernels.lib, _Library):
        kernels.lib = _Library(kernels.lib)


class _Library:
    """bitsandbytes' functions in C, those that unpack given one row where that matters."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._own, name)
        return _as_one_row(found) if name.startswith(_UNPACKS) else found


def _as_one_row(unpack: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        *pointers, block, rows, columns = args
        if columns.value % block.value:
            rows, columns = ctypes.c_longlong(1), ctypes.c_longlong(rows.value * columns.value)
        return unpack(*pointers, block, rows, columns)

    return call
