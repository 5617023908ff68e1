"""Whole numbers in as few bytes as they need: LEB128, seven bits a byte, the lowest first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST = 2**63 - 1
_Whole = TypeVar("_Whole", "int", "NDArray[np.int64]")


def encode(values: Iterable[int]) -> bytes:
    """Numbers from 0 to 2**63 - 1, one after the other.

    Raises:
        ValueError: one outside of that.
    """
    out = bytearray()
    for value in values:
        if not 0 <= value <= MOST:
            raise ValueError(f"expected a number from 0 to 2**63 - 1, got {value}")
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
    return bytes(out)


def decode(content: bytes) -> NDArray[np.int64]:
    """All numbers in the bytes, int64 (numbers,).

    Raises:
        ValueError: the last number is cut short, or one is too large.
    """
    import numpy as np

    b = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(b < 128)
    if b.size == 0:
        return np.zeros(0, np.int64)
    if ends.size == 0 or ends[-1] != b.size - 1:
        raise ValueError("the last number is cut short")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if int(lengths.max()) > 9:
        raise ValueError("a number has more than 63 bits")
    place = np.arange(b.size) - np.repeat(starts, lengths)
    return np.add.reduceat((b & 127).astype(np.int64) << (7 * place), starts)


def each(content: bytes) -> list[int]:
    """As `decode`, without numpy: for few numbers."""
    out, value, place = [], 0, 0
    for byte in content:
        value |= (byte & 127) << place
        place += 7
        if byte < 128:
            out.append(value)
            value = place = 0
    return out


def first(content: bytes) -> tuple[int, int]:
    """The first number, and how many bytes it takes.

    Raises:
        ValueError: it is cut short, or too large.
    """
    value = 0
    for i, byte in enumerate(content[:9]):
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value, i + 1
    raise ValueError("a number is cut short or has more than 63 bits")


def zigzag(value: int) -> int:
    """A number of either sign as one from 0 on, small where it is near 0."""
    return value * 2 if value >= 0 else -value * 2 - 1


def unzigzag(value: _Whole) -> _Whole:
    """The inverse of `zigzag`, of a number or of an array."""
    return (value >> 1) ^ -(value & 1)
