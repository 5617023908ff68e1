"""Records as JSON and back, where nobody vouches for what is read.

A record is an object with exactly its fields, each of the type that the record declares.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from functools import cache
from reprlib import repr as short
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from lori_manager.refs import AdapterRef, check_name, parse_mask_ref

_LARGEST = 2**63 - 1  # what databases keep
_DIGESTS = ("digest", "fingerprint")
_HEX = re.compile(r"[0-9a-f]{64}")
_NAMES = ("line", "name", "task")  # fields that hold names of lines, tasks or aliases
_Record = TypeVar("_Record")


def write(value: Any) -> Any:
    """A record in JSON's own types; NaN becomes None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: write(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): write(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [write(inner) for inner in value]
    if isinstance(value, frozenset):
        return sorted(write(inner) for inner in value)
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read(kind: type[_Record], value: Any, where: str) -> _Record:
    """The record that `write` made such JSON of.

    Args:
        where: for the message.
    Raises:
        ValueError: other fields, types, names or digests.
    """
    hints: dict[str, Any] = _hints(kind)  # type: ignore[arg-type]  # a type is hashable
    if not isinstance(value, dict) or set(value) != set(hints):
        raise ValueError(f"{where} must have exactly {', '.join(hints)}")
    given = {name: _read(hint, value[name], f"{where}: {name}") for name, hint in hints.items()}
    for name, one in given.items():
        _check_meaning(name, one, where)
    return kind(**given)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    known = get_type_hints(kind)
    return {f.name: known[f.name] for f in fields(kind)}


def _check_meaning(name: str, value: Any, where: str) -> None:
    """Names and digests are what they say."""
    if value is None:
        return
    if name in _DIGESTS and not _HEX.fullmatch(value):
        raise ValueError(f"{where}: {name} is no SHA-256")
    if name in _NAMES:
        check_name(value, name)
    if name == "mask":
        parse_mask_ref(value)
    if name == "ref":
        line, at, version = value.partition("@")
        check_name(line, "line")
        if not at or AdapterRef(line, version).version is None:
            raise ValueError(f"{where}: {short(value)} is no version")
    if isinstance(value, int) and not 0 <= value <= _LARGEST:
        raise ValueError(f"{where}: {name} is negative or too large")


def _read(hint: Any, value: Any, where: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (kind,) = (one for one in inner if one is not type(None))
        return None if value is None else _read(kind, value, where)
    if is_dataclass(hint) and isinstance(hint, type):
        return read(hint, value, where)
    if origin is not None and issubclass(origin, Mapping):
        return _read_object(inner[1], value, where)
    if origin is not None and issubclass(origin, Sequence | frozenset):
        if not isinstance(value, list):
            raise ValueError(f"{where} is no list")
        found = (_read(inner[0], one, where) for one in value)
        return frozenset(found) if origin is frozenset else tuple(found)
    if hint is float and value is None:
        return math.nan
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as e:
            raise ValueError(f"{where} is too large") from e
    if hint is datetime and isinstance(value, str):
        return _time(value, where)
    if hint in (str, int, bool) and type(value) is hint:
        return value
    raise ValueError(f"{where} is {short(value)}, which it cannot be")


def _read_object(kind: Any, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no object")
    if kind is Any:
        return value
    return {key: _read(kind, inner, f"{where} {short(key)}") for key, inner in value.items()}


def _time(text: str, where: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError as e:
        raise ValueError(f"{where} is no time") from e
    if found.tzinfo is None:
        raise ValueError(f"{where} is a time without a zone")
    try:
        return found.astimezone(UTC)
    except OverflowError as e:
        raise ValueError(f"{where} is no time that there is") from e
