"""Pages of scores: many scores of one setting in one row of the database, as bytes.

A row a score would cost more than its outcomes: a B-tree whose keys arrive in another
order than its own stays an eighth empty, and every row has a header. A page instead is
filled to what one page of SQLite's file holds and then left alone. It has three parts:

- the directory: which scores, when, what else is known of them, and how long each one's
  outcomes are; a checksum at its end;
- the reference: one row of right and wrong that the page's scores may be stored as
  flips of; whole, with a checksum;
- the bodies: each score's outcomes (see `outcomes`), each with a checksum of its own, so
  that damage is told score by score.

Nothing here knows SQL; the numbers in the directory are keys of other tables.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lori_manager.metrics.shares import share_and_error
from lori_manager.store import outcomes, varints

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMAT = 1
# SQLite keeps a row of up to 4061 bytes within one of its pages of 4096; its header and
# its keys take 15 of them. Long bodies would leave much of a page empty: they are put
# several together, on a chain of SQLite's.
ONE_PAGE = 4046
LONG_PAGE = 8 * 4096
LONG_BODY = 800
_HEAD = struct.Struct("<BHH")  # format, scores, scores with figures of their own
_FIGURES = struct.Struct("<ddI")  # value, its standard error, measured rows
_FIELDS = 6  # subject, time since the one before, form and weights, facts, right, length
_FORM_BITS = 4
_CRC = 4


class Entry(NamedTuple):
    """What a page's directory says of one score.

    Attributes:
        subject: key of the weights.
        at: microseconds since 1970 began, UTC.
        facts: key of the facts.
        weights: key of the rows' weights, 0 for none.
        right: how many rows are right, where value and error follow from it and every
            row was measured; else None.
        figures: (value, error, measured rows) where they do not follow.
    """

    subject: int
    at: int
    facts: int
    weights: int = 0
    right: int | None = None
    figures: tuple[float, float, int] | None = None


def figures_of(
    values: NDArray[Any], value: float, error: float, rows: int
) -> tuple[int | None, tuple[float, float, int] | None]:
    """`right` and `figures` of an `Entry`: the first where value and error follow from it."""
    import numpy as np

    right = int(np.count_nonzero(values == 1))
    binary = right + np.count_nonzero(values == 0) == len(values) == rows
    if binary and rows and (value, error) == share_and_error(right, rows):
        return right, None
    return None, (value, error, rows)


class Listed(NamedTuple):
    """A score in the directory of its page.

    Attributes:
        slot: its position among the page's scores.
        form: of its `outcomes`.
        start, length: of its body among the page's, checksum included.
    """

    slot: int
    entry: Entry
    form: int
    start: int
    length: int

    def figures(self, rows: int) -> tuple[float, float, int]:
        """Value, standard error and measured rows, of a task of so many."""
        if self.entry.figures is not None:
            return self.entry.figures
        return (*share_and_error(self.entry.right or 0, rows), rows)


class DamagedPage(ValueError):
    """A directory that cannot be read; `page` is its position among those given."""

    def __init__(self, page: int, reason: str) -> None:
        super().__init__(reason)
        self.page = page


class Directory(NamedTuple):
    """The directories of several pages, one after the other: columns (scores,)."""

    page: NDArray[np.int64]  # position among the pages given
    slot: NDArray[np.int64]  # position in its page
    subject: NDArray[np.int64]
    at: NDArray[np.int64]
    form: NDArray[np.int64]  # of `outcomes`
    facts: NDArray[np.int64]
    weights: NDArray[np.int64]
    right: NDArray[np.int64]  # -1: see `figures`
    length: NDArray[np.int64]  # of the body with its checksum
    start: NDArray[np.int64]  # of the body among its page's
    figures: NDArray[Any]  # value, error, rows; of the scores with `right` -1, in order


def sealed(content: bytes) -> bytes:
    """The bytes and their CRC-32, which SQLite itself would not keep."""
    return content + zlib.crc32(content).to_bytes(_CRC, "little")


def opened(content: object) -> bytes | None:
    """What was sealed; None where it was altered."""
    if not isinstance(content, bytes) or len(content) < _CRC:
        return None
    inner = content[:-_CRC]
    return inner if zlib.crc32(inner).to_bytes(_CRC, "little") == content[-_CRC:] else None


def read_directories(contents: Sequence[object]) -> Directory:
    """The directories of pages, in their order.

    Raises:
        DamagedPage: one was altered, or is of a later format.
    """
    import numpy as np

    counts, figures, numbers = [], [], []
    for i, sealed_one in enumerate(contents):
        content = opened(sealed_one)
        if content is None or len(content) < _HEAD.size:
            raise DamagedPage(i, "it was altered")
        form, count, own = _HEAD.unpack_from(content)
        if form != FORMAT:
            raise DamagedPage(i, f"it has format {form}, this lori knows {FORMAT}")
        end = _HEAD.size + own * _FIGURES.size
        counts.append(count)
        figures.append(content[_HEAD.size : end])
        numbers.append(content[end:])
    fields = varints.decode(b"".join(numbers)).reshape(-1, _FIELDS).T
    subject, since, form_, facts, right, length = fields
    page = np.repeat(np.arange(len(contents)), counts)
    firsts = (np.cumsum(counts) - counts)[page] if counts else np.zeros(0, np.int64)
    since = varints.unzigzag(since)
    # The first of a page counts from 1970: added up over pages, these would overflow.
    began = since[firsts]
    since = np.where(np.arange(len(page)) == firsts, 0, since)
    passed = np.cumsum(since)
    length = length + _CRC
    starts = np.cumsum(length) - length
    return Directory(
        page,
        np.arange(len(page)) - firsts,
        subject,
        began + passed - passed[firsts],
        form_ & ((1 << _FORM_BITS) - 1),
        facts,
        form_ >> _FORM_BITS,
        right - 1,
        length,
        starts - starts[firsts],
        np.frombuffer(
            b"".join(figures), np.dtype([("value", "<f8"), ("error", "<f8"), ("rows", "<u4")])
        ),
    )


def listed(found: Directory, chosen: Sequence[int]) -> Iterator[tuple[int, Listed]]:
    """The scores at these positions, each after the position of its page."""
    import numpy as np

    columns = [column.tolist() for column in found[:10]]
    own = found.figures.tolist()
    places = (np.cumsum(found.right < 0) - 1).tolist()
    for i in chosen:
        page, slot, subject, at, form, facts, weights, right, length, start = (
            column[i] for column in columns
        )
        known = (right, None) if right >= 0 else (None, own[places[i]])
        yield page, Listed(slot, Entry(subject, at, facts, weights, *known), form, start, length)


def look_up(directory: bytes, subject: int) -> Listed | None:
    """A subject's score in a directory that is whole, without numpy, which takes long to load."""
    content = opened(directory)
    if content is None:
        return None
    _, count, own = _HEAD.unpack_from(content)
    end = _HEAD.size + own * _FIGURES.size
    figures = _FIGURES.iter_unpack(content[_HEAD.size : end])
    numbers = iter(varints.each(content[end:]))
    at = start = 0
    for slot in range(count):
        key, since, form, facts, right, length = (next(numbers) for _ in range(_FIELDS))
        at += varints.unzigzag(since)
        known = (right - 1, None) if right else (None, next(figures))
        if key == subject:
            weights, form = form >> _FORM_BITS, form & ((1 << _FORM_BITS) - 1)
            entry = Entry(subject, at, facts, weights, *known)
            return Listed(slot, entry, form, start, length + _CRC)
        start += length + _CRC
    return None


@dataclass
class Page:
    """One page while scores are added to it.

    Attributes:
        id: in the database; None until it is there.
        number: its place among the pages of its setting, from 0.
        rows: that every score here has.
        reference: as it is stored; None without one.
        bodies: as they are stored.
    """

    number: int
    rows: int
    id: int | None = None
    reference: bytes | None = None
    bodies: bytes = b""
    changed: bool = False
    _count: int = 0
    _last: int = 0  # when its newest score was made
    _numbers: bytes = b""
    _figures: bytes = b""

    @classmethod
    def begin(
        cls, number: int, rows: int, consensus: NDArray[np.bool_] | None, first: NDArray[Any]
    ) -> Page:
        """An empty page for a first score, with a reference where that makes it shorter.

        The reference is what others had in common, or for want of others the score itself.
        """
        page = cls(number, rows)
        if consensus is None and outcomes.right_or_wrong(first):
            page.reference = sealed(outcomes.encode_bits(first == 1))
        elif consensus is not None:
            form, _ = outcomes.encode(first, consensus)
            if form & ~outcomes.GAPS == outcomes.FLIPS:
                page.reference = sealed(outcomes.encode_bits(consensus))
        return page

    @classmethod
    def read(
        cls, number: int, rows: int, key: int, directory: bytes, reference: bytes | None,
        bodies: bytes,
    ) -> Page:  # fmt: skip
        """A stored page whose directory is whole."""
        content = directory[:-_CRC]
        _, count, own = _HEAD.unpack_from(content)
        end = _HEAD.size + own * _FIGURES.size
        last = int(read_directories([directory]).at[-1])
        return cls(
            number, rows, key, reference, bodies, False, count, last, content[end:],
            content[_HEAD.size : end],
        )  # fmt: skip

    @property
    def directory(self) -> bytes:
        """As it is stored."""
        head = _HEAD.pack(FORMAT, self._count, len(self._figures) // _FIGURES.size)
        return sealed(head + self._figures + self._numbers)

    def add(self, entry: Entry, values: NDArray[Any]) -> int | None:
        """Add a score; its slot, or None where the page is full, or its reference is damaged."""
        reference = self.reference_bits()
        if reference is None and self.reference is not None:
            return None
        form, content = outcomes.encode(values, reference)
        body = sealed(content)
        numbers, figures = self._written(entry, form, len(body))
        size = len(self.directory) + len(self.reference or b"") + len(self.bodies)
        limit = LONG_PAGE if len(body) > LONG_BODY else ONE_PAGE
        if self._count and size + len(numbers) + len(figures) + len(body) > limit:
            return None
        self._numbers += numbers
        self._figures += figures
        self.bodies += body
        self._count += 1
        self._last = entry.at
        self.changed = True
        return self._count - 1

    def mend(self, slot: int, entry: Entry, values: NDArray[Any]) -> None:
        """Write a score that is here anew, from its old time; all else stays to the bit."""
        found = read_directories([self.directory])
        form, content = outcomes.encode(values, self.reference_bits())
        body = sealed(content)
        start = int(found.start[slot])
        self.bodies = self.bodies[:start] + body + self.bodies[start + int(found.length[slot]) :]
        figures = iter(found.figures.tolist())
        self._numbers, self._figures, self._last = b"", b"", 0
        columns = [column.tolist() for column in found[2:9]]
        for i, (subject, at, form_, facts, weights, right, length) in enumerate(
            zip(*columns, strict=True)
        ):
            own = None if right >= 0 else next(figures)
            old = Entry(subject, at, facts, weights, None if right < 0 else right, own)
            if i == slot:
                written = self._written(entry._replace(at=at), form, len(body))
            else:
                written = self._written(old, form_, length)
            self._numbers += written[0]
            self._figures += written[1]
            self._last = at
        self.changed = True

    def spoil(self) -> None:
        """Keep the last score as one whose outcomes are damaged."""
        mark = bytes(byte ^ 255 for byte in self.bodies[-_CRC:])
        self.bodies = self.bodies[:-_CRC] + mark

    def reference_bits(self) -> NDArray[np.bool_] | None:
        """The reference, bool (rows,); None without a whole one."""
        content = opened(self.reference)
        return None if content is None else outcomes.decode_bits(content, self.rows)

    def consensus(self) -> NDArray[np.bool_] | None:
        """What most of the page's right/wrong scores say of each row; None without any."""
        import numpy as np

        found = read_directories([self.directory])
        slots = [
            i
            for i in range(self._count)
            if int(found.form[i]) & ~outcomes.GAPS not in (outcomes.FLOATS, outcomes.PLANES)
        ]
        told = decode_bodies(found, slots, [self.bodies], [self.reference], self.rows)
        whole = [values for values in told if not isinstance(values, str)]
        if not whole:
            return None
        bits: NDArray[np.bool_] = np.nan_to_num(np.array(whole), nan=0.5).mean(0) > 0.5
        return bits

    def _written(self, entry: Entry, form: int, length: int) -> tuple[bytes, bytes]:
        if (entry.right is None) == (entry.figures is None):
            raise ValueError(f"expected `right` or `figures`, got {entry}")
        numbers = [
            entry.subject,
            varints.zigzag(entry.at - self._last),
            form | entry.weights << _FORM_BITS,
            entry.facts,
            0 if entry.right is None else entry.right + 1,
            length - _CRC,
        ]
        figures = b"" if entry.figures is None else _FIGURES.pack(*entry.figures)
        return varints.encode(numbers), figures


def decode_bodies(
    found: Directory,
    chosen: Sequence[int],
    bodies: Sequence[bytes],
    references: Sequence[bytes | None],
    rows: int,
) -> list[NDArray[np.float32] | str]:
    """Outcomes of scores, float32 (rows,) each; for a damaged one, what is wrong with it.

    Args:
        found: the directories of the pages.
        chosen: positions in `found`.
        bodies, references: as stored, a page each.
        rows: that each score has.
    """
    import numpy as np

    bits = np.zeros((len(references), rows), bool)
    lost: dict[int, str] = {}
    for i, reference in enumerate(references):
        content = opened(reference)
        if content is None:
            lost[i] = "the reference that they are stored against was altered"
            continue
        try:
            bits[i] = outcomes.decode_bits(content, rows)
        except ValueError as e:
            lost[i] = str(e)
    told: list[NDArray[np.float32] | str] = []
    parts: list[tuple[int, bytes]] = []
    good: list[int] = []
    pages = found.page.tolist(), found.start.tolist(), found.length.tolist(), found.form.tolist()
    for position, i in enumerate(chosen):
        page, start, length, form = (column[i] for column in pages)
        content = opened(bodies[page][start : start + length])
        if content is None:
            told.append("they were altered or cut short")
        elif form & ~outcomes.GAPS == outcomes.FLIPS and page in lost:
            told.append(lost[page])
        else:
            told.append("")
            parts.append((form, content))
            good.append(position)
    which = [pages[0][chosen[i]] for i in good]
    try:
        matrix: Sequence[NDArray[np.float32] | str] = list(
            outcomes.decode(parts, rows, bits, which)
        )
    except ValueError:  # a checksum holds and still the bytes mean nothing: find out whose
        matrix = [_alone(part, rows, bits[page]) for part, page in zip(parts, which, strict=True)]
    for i, values in zip(good, matrix, strict=True):
        told[i] = values
    return told


def _alone(
    part: tuple[int, bytes], rows: int, reference: NDArray[np.bool_]
) -> NDArray[np.float32] | str:
    try:
        values: NDArray[np.float32] = outcomes.decode([part], rows, reference[None], [0])[0]
    except ValueError as e:
        return str(e)
    return values
