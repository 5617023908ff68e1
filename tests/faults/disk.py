"""A disk that loses its power: what is left of recorded changes, of which only some were synced.

The model is the one that POSIX promises and no more: a file's content is safe once the file was
synced, a folder's entries (new, renamed, removed) once that folder was. What was not synced is
lost ("strict"), or by chance some of it is not: any of a file's writes, each alone, and the
first few changes of a folder, in their order.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class Change(NamedTuple):
    kind: str  # as in shim.c; "A" is a note
    path: str
    target: str
    offset: int
    data: bytes


def read_changes(log: Path) -> Iterator[Change]:
    content, at = log.read_bytes(), 0

    def piece() -> bytes:
        nonlocal at
        (size,) = struct.unpack_from("<I", content, at)
        at += 4 + size
        return content[at - size : at]

    while at < len(content):
        kind = chr(content[at])
        at += 1
        path, target = piece().decode(), piece().decode()
        (offset,) = struct.unpack_from("<Q", content, at)
        at += 8
        yield Change(kind, path, target, offset, piece())


Edit = Callable[[bytearray], None]


@dataclass
class File:
    live: bytearray = field(default_factory=bytearray)
    safe: bytearray = field(default_factory=bytearray)
    pending: list[Edit] = field(default_factory=list)

    def edit(self, change: Edit) -> None:
        change(self.live)
        self.pending.append(change)

    def sync(self) -> None:
        self.safe = bytearray(self.live)
        self.pending = []


@dataclass
class Folder:
    live: dict[str, Node] = field(default_factory=dict)
    safe: dict[str, Node] = field(default_factory=dict)
    pending: list[tuple[str, Node | None]] = field(default_factory=list)

    def set(self, name: str, node: Node | None) -> None:
        _put(self.live, name, node)
        self.pending.append((name, node))

    def sync(self) -> None:
        self.safe = dict(self.live)
        self.pending = []


Node = File | Folder


def _put(entries: dict[str, Node], name: str, node: Node | None) -> None:
    if node is None:
        entries.pop(name, None)
    else:
        entries[name] = node


def _write(offset: int, data: bytes) -> Edit:
    def edit(content: bytearray) -> None:
        if len(content) < offset:
            content.extend(bytes(offset - len(content)))
        content[offset : offset + len(data)] = data

    return edit


def _truncate(size: int) -> Edit:
    def edit(content: bytearray) -> None:
        del content[size:]
        content.extend(bytes(size - len(content)))

    return edit


class Disk:
    """A folder's files, safe as they are, to which recorded changes are done again."""

    def __init__(self, place: Path) -> None:
        self._place = str(place)
        self._root = self._load(place)

    def _load(self, path: Path) -> Folder:
        folder = Folder()
        for entry in path.iterdir():
            if entry.is_dir():
                folder.live[entry.name] = self._load(entry)
            else:
                content = entry.read_bytes()
                folder.live[entry.name] = File(bytearray(content), bytearray(content))
        folder.sync()
        return folder

    def _find(self, path: str) -> Node | None:
        node: Node | None = self._root
        for name in path.removeprefix(self._place).strip("/").split("/"):
            if name:
                node = node.live.get(name) if isinstance(node, Folder) else None
        return node

    def _above(self, path: str) -> tuple[Folder, str]:
        above, _, name = path.rpartition("/")
        folder = self._find(above)
        assert isinstance(folder, Folder), path
        return folder, name

    def do(self, change: Change) -> None:
        kind, path, target, offset, data = change
        if kind in "CM":
            folder, name = self._above(path)
            folder.set(name, File() if kind == "C" else Folder())
        elif kind == "U":
            folder, name = self._above(path)
            folder.set(name, None)
        elif kind == "R":
            folder, name = self._above(path)
            node = folder.live[name]
            into, new = self._above(target)
            into.set(new, node)
            folder.set(name, None)
        elif kind in "WTS":
            node = self._find(path) or self._renamed(path)
            if node is None:  # a file without a name any more
                return
            if kind == "S":
                node.sync()
            else:
                assert isinstance(node, File)
                node.edit(_write(offset, data) if kind == "W" else _truncate(offset))

    def _renamed(self, path: str) -> Node | None:
        """safetensors renames its temporary file by a system call that no library sees."""
        folder, name = self._above(path)
        aside = [known for known in folder.live if known.startswith(".tmp")]
        if not name.endswith(".safetensors") or len(aside) != 1:
            return None
        node = folder.live[aside[0]]
        folder.set(name, node)
        folder.set(aside[0], None)
        return node

    def after_power_cut(self, place: Path, chance: random.Random | None = None) -> None:
        """Write what is left into a new folder: strictly, or by chance."""
        self._save(self._root, place, chance)

    def _save(self, folder: Folder, place: Path, chance: random.Random | None) -> None:
        place.mkdir(mode=0o700)
        entries = dict(folder.safe)
        if chance is not None:
            for name, node in folder.pending[: chance.randint(0, len(folder.pending))]:
                _put(entries, name, node)
        for name, node in entries.items():
            if isinstance(node, Folder):
                self._save(node, place / name, chance)
                continue
            content = bytearray(node.safe)
            if chance is not None:
                for edit in node.pending:
                    if chance.random() < 0.5:
                        edit(content)
            (place / name).write_bytes(content)
