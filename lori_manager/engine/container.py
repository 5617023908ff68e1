"""The file around coded tensors: strict, deterministic safetensors.

The only metadata key, `lori`, is canonical JSON (sorted keys, no spaces, ASCII)
with format, version, the caller's `meta`, what the format itself records, and a
SHA-256 over all of that and every tensor. One key, because safetensors keeps
metadata in a hash map whose order differs from process to process.

safetensors refuses overlapping, missing and trailing bytes. It accepts duplicate
keys, any dtype and any tensor name, so those are checked here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from reprlib import repr as short
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.numpy import load, save

from lori_manager.engine.bits import Bytes
from lori_manager.errors import DamagedObject, IncompatibleStore

VERSION = 1

_KEY = "lori"
_OWN_FIELDS = ("format", "version", "meta", "sha256")


class Container(NamedTuple):
    """What a file holds.

    Attributes:
        meta: the caller's own.
        record: what the format recorded: plain JSON, nothing of it checked.
        tensors: name -> (n,) uint8.
    """

    meta: dict[str, Any]
    record: dict[str, Any]
    tensors: dict[str, Bytes]


def write_container(format_name: str, container: Container) -> bytes:
    """The bytes of a file; equal for equal content, in every process.

    Raises:
        ValueError: meta is not plain JSON, or would come back changed.
    """
    meta, record, tensors = container
    try:
        unchanged = json.loads(_canonical(meta)) == meta
    except (TypeError, ValueError, RecursionError) as e:
        raise ValueError(f"`meta` must be plain JSON: {e}") from e
    if not unchanged:
        raise ValueError(f"`meta` must have lists and text keys only, got {short(meta)}")
    doc = {**record, "format": format_name, "version": VERSION, "meta": meta}
    text = _canonical({**doc, "sha256": _checksum(doc, tensors)})
    return save(tensors, metadata={_KEY: text})


def read_container(data: bytes, format_name: str) -> Container:
    """Inverse of `write_container`, on bytes that nobody vouches for.

    Raises:
        DamagedObject: not a file of this format, or any bit of it is altered.
        IncompatibleStore: it has a newer version.
    """
    header, doc = _read_header(data)
    if doc["format"] != format_name:
        raise DamagedObject(f"expected a {format_name} file, found {short(doc['format'])}")
    for name, entry in header.items():
        if not _is_byte_tensor(entry):
            raise DamagedObject(f"tensor {short(name)} is not a plain row of bytes")
    try:
        tensors = load(data)
    except SafetensorError as e:
        raise DamagedObject(f"not a safetensors file: {e}") from e
    if doc.pop("sha256") != _checksum(doc, tensors):
        raise DamagedObject("the file's checksum is wrong: it was altered after it was written")
    record = {key: value for key, value in doc.items() if key not in _OWN_FIELDS}
    return Container(doc["meta"], record, tensors)


def read_meta(data: bytes) -> dict[str, Any]:
    """The caller's meta alone, from a whole file of any format or from its beginning.

    Tensors are not looked at, so neither is the checksum.

    Raises:
        DamagedObject, IncompatibleStore: as `read_container`.
    """
    _, doc = _read_header(data)
    meta: dict[str, Any] = doc["meta"]
    return meta


def read_format(data: bytes) -> str:
    """The name of a file's format, from its header.

    Raises:
        DamagedObject, IncompatibleStore: as `read_container`.
    """
    _, doc = _read_header(data)
    return str(doc["format"])


def _read_header(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header's entries without metadata, and the checked document in the metadata."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise DamagedObject(f"the file is cut short: {len(data)} bytes cannot hold its header")
    header = _parse(data[8 : 8 + size], "header")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or [*metadata] != [_KEY]:
        raise DamagedObject("not a file of lori's: its metadata is not one key `lori`")
    text = metadata[_KEY]
    if not isinstance(text, str):
        raise DamagedObject("the metadata under `lori` is not text")
    doc = _parse(text, "metadata")
    missing = [key for key in _OWN_FIELDS if key not in doc]
    if missing:
        raise DamagedObject(f"the metadata has no {missing[0]!r}")
    version = doc["version"]
    if type(version) is not int or version < 1:
        raise DamagedObject(f"the file's version is {short(version)}, expected {VERSION}")
    if version > VERSION:
        raise IncompatibleStore(
            f"the file has version {version}, this lori reads up to {VERSION}: update lori"
        )
    if not isinstance(doc["meta"], dict):
        raise DamagedObject("the metadata's `meta` is not an object")
    return header, doc


def _is_byte_tensor(entry: Any) -> bool:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return False
    shape, offsets = entry["shape"], entry["data_offsets"]
    numbers = isinstance(shape, list) and isinstance(offsets, list)
    numbers = numbers and all(type(x) is int for x in [*shape, *offsets])
    return entry["dtype"] == "U8" and numbers and len(shape) == 1 and len(offsets) == 2


def _canonical(doc: Mapping[str, Any]) -> str:
    return json.dumps(doc, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _checksum(doc: Mapping[str, Any], tensors: Mapping[str, Bytes]) -> str:
    h = hashlib.sha256(_canonical(doc).encode())
    for name in sorted(tensors):
        h.update(f"|{name}|{len(tensors[name])}|".encode())
        h.update(tensors[name].tobytes())
    return h.hexdigest()


def _parse(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys; metadata must also be canonical."""
    try:
        doc = json.loads(text, object_pairs_hook=_unique)
        canonical = what == "header" or (isinstance(doc, dict) and _canonical(doc) == text)
    except (ValueError, RecursionError) as e:
        raise DamagedObject(f"the file's {what} is not JSON: {e}") from e
    if not isinstance(doc, dict) or not canonical:
        raise DamagedObject(f"the file's {what} is not as lori writes it")
    return doc


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    doc = dict(pairs)
    if len(doc) != len(pairs):
        raise ValueError("a key appears twice")
    return doc
