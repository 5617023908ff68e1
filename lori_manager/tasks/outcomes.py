"""Outcomes measured elsewhere, read into the order of a task's eval rows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lori_manager.errors import BadData, NotFound

_LARGEST = float(np.finfo(np.float32).max)


def read_outcomes(file: Path, keys: Sequence[bytes]) -> np.ndarray:
    """JSONL of {"row": index or key in hex, "value": number} -> float32 by row.

    Args:
        file: one object a line; `true` and `false` count as 1 and 0.
        keys: the eval rows' keys in their order; an index counts from 0.
    Returns:
        float32 (rows,), NaN where the file says nothing.
    Raises:
        NotFound: no such file. BadData: by line, what cannot be used.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as e:
        raise NotFound(f"no file {file}") from e
    except (OSError, UnicodeDecodeError) as e:
        raise BadData(f"cannot read {file}: {e}") from e
    place = {key.hex(): i for i, key in enumerate(keys)}
    out = np.full(len(keys), np.nan, np.float32)
    expected = 'expected {"row": index or key, "value": number}'
    for number, line in enumerate(lines, 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            row, value = entry["row"], entry["value"]
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise BadData(f"{where}: {expected}, got {line[:60]!r}") from e
        if isinstance(row, str):
            index = place.get(row.lower(), -1)
        else:
            index = row if isinstance(row, int) and not isinstance(row, bool) else -1
        if not 0 <= index < len(keys):
            raise BadData(
                f"{where}: row {_said(row)} is not among the task's {len(keys)} eval rows"
            )
        # The comparison is exact for whole numbers of any size, and False for NaN.
        if not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
            raise BadData(f"{where}: {expected}, got the value {_said(value)}")
        if not math.isnan(out[index]):
            raise BadData(f"{where}: row {_said(row)} is there twice")
        out[index] = value
    if np.isnan(out).all():
        raise BadData(f"{file} holds no outcomes: {expected}, a line each")
    return out


def _said(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
