"""Bundles: part of a store as one file, for places without a network.

A plain tar that any tool lists: `lori-bundle-DIGEST.json` first, which holds the records and the
digest and size of every file, then the files by digest, nothing compressed, no times, no owners:
the same content gives the same bytes. Reading relies on that. From the manifest follows what
every other byte of the archive but the files' own must be, and what differs is refused: so there
is no path, link, second name, sparse or extended header that anything could be done with, and
nothing is ever extracted by a name of the archive.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lori_manager.errors import Conflict, DamagedObject, InvalidInput, LoriError, NotFound
from lori_manager.foreign import parse_json
from lori_manager.records import Score, Task
from lori_manager.refs import AdapterRef
from lori_manager.store import documents, outcomes
from lori_manager.store.files import TEMPORARY, object_name, storing, sync_folder
from lori_manager.store.parcels import Parcel, check, images

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lori_manager.store.moving import Source

FORMAT = "lori-bundle"
VERSION = 1
MANIFEST = re.compile(r"lori-bundle-[0-9a-f]{64}\.json")
LARGEST_MANIFEST = 256_000_000  # bytes
_BLOCK = 512
_END = bytes(2 * _BLOCK)
_SIZE = re.compile(rb"[0-7]{11}\0")
_KEYS = ("format", "version", "parcel", "outcomes", "files")


@dataclass(frozen=True)
class Written:
    """What a bundle holds."""

    path: Path
    bytes: int
    adapters: tuple[str, ...]
    files: int
    scores: int


def write(
    path: Path,
    source: Source,
    parcel: Parcel,
    *,
    told: Callable[[str], None] = lambda _: None,
) -> Written:
    """Write a bundle, which appears whole or not at all.

    Args:
        path: a new file.
        source: of the parcel.
        told: called with a line now and then.
    Raises:
        Conflict: the file is there. DamagedObject: a file of the source is.
        StorageFailed: full, read-only or failing disk.
    """
    if path.exists():
        raise Conflict(f"{path} is there already: choose another file, or remove it")
    kept = [_pack(*both) for both in source.outcomes(parcel.scores)]
    parcel = _portable(parcel)
    content = {hashlib.sha256(one).hexdigest(): one for both in kept for one in both if one}
    files = [*parcel.files(), *(i for t in parcel.tasks for i in images(t, source.content))]
    digests = sorted({file.digest for file in files} | content.keys())
    sizes = {a.digest: a.bytes for a in parcel.adapters} | {d: len(c) for d, c in content.items()}
    sizes |= {d: len(source.content(d)) for d in digests if d not in sizes}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "parcel": documents.write(parcel),
        "outcomes": [[one and hashlib.sha256(one).hexdigest() for one in both] for both in kept],
        "files": [[digest, sizes[digest]] for digest in digests],
    }
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > LARGEST_MANIFEST:
        raise InvalidInput("that is too much for one bundle: name fewer versions")

    def parts() -> Iterator[bytes]:
        yield from _member(manifest_name(text), text)
        for number, digest in enumerate(digests, 1):
            one = content[digest] if digest in content else source.content(digest)
            if len(one) != sizes[digest]:
                raise DamagedObject(f"{source.shown}: {digest} has not the size that it should")
            yield from _member(object_name(digest), one)
            told(f"{number} of {len(digests)} files")
        yield _END

    size = _write_whole(path, parts())
    names = tuple(a.ref for a in parcel.adapters if not a.hidden)
    return Written(path, size, names, len(digests), len(parcel.scores))


def _portable(parcel: Parcel) -> Parcel:
    """Without what is of one machine or one day: paths, and the order of pages."""
    base = replace(parcel.base, path="")
    if base.revision is None:
        base = replace(base, source=Path(base.source).name)
    return replace(parcel, base=base, scores=tuple(replace(s, id=0) for s in parcel.scores))


def _pack(values: NDArray[Any], weights: NDArray[Any] | None) -> tuple[bytes, bytes | None]:
    form, content = outcomes.encode(values)
    return bytes([form]) + content, None if weights is None else outcomes.encode_floats(weights)


def _write_whole(path: Path, parts: Iterator[bytes]) -> int:
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    with storing(path):
        try:
            with temporary.open("xb") as f:
                for part in parts:
                    f.write(part)
                f.flush()
                os.fsync(f.fileno())
                size = f.tell()
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        sync_folder(path.absolute().parent)
    return size


def manifest_name(text: bytes) -> str:
    """What the manifest is called: its digest is in its name, as those of the files are."""
    return f"lori-bundle-{hashlib.sha256(text).hexdigest()}.json"


def _member(name: str, content: bytes) -> Iterator[bytes]:
    yield _header(name, len(content))
    yield content
    yield bytes(-len(content) % _BLOCK)


def _header(name: str, size: int) -> bytes:
    """The only header that a member of this name and size may have."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.GNU_FORMAT, "ascii", "strict")


class Bundle:
    """A bundle that nobody vouches for, opened to be read. Several threads may read it."""

    def __init__(self, path: Path) -> None:
        """Open it and check everything but the files' content.

        Raises:
            NotFound: no such file. DamagedObject: not a bundle as lori writes it.
        """
        self.shown = str(path)
        self._counted: dict[str, int] = {}
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except FileNotFoundError as e:
            raise NotFound(f"there is no file {path}") from e
        except OSError as e:
            raise NotFound(f"{path} cannot be read: {e.strerror}") from e
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        state = os.fstat(self._fd)
        if not stat.S_ISREG(state.st_mode):
            raise self._wrong("it is no plain file")
        head = self._bytes(0, _BLOCK)
        told = head[124:136]
        if len(head) < _BLOCK or not _SIZE.fullmatch(told):
            raise self._wrong("it does not begin as a bundle does")
        size = int(told[:-1], 8)
        named = head[:100].rstrip(b"\0").decode("latin-1")
        if size > LARGEST_MANIFEST or not MANIFEST.fullmatch(named) or head != _header(named, size):
            raise self._wrong("it does not begin as a bundle does")
        text = self._bytes(_BLOCK, size)
        if len(text) < size:
            raise self._wrong("it is cut short")
        if named != manifest_name(text):
            raise self._wrong("its manifest was altered")
        try:
            self._parcel, self._outcomes, files = _manifest(text)
        except (ValueError, LoriError) as e:
            raise self._wrong(str(e)) from e
        self._places: dict[str, tuple[int, int]] = {}
        at = _BLOCK + size + -size % _BLOCK
        for digest, length in files:
            self._places[digest] = at, length
            at += _BLOCK + length + -length % _BLOCK
        if state.st_size != at + len(_END) or self._bytes(at, len(_END)) != _END:
            raise self._wrong("it is longer or shorter than its manifest says")
        if self._bytes(_BLOCK + size, -size % _BLOCK).strip(b"\0"):
            raise self._wrong("there is something between its files")
        check(self._parcel, self.shown)
        missing = {file.digest for file in self._parcel.files()} - self._places.keys()
        if missing:
            raise self._wrong(f"{len(missing)} files are missing")

    def _wrong(self, why: str) -> DamagedObject:
        return DamagedObject(
            f"{self.shown} is not a bundle as lori writes it ({why}): fetch it again, or have it "
            "made anew with `lori bundle`"
        )

    def _bytes(self, at: int, length: int) -> bytes:
        """So many bytes from there; fewer where the file ends."""
        parts = []
        with storing(Path(self.shown)):
            while length and (part := os.pread(self._fd, min(length, 1 << 30), at)):
                parts.append(part)
                at, length = at + len(part), length - len(part)
        return b"".join(parts)

    def parcel(self, refs: Sequence[AdapterRef] | None = None) -> Parcel:
        """All of it, or these versions with what they need."""
        if refs is None:
            return self._parcel
        return _chosen(self._parcel, refs, self.shown)

    def outcomes(
        self, scores: Sequence[Score]
    ) -> Sequence[tuple[NDArray[Any], NDArray[Any] | None]]:
        """Outcomes and weights of its scores."""
        own = {(task.name, task.revision): task for task in self._parcel.tasks}
        out = []
        for score in scores:
            values, weights = self._outcomes[score.id]
            rows = self._rows(own[score.task, score.task_revision])
            try:
                both = (
                    _unpack(self.content(values), rows),
                    None if weights is None else _floats(self.content(weights), rows),
                )
            except (ValueError, IndexError, OverflowError) as e:
                raise self._wrong(f"outcomes of {score.subject}: {e}") from e
            out.append(both)
        return out

    def _rows(self, task: Task) -> int:
        """How many eval rows there are, counted: all the room that outcomes may take."""
        split = task.splits["eval"]
        if split.digest not in self._counted:
            self._counted[split.digest] = self.content(split.digest).count(b"\n")
        if self._counted[split.digest] != split.rows:
            raise self._wrong(f"{task.ref} has another number of eval rows than it says")
        return split.rows

    def content(self, digest: str) -> bytes:
        """A file's content, checked against its digest, and all around it."""
        if digest not in self._places:
            raise self._wrong(f"the file {digest} is missing")
        at, length = self._places[digest]
        found = self._bytes(at, _BLOCK + length + -length % _BLOCK)
        content = found[_BLOCK : _BLOCK + length]
        if found[:_BLOCK] != _header(object_name(digest), length):
            raise self._wrong("there is something between its files")
        if found[_BLOCK + length :].strip(b"\0"):
            raise self._wrong("there is something between its files")
        if hashlib.sha256(content).hexdigest() != digest:
            raise self._wrong(f"the file {digest} was altered")
        return content


def _manifest(
    text: bytes,
) -> tuple[Parcel, list[tuple[str, str | None]], list[tuple[str, int]]]:
    """Records, digests of outcomes and weights a score, and the files with their sizes."""
    found = parse_json(text)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError("its manifest is none")
    if found.get("version") != VERSION:
        raise ValueError(f"it has version {found.get('version')!r:.20}, this lori reads {VERSION}")
    if set(found) != set(_KEYS):
        raise ValueError(f"its manifest must have exactly {', '.join(_KEYS)}")
    files = [_file(entry) for entry in _list(found["files"])]
    if [digest for digest, _ in files] != sorted({digest for digest, _ in files}):
        raise ValueError("its files are out of order, or one stands there twice")
    known = dict(files)
    parcel = documents.read(Parcel, found["parcel"], "parcel")
    of = [_pair(entry, known) for entry in _list(found["outcomes"])]
    if len(of) != len(parcel.scores):
        raise ValueError("it has another number of scores than of outcomes")
    scores = tuple(replace(score, id=i) for i, score in enumerate(parcel.scores))
    for adapter in parcel.adapters:
        if not adapter.hidden and known.get(adapter.digest) != adapter.bytes:
            raise ValueError(f"{adapter.ref} has another size than it says")
    return replace(parcel, scores=scores), of, files


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("its manifest lacks a list")
    return value


def _file(entry: Any) -> tuple[str, int]:
    if not isinstance(entry, list) or [type(part) for part in entry] != [str, int] or entry[1] < 0:
        raise ValueError("a file is not told by digest and size")
    object_name(entry[0])
    return entry[0], entry[1]


def _pair(entry: Any, known: Mapping[str, int]) -> tuple[str, str | None]:
    if (
        not isinstance(entry, list)
        or len(entry) != 2
        or not isinstance(entry[0], str)
        or not (entry[1] is None or isinstance(entry[1], str))
        or any(digest not in known for digest in entry if digest is not None)
    ):
        raise ValueError("outcomes are not told by digests of its files")
    return entry[0], entry[1]


def _unpack(content: bytes, rows: int) -> NDArray[Any]:
    form = content[0] if content else 0
    if form in (outcomes.FLOATS, outcomes.PLANES):
        return _floats(content, rows)
    found: NDArray[Any] = outcomes.decode([(form, content[1:])], rows)[0]
    return found


def _floats(content: bytes, rows: int) -> NDArray[Any]:
    return outcomes.decode_floats(content, rows)


def _chosen(parcel: Parcel, refs: Sequence[AdapterRef], shown: str) -> Parcel:
    """The versions of a bundle with what they need, as `parcels.of_adapters` takes them."""
    known = {a.ref: a for a in parcel.adapters}
    aliases = {alias.ref: f"{alias.line}@{alias.version}" for alias in parcel.aliases}
    seen = sorted((a for a in parcel.adapters if not a.hidden), key=lambda a: a.version)
    newest = {a.line: a.ref for a in seen}
    asked = []
    for ref in refs:
        found = newest.get(ref.line) if ref.selector == "latest" else str(ref)
        found = aliases.get(str(ref), found)
        if found not in known or known[found].hidden:
            there = ", ".join(list(newest.values())[:20]) or "none"
            raise NotFound(f"{shown} holds no {ref}; the newest of each line there: {there}")
        asked.append(found)
    needed, waiting = set(), list(asked)
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += [parent.ref for parent in known[name].parents]
    own = tuple(a for a in parcel.adapters if a.ref in needed)
    own_masks = tuple(m for m in parcel.masks if m.ref in {a.mask for a in own})
    keys = {(a.task, a.task_revision) for a in own} | {(m.task, m.task_revision) for m in own_masks}
    digests = {known[name].digest for name in asked}
    keys |= {(s.task, s.task_revision) for s in parcel.scores if s.digest in digests}
    names = {a.line for a in own} | {name for name, _ in keys}
    subjects = {a.ref for a in own} | {"base"}
    return replace(
        parcel,
        lines=tuple(line for line in parcel.lines if line.name in names),
        tasks=tuple(task for task in parcel.tasks if (task.name, task.revision) in keys),
        masks=own_masks,
        runs=tuple(run for run in parcel.runs if run.id in {a.run for a in own}),
        adapters=own,
        scores=tuple(s for s in parcel.scores
                     if s.subject in subjects and (s.task, s.task_revision) in keys),
        aliases=tuple(a for a in parcel.aliases if f"{a.line}@{a.version}" in needed),
        asked=frozenset(asked),
    )  # fmt: skip
