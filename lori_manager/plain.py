"""Records in JSON's own types, for `--json` and `to_json()`, and numbers in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """`value` in JSON's own types: records with their `ref`, NaN as None, times in ISO 8601."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        ref = getattr(value, "ref", None)
        out = {} if ref is None else {"ref": ref}
        return out | {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def counted(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
