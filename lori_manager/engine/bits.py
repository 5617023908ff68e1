"""Lossless codes for masks and floats: whole numpy arrays at a time, no loop over entries.

Three layers. `rice_*` codes small non-negative integers. `mask_*` codes a boolean
array as the gaps between its rarer entries, which a Rice code brings within 2% of
the entropy. `floats_*` codes the exponents of trained values, which crowd into a
few octaves, and keeps sign and fraction as they are.

Every code is fixed integer arithmetic of our own, so the same input gives the same
bytes with any numpy or zlib and on any machine: stored files are known by their hash.

A Rice stream is a run of chunks of CHUNK values (the last may be shorter), each

    uint32 LE   bytes that follow in this chunk
    uint8 * b   shift k of each block of BLOCK values
    bits        the low k bits of each value, for k = 1, 2, ...; each k starts a byte
    bits        value >> k of each value in unary: that many zeros, then a one

with the most significant bit of a byte first and zero bits up to the next byte.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lori_manager.errors import DamagedObject

Bytes = NDArray[np.uint8]

BLOCK = 512  # values that share a shift: small enough to follow rows and modules of other density
CHUNK = 2**20  # values in memory as int64 at one time
MAX_SHIFT = 24  # with quotients below 2**38, as in any file below 32 GiB, nothing can overflow

_LENGTH_BYTES = 4


def rice_encode(values: NDArray[Any]) -> Bytes:
    """Code integers, shortest where small ones are common.

    Args:
        values: (n,) of any integer type, each in [0, 2**40). Not modified.
    Returns:
        The stream, whose length need not be stored: n tells where it ends.
    Source: Rice and Plaunt, IEEE Trans. Commun. 19 (1971) 889; the shift of each
    block is the cheapest one, found by trying all.
    """
    chunks = [_encode_chunk(values[i : i + CHUNK]) for i in range(0, len(values), CHUNK)]
    return np.concatenate(chunks) if chunks else np.empty(0, np.uint8)


def rice_decode(data: Bytes, n: int, limit: int) -> NDArray[np.int64]:
    """Inverse of `rice_encode`, on bytes that nobody vouches for.

    Args:
        data: exactly one stream.
        n: how many values it holds.
        limit: each must be below it.
    Returns:
        (n,) int64, in [0, limit).
    Raises:
        DamagedObject: no stream of n such values has these bytes. Memory taken
            before this is known is bounded by the length of `data`, not by n.
    """
    if n > 8 * len(data):  # a value takes a bit or more
        raise DamagedObject(f"{n} coded values cannot fit in {len(data)} bytes")
    out = np.empty(n, np.int64)
    offset = 0
    for start in range(0, n, CHUNK):
        stop = min(n, start + CHUNK)
        body = offset + _LENGTH_BYTES
        offset = body + int.from_bytes(data[offset:body].tobytes(), "little")
        if offset > len(data):
            raise DamagedObject(f"coded values end after {len(data)} bytes, expected {offset}")
        out[start:stop] = _decode_chunk(data[body:offset], stop - start, limit)
    if offset != len(data):
        raise DamagedObject(f"{len(data) - offset} bytes follow the coded values")
    return out


def mask_encode(mask: NDArray[np.bool_]) -> Bytes:
    """Code a boolean array; at density p it takes about H(p) bits an entry, at most 1.01.

    Args:
        mask: (n,) bool. Not modified.
    Returns:
        A Rice stream of the gaps before each True or, where most are True, each False.
    """
    kept = int(np.count_nonzero(mask))
    positions = np.flatnonzero(mask if 2 * kept <= len(mask) else ~mask)
    return rice_encode(np.diff(positions, prepend=-1) - 1)


def mask_decode(data: Bytes, n: int, kept: int) -> NDArray[np.bool_]:
    """Inverse of `mask_encode`.

    Args:
        data: its bytes.
        n, kept: how many entries there are and how many of them are True. The
            caller bounds n: an all-False mask of any n has an empty stream.
    Returns:
        (n,) bool.
    Raises:
        DamagedObject: `data` is not the code of such a mask.
    """
    rare = min(kept, n - kept)
    if rare < 0:
        raise DamagedObject(f"a mask of {n} entries cannot keep {kept}")
    positions = np.cumsum(rice_decode(data, rare, n - rare + 1) + 1) - 1
    if rare and positions[-1] >= n:
        raise DamagedObject(f"the last coded entry of a mask is {positions[-1]}, it has {n}")
    mask = np.full(n, 2 * kept > n)
    mask[positions] = not 2 * kept > n
    return mask


def floats_encode(words: NDArray[Any]) -> tuple[list[int], Bytes, Bytes]:
    """Code floats, given as unsigned words of their bits.

    A word is split into the eight bits after the sign (the exponent of bfloat16 and
    float32, exponent and three fraction bits of float16), coded by how common they
    are, and sign and remaining fraction, which have no structure and stay as bytes.
    Trained bfloat16 values come to 10 to 11 bits.

    Args:
        words: (n,) uint16 or uint32. Not modified.
    Returns:
        The eight-bit groups that occur, most common first; a Rice stream of each
        value's place in that list; and (n * (itemsize - 1),) bytes, little-endian,
        of sign and fraction.
    """
    low = 8 * words.itemsize - 9
    groups = (words >> low).astype(np.uint8)
    counts = np.bincount(groups, minlength=256)
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    place = np.zeros(256, np.uint8)
    place[order] = np.arange(len(order))
    rest = (words >> (low + 8) << low) | (words & (2**low - 1))
    planes = rest.astype(rest.dtype.newbyteorder("<")).view(np.uint8).reshape(-1, words.itemsize)
    return order.tolist(), rice_encode(place[groups]), planes[:, :-1].ravel()


def floats_decode(
    common: list[int], codes: Bytes, rest: Bytes, n: int, itemsize: int
) -> NDArray[Any]:
    """Inverse of `floats_encode`.

    Args:
        common, codes, rest: as it returned them; `common` in [0, 256).
        n: how many values.
        itemsize: 2 or 4, bytes a value.
    Returns:
        (n,) uint16 or uint32.
    Raises:
        DamagedObject: these are not n values.
    """
    if len(rest) != n * (itemsize - 1):
        raise DamagedObject(f"{n} values need {n * (itemsize - 1)} bytes, found {len(rest)}")
    low = 8 * itemsize - 9
    dtype = np.dtype(f"<u{itemsize}")
    planes = np.zeros((n, itemsize), np.uint8)
    planes[:, :-1] = rest.reshape(n, itemsize - 1)
    words = planes.reshape(-1).view(dtype).astype(dtype.newbyteorder("="))
    groups = np.array(common, dtype=words.dtype)[rice_decode(codes, n, len(common))]
    out: NDArray[Any] = (words >> low << (low + 8)) | (words & (2**low - 1)) | (groups << low)
    return out


def _encode_chunk(values: NDArray[Any]) -> Bytes:
    starts = np.arange(0, len(values), BLOCK)
    sizes = np.diff(starts, append=len(values))
    candidates = range(min(int(values.max()).bit_length(), MAX_SHIFT) + 1)
    bits = [np.add.reduceat(values >> k, starts, dtype=np.int64) + k * sizes for k in candidates]
    shifts = np.argmin(bits, axis=0).astype(np.uint8)
    shift = np.repeat(shifts, sizes)
    ends = np.cumsum(values >> shift, dtype=np.int64) + np.arange(len(values))
    unary = np.zeros(ends[-1] + 1, np.uint8)
    unary[ends] = 1
    parts = [shifts, *(_pack(values[shift == k], k) for k in _used(shifts)), np.packbits(unary)]
    length = sum(map(len, parts)).to_bytes(_LENGTH_BYTES, "little")
    return np.concatenate([np.frombuffer(length, np.uint8), *parts])


def _decode_chunk(data: Bytes, n: int, limit: int) -> NDArray[np.int64]:
    starts = np.arange(0, n, BLOCK)
    shifts = data[: len(starts)]
    if len(shifts) < len(starts) or shifts.max() > MAX_SHIFT:
        raise DamagedObject("coded values have missing or impossible shifts")
    shift = np.repeat(shifts, np.diff(starts, append=n)).astype(np.int64)
    values = np.zeros(n, np.int64)
    offset = len(starts)
    for k in _used(shifts):
        where = np.flatnonzero(shift == k)
        end = offset + (len(where) * k + 7) // 8
        if end > len(data):
            raise DamagedObject("coded values are cut short")
        values[where] = _unpack(data[offset:end], len(where), k)
        offset = end
    ends = np.flatnonzero(np.unpackbits(data[offset:]))
    if len(ends) != n or ends[-1] // 8 + 1 != len(data) - offset:
        raise DamagedObject(f"expected {n} coded values, found {len(ends)}")
    high = np.diff(ends, prepend=-1) - 1
    values += high << shift
    if values.max() >= limit:
        raise DamagedObject(f"a coded value is not below {limit}")
    return values


def _used(shifts: Bytes) -> list[int]:
    return [int(k) for k in np.unique(shifts) if k > 0]


def _pack(values: NDArray[Any], width: int) -> Bytes:
    bits = np.empty((len(values), width), np.uint8)
    for j in range(width):
        bits[:, j] = (values >> (width - 1 - j)) & 1
    return np.packbits(bits)


def _unpack(data: Bytes, n: int, width: int) -> NDArray[np.int64]:
    bits = np.unpackbits(data)
    if np.any(bits[n * width :]):
        raise DamagedObject("bits are set after the last coded value")
    out = np.zeros(n, np.int64)
    for column in bits[: n * width].reshape(n, width).T:
        out = out << 1 | column
    return out
