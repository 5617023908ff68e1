"""Bytes of what can be made again: compressed, with a checksum, and None once damaged."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def pack(content: bytes) -> bytes:
    """Compressed by zlib, whose format ends in a checksum."""
    return zlib.compress(content)


def unpack(stored: bytes) -> bytes | None:
    """What was packed; None where it was altered or cut short."""
    try:
        return zlib.decompress(stored)
    except (zlib.error, TypeError):
        return None


def pack_numbers(values: np.ndarray) -> bytes:
    """(rows,) numbers, as little-endian float32 whatever the machine."""
    return pack(values.astype("<f4").tobytes())


def unpack_numbers(stored: bytes, rows: int) -> np.ndarray | None:
    """(rows,) float32; None where it was altered, or is of another number of rows."""
    import numpy as np

    content = unpack(stored)
    if content is None or len(content) != 4 * rows:
        return None
    return np.frombuffer(content, "<f4").astype(np.float32)
