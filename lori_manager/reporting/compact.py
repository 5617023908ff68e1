"""A report as the compact JSON that its page carries: columns of whole numbers.

    versions   one list a field, a version's place being its index everywhere else
    tasks      per task, `scale` and `cells`; a number x stands there as round(x * scale)
    cells      one list a field, null where nothing was measured:
               i index of the version, v value, l and h the interval's ends, n rows,
               o others; for the parent p and for the best b: pa index of the version
               compared with, pc change, pl and ph its interval, px lost and pg gained
               rows, pm mark (-1 worse, 1 better, 0 neither)
    changed    the rows that changed; overlap, sequences, aliases, notes: as in contents.py

A list that holds one value throughout is that value alone. Four significant digits are kept:
a history of 200 tasks and 500 versions is 100,000 cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from typing import Any

from lori_manager.reporting.contents import Change, Report, TaskHistory
from lori_manager.reporting.harmless import visible

_MARK = {"worse": -1, "better": 1, "": 0}


def compact(report: Report) -> dict[str, Any]:
    """The page's data: plain JSON values, every text made harmless."""
    place = {v.ref: i for i, v in enumerate(report.versions)}
    columns = {
        field.name: _column([plain(getattr(v, field.name)) for v in report.versions])
        for field in fields(report.versions[0])
    }
    columns["parents"] = [
        [[place.get(ref, -1), ref, plain(weight)] for ref, weight in v.parents]
        for v in report.versions
    ]
    return {
        "count": len(report.versions),
        "versions": columns,
        "focus": None if report.focus is None else place[report.focus],
        "tasks": [_task(task, place) for task in report.tasks],
        "changed": plain(report.changed),
        "overlap": plain(report.overlap),
    }


def plain(value: Any) -> Any:
    """`value` in JSON's own types, floats with six significant digits."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {visible(str(k)): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _task(task: TaskHistory, place: Mapping[str, int]) -> dict[str, Any]:
    largest = max((abs(c.value) for c in task.cells if not math.isnan(c.value)), default=1.0)
    digits = 4 - math.ceil(math.log10(largest)) if largest > 0 else 4
    scale = 10.0**digits
    cells = task.cells
    packed: dict[str, Any] = {
        "i": [place[c.version] for c in cells],
        "v": [_whole(c.value, scale) for c in cells],
        "l": [_whole(c.low, scale) for c in cells],
        "h": [_whole(c.high, scale) for c in cells],
        "n": _column([c.rows for c in cells]),
        "o": _column([c.others for c in cells]),
        "origin": _column([visible(c.origin) for c in cells]),
        "precision": _column([visible(c.precision) for c in cells]),
    }
    for letter, changes in (("p", [c.parent for c in cells]), ("b", [c.best for c in cells])):
        packed |= _changes(letter, changes, scale, place)
    return {
        "ref": visible(task.ref),
        "scorer": visible(task.scorer),
        "higher": task.higher_is_better,
        "rows": task.eval_rows,
        "latest": task.latest,
        "note": visible(task.note),
        "scale": scale,
        "digits": max(0, digits - 1),
        "cells": packed,
    }


def _changes(
    letter: str, changes: Sequence[Change | None], scale: float, place: Mapping[str, int]
) -> dict[str, Any]:
    def of(name: str) -> list[float | None]:
        return [None if c is None else _whole(getattr(c, name), scale) for c in changes]

    return {
        f"{letter}a": _column([None if c is None else place.get(c.against) for c in changes]),
        f"{letter}c": _column(of("change")),
        f"{letter}l": _column(of("low")),
        f"{letter}h": _column(of("high")),
        f"{letter}x": _column([None if c is None else c.lost for c in changes]),
        f"{letter}g": _column([None if c is None else c.gained for c in changes]),
        f"{letter}m": _column([0 if c is None else _MARK[c.verdict] for c in changes]),
        f"{letter}note": _column([None if c is None else visible(c.note) for c in changes]),
    }


def _whole(value: float, scale: float) -> int | None:
    return round(value * scale) if math.isfinite(value) else None


def _column(values: list[Any]) -> Any:
    """The list, or its one value where all are the same and none is a list itself."""
    first = values[0] if values else None
    if isinstance(first, list | tuple) or any(v != first for v in values):
        return values
    return first
