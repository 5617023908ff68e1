"""Files that nobody vouches for, read with every check before anything of them is used.

JSON without what two readers may take differently (keys that come twice, NaN, half characters),
and of safetensors the header: names, dtypes, shapes, and that the tensors fill the file, one
behind the other. safetensors itself takes the last of two equal names and any name.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

DEEPEST = 64  # nesting of JSON
JSON_BYTES = 64 << 20
HEADER_BYTES = 100_000_000  # what safetensors takes

# Bits a value, of safetensors 0.6 and 0.7.
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


class Malformed(ValueError):
    """What is wrong with a file, in a few words; the caller knows which file and what to do."""


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header: the values are `[begin, end)` of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def file_inside(folder: Path, name: str) -> Path:
    """`folder / name`, which may be a link to a file of that folder alone.

    The hub's cache keeps a repository's files in `blobs`, beside the `snapshots` that link
    to them: there, such links are taken.
    Raises:
        Malformed: it leads elsewhere, or nowhere.
    """
    path = folder / name
    if not path.is_symlink() and not path.parent.is_symlink():
        return path
    try:
        real, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as e:
        raise Malformed("a link that leads nowhere") from e
    homes = [home]
    for above in (home, *home.parents):
        repository = above.parent.parent
        if above.parent.name == "snapshots" and repository.name.startswith("models--"):
            homes.append(repository / "blobs")
    if not any(real.is_relative_to(one) for one in homes):
        raise Malformed("a link to a file outside its folder: put a copy in its place")
    return path


def read_whole(path: Path, most: int) -> bytes:
    """The content of a regular file of at most so many bytes; a pipe is not waited for.

    Raises:
        Malformed: a device, a folder or a pipe, or too large. OSError.
    """
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with os.fdopen(fd, "rb") as file:
        _check_regular(file.fileno(), most)
        return file.read()


def parse_json(text: bytes | str, *, constants: bool = False) -> Any:
    """A JSON document, strictly.

    Args:
        constants: take NaN and Infinity, which some models' configurations hold.
    Raises:
        Malformed: not JSON, a key twice, NaN, an infinite number, half a character, a NUL,
            or nested deeper than `DEEPEST`.
    """

    def no_constant(name: str) -> NoReturn:
        raise Malformed(f"it holds {name}, which is no JSON number")

    def finite(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value) and not constants:
            raise Malformed(f"the number {digits[:20]} is too large")
        return value

    try:
        doc = json.loads(
            text if isinstance(text, str) else text.decode("utf-8-sig"),
            object_pairs_hook=_unique,
            parse_constant=None if constants else no_constant,
            parse_float=finite,
        )
    except Malformed:
        raise
    except (ValueError, RecursionError) as e:
        raise Malformed(f"it is no JSON: {e}") from e
    _check_values(doc)
    return doc


def read_json(path: Path, *, most: int = JSON_BYTES, constants: bool = False) -> Any:
    """The JSON document in a file; see `read_whole` and `parse_json`."""
    return parse_json(read_whole(path, most), constants=constants)


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Name -> entry of every tensor of a safetensors file, and its metadata.

    Raises:
        Malformed: cut short, or not as safetensors writes it. OSError.
    """
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with os.fdopen(fd, "rb") as file:
        size = _check_regular(file.fileno(), None)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise Malformed(f"cut short: {size} bytes cannot hold its header")
        if length > HEADER_BYTES:
            raise Malformed(f"its header of {length} bytes is larger than {HEADER_BYTES}")
        text = file.read(length)
    header = parse_json(text)
    if not isinstance(header, dict):
        raise Malformed("its header is no object")
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Malformed("its metadata is no table of texts")
    start = 8 + length
    tensors = {name: _tensor(name, entry, start) for name, entry in header.items()}
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda t: (t[1].begin, t[1].end)):
        if tensor.begin != end:
            raise Malformed(f"tensor {_shown(name)} does not begin where the one before ends")
        end = tensor.end
    if end > size:
        raise Malformed(f"cut short: its tensors need {end} bytes, it has {size}")
    if end < size:
        raise Malformed(f"{size - end} bytes follow the last tensor")
    return tensors, metadata


def _tensor(name: str, entry: Any, start: int) -> Tensor:
    if not name or not name.isprintable():
        raise Malformed(f"a tensor has the name {_shown(name)}")
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Malformed(f"tensor {_shown(name)} must have dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise Malformed(f"tensor {_shown(name)} is of an unknown dtype")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or len(shape) > 64:
        raise Malformed(f"tensor {_shown(name)} has an impossible shape or place")
    begin, end = offsets
    if 8 * (end - begin) != math.prod(shape) * BITS[dtype]:
        raise Malformed(f"tensor {_shown(name)} has another size than its shape and dtype")
    return Tensor(dtype, tuple(shape), start + begin, start + end)


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _check_regular(fd: int, most: int | None) -> int:
    """The file's size; Malformed where it is no regular file, or larger than `most`."""
    told = os.fstat(fd)
    if not stat.S_ISREG(told.st_mode):
        raise Malformed("not a regular file")
    if most is not None and told.st_size > most:
        raise Malformed(f"{told.st_size} bytes are more than {most}")
    return told.st_size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise Malformed(f"the name {_shown(name)} occurs twice")
        found[name] = value
    return found


def _check_values(doc: Any) -> None:
    todo = [(doc, 0)]
    while todo:
        value, depth = todo.pop()
        if isinstance(value, str):
            if "\0" in value or not (value.isascii() or _is_text(value)):
                raise Malformed(f"it holds a NUL or half a character: {_shown(value)}")
        elif isinstance(value, dict | list):
            if depth >= DEEPEST:
                raise Malformed(f"it is nested deeper than {DEEPEST}")
            inner = [*value, *value.values()] if isinstance(value, dict) else value
            todo += [(one, depth + 1) for one in inner]


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(text: str, limit: int = 80) -> str:
    said = ascii(text)
    return said if len(said) <= limit else said[: limit - 3] + "..."
