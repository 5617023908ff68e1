"""Outcomes per row as few bytes: whichever of several exact forms is the shortest.

Right/wrong outcomes are kept as one bit a row (RAW), as the rows that are right or wrong
where those are few (ONES, ZEROS), or as the rows that differ from a reference (FLIPS):
another score of the same kind or what most of them say, which is kept whole, so that
nothing hangs on a chain. Sets of rows are gaps, Rice-coded (Golomb, IEEE Trans. Inf.
Theory 12:399, 1966; Rice and Plaunt, IEEE Trans. Commun. 19:889, 1971): of each gap the
`k` low bits as they are, all of them first, then the rest in unary. `k` follows from how
many rows the set has, so it is not stored. Rows that were not measured (NaN) are a set
beside. Other numbers are float32, byte planes deflated where that helps.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lori_manager.store import varints

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RAW, ONES, ZEROS, FLIPS, FLOATS, PLANES = range(1, 7)
GAPS = 8  # added to the first four: the rows that were not measured come first
_SETS = (ONES, ZEROS, FLIPS)


def encode(outcomes: NDArray[Any], reference: NDArray[np.bool_] | None = None) -> tuple[int, bytes]:
    """(form, bytes) of a (rows,) array: the shortest form that gives it back.

    Args:
        outcomes: (rows,); NaN is not measured. All 0, 1 and NaN are kept as right and
            wrong, anything else as float32, bit for bit.
        reference: bool (rows,) that `decode` will be given again, or None.
    Raises:
        ValueError: not one-dimensional.
    """
    import numpy as np

    if outcomes.ndim != 1:
        raise ValueError(f"outcomes must have shape (rows,), got {outcomes.shape}")
    right = outcomes == 1
    wrong = outcomes == 0
    measured = right | wrong
    missing = ~measured
    gaps = bool(missing.any())
    if gaps and not bool(np.isnan(outcomes[missing]).all()):
        return _encode_floats(outcomes)
    sets = {ONES: right, ZEROS: wrong}
    if reference is not None:
        sets[FLIPS] = (right ^ reference) & measured
    form, content = RAW, np.packbits(right).tobytes()
    for candidate, members in sets.items():
        packed = _RowSet(members)
        if packed.size < len(content):
            form, content = candidate, packed.to_bytes()
    if not gaps:
        return form, content
    own, beside = encode(missing.astype(np.float32))
    return form | GAPS, bytes([own]) + varints.encode([len(beside)]) + beside + content


def right_or_wrong(outcomes: NDArray[Any]) -> bool:
    """Whether all are 0, 1 or NaN."""
    return bool(((outcomes == 0) | (outcomes == 1) | (outcomes != outcomes)).all())


def encode_bits(bits: NDArray[np.bool_]) -> bytes:
    """A bool (rows,) array by itself, with its form in the first byte."""
    form, content = encode(bits)
    return bytes([form]) + content


def decode_bits(content: bytes, rows: int) -> NDArray[np.bool_]:
    """The inverse of `encode_bits`.

    Raises:
        ValueError: bytes that are none of `encode_bits`'s, or of other rows.
    """
    bits: NDArray[np.bool_] = decode([(content[0] if content else 0, content[1:])], rows)[0] == 1
    return bits


def decode(
    encoded: Sequence[tuple[int, bytes]],
    rows: int,
    references: NDArray[np.bool_] | None = None,
    which: Sequence[int] = (),
) -> NDArray[np.float32]:
    """What `encode` was given, all of them at once: float32 (scores, rows).

    Args:
        encoded: (form, bytes) a score.
        rows: that each has.
        references: bool (references, rows).
        which: for each score the reference that it was encoded against; what stands
            there for a form without one is not looked at.
    Raises:
        ValueError: bytes that are none of `encode`'s, or of another length.
    """
    import numpy as np

    out = np.zeros((len(encoded), rows), np.float32)
    forms = np.array([form & ~GAPS for form, _ in encoded], np.int64)
    contents = [content for _, content in encoded]
    gapped = [i for i, (form, _) in enumerate(encoded) if form & GAPS]
    missing: list[tuple[int, bytes]] = []
    for i in gapped:
        if forms[i] in (FLOATS, PLANES):
            raise ValueError(f"form {encoded[i][0]} is none that is known")
        length, used = varints.first(contents[i][1:])
        end = 1 + used + length
        missing.append((contents[i][0] & ~GAPS, contents[i][1 + used : end]))
        contents[i] = contents[i][end:]

    raw = np.flatnonzero(forms == RAW)
    if raw.size:
        width = (rows + 7) // 8
        if any(len(contents[i]) != width for i in raw):
            raise ValueError(f"expected {width} bytes for {rows} rows")
        packed = np.frombuffer(b"".join(contents[i] for i in raw), np.uint8)
        out[raw] = np.unpackbits(packed.reshape(raw.size, width), axis=1, count=rows)
    sets = np.flatnonzero(np.isin(forms, _SETS))
    if sets.size:
        members = _row_sets([contents[i] for i in sets], rows)
        kinds = forms[sets]
        members[kinds == ZEROS] ^= True
        flips = np.flatnonzero(kinds == FLIPS)
        if flips.size:
            if references is None:
                raise ValueError("there is no reference")
            members[flips] ^= references[np.asarray(which)[sets[flips]]]
        out[sets] = members
    floats = np.flatnonzero((forms == FLOATS) | (forms == PLANES))
    for i in floats.tolist():
        out[i] = _decode_floats(int(forms[i]), contents[i], rows)
    if raw.size + sets.size + floats.size != len(encoded):
        raise ValueError("an outcome has a form that is not known")
    if gapped:
        out[gapped] = np.where(decode(missing, rows) == 1, np.float32(np.nan), out[gapped])
    return out


def encode_floats(values: NDArray[Any]) -> bytes:
    """Float32 values bit for bit, with their form in the first byte."""
    form, content = _encode_floats(values)
    return bytes([form]) + content


def decode_floats(content: bytes, rows: int) -> NDArray[np.float32]:
    """The inverse of `encode_floats`; ValueError as `decode_bits`."""
    return _decode_floats(content[0] if content else 0, content[1:], rows)


def _encode_floats(values: NDArray[Any]) -> tuple[int, bytes]:
    import numpy as np

    plain = np.ascontiguousarray(values, "<f4")
    planes = zlib.compress(plain.view(np.uint8).reshape(-1, 4).T.tobytes(), 9)
    if len(planes) < plain.nbytes:
        return PLANES, planes
    return FLOATS, plain.tobytes()


def _decode_floats(form: int, content: bytes, rows: int) -> NDArray[np.float32]:
    import numpy as np

    if form == PLANES:
        try:
            inflating = zlib.decompressobj()
            content = inflating.decompress(content, 4 * rows + 1)  # no more, whatever is told
        except zlib.error as e:
            raise ValueError(str(e)) from e
        if not inflating.eof or inflating.unused_data:
            raise ValueError("the values are not whole")
    elif form != FLOATS:
        raise ValueError(f"form {form} is none that is known")
    if len(content) != 4 * rows:
        raise ValueError(f"expected {4 * rows} bytes for {rows} rows, got {len(content)}")
    if form == FLOATS:
        return np.frombuffer(content, "<f4").astype(np.float32)
    planes = np.frombuffer(content, np.uint8).reshape(4, rows)
    return np.ascontiguousarray(planes.T).view("<f4")[:, 0].astype(np.float32)


def _low_bits(count: int, rows: int) -> int:
    """`k` of the Rice code for `count` of `rows`: the best for random ones, to a hair.

    Whole numbers alone, so that every machine finds the same.
    """
    return max(0, (rows * 219 // (256 * count)).bit_length() - 1) if count else 0


class _RowSet:
    """A set of rows, to be Rice-coded; its size is known before it is written."""

    def __init__(self, members: NDArray[np.bool_]) -> None:
        import numpy as np

        positions = np.flatnonzero(members)
        self.count = len(positions)
        self.k = _low_bits(self.count, members.size)
        self.gaps = np.diff(positions, prepend=-1) - 1
        self.unary = int((self.gaps >> self.k).sum()) + self.count
        self.head = varints.encode([self.count])
        self.size = len(self.head) + (self.count * self.k + self.unary + 7) // 8

    def to_bytes(self) -> bytes:
        import numpy as np

        k, lows = self.k, self.count * self.k
        bits = np.zeros(lows + self.unary, bool)
        if k:
            place = np.arange(k - 1, -1, -1)
            bits[:lows] = ((self.gaps[:, None] >> place) & 1).ravel()
        bits[lows + np.cumsum((self.gaps >> k) + 1) - 1] = True
        return self.head + np.packbits(bits).tobytes()


def _row_sets(contents: Sequence[bytes], rows: int) -> NDArray[np.bool_]:
    """Many sets at once, bool (sets, rows)."""
    import numpy as np

    heads = [varints.first(content) for content in contents]
    counts = np.array([count for count, _ in heads], np.int64)
    if counts.max(initial=0) > rows:
        raise ValueError(f"a set has {counts.max()} of {rows} rows")
    lows = np.array([_low_bits(count, rows) for count, _ in heads], np.int64)
    coded = [content[used:] for content, (_, used) in zip(contents, heads, strict=True)]
    bits = np.unpackbits(np.frombuffer(b"".join(coded), np.uint8))
    lengths = np.array([8 * len(content) for content in coded], np.int64)
    starts = np.cumsum(lengths) - lengths
    unary_starts = starts + counts * lows
    if bool((unary_starts > starts + lengths).any()):
        raise ValueError("a set of rows is cut short")
    unary = bits.copy()
    for start, end in zip(starts[lows > 0], unary_starts[lows > 0], strict=True):
        unary[start:end] = 0
    ones = np.flatnonzero(unary)
    if not np.array_equal(np.diff(np.searchsorted(ones, [*starts, bits.size])), counts):
        raise ValueError("a set of rows has another number of rows than it says")
    firsts = np.cumsum(counts) - counts
    owner = np.repeat(np.arange(len(contents)), counts)
    before = np.concatenate([[-1], ones[:-1]])
    filled = counts > 0
    before[firsts[filled]] = unary_starts[filled] - 1
    high = ones - before - 1
    k = lows[owner]
    place = starts[owner] + (np.arange(len(ones)) - firsts[owner]) * k
    low = np.zeros(len(ones), np.int64)
    for j in range(int(lows.max(initial=0))):
        has = k > j
        low[has] = low[has] << 1 | bits[place[has] + j]
    ends = np.cumsum((high << k | low) + 1)
    earlier = np.concatenate([[0], ends])[firsts]
    positions = ends - earlier[owner] - 1
    if positions.size and int(positions.max()) >= rows:
        raise ValueError(f"a set names row {int(positions.max())} of {rows}")
    out = np.zeros((len(contents), rows), bool)
    out[owner, positions] = True
    return out
