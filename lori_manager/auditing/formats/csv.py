"""One line a score: every entry with what it was compared with, for spreadsheets and scripts."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from lori_manager.auditing.results import Comparison, Entry, TaskAudit
from lori_manager.auditing.run import AuditRun

_TASK = ("task", "revision", "latest", "scorer", "scorer_version", "higher_is_better")
_ENTRY = (
    "subject", "aliases", "created_at", "scored_at", "value", "error", "rows", "origin",
    "precision",
)  # fmt: skip
_COMPARISON = (
    "against", "change", "low", "high", "p", "p_corrected", "correction", "family", "rows",
    "rows_only_before", "rows_only_after", "gained", "lost", "worse", "real", "note",
)  # fmt: skip
_KINDS = ("parent", "previous", "best", "against")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run


def lines(run: AuditRun) -> Iterator[str]:
    """The heading and a line for each entry (RFC 4180); what is not known is empty."""
    columns = [f"{kind}_{name}" for kind in _KINDS for name in _COMPARISON]
    yield _line([*_TASK, *_ENTRY, *columns])
    for task in run.tasks():
        for entry in task.entries:
            yield _line(_cells(task, entry))


def _cells(task: TaskAudit, entry: Entry) -> list[Any]:
    found = [getattr(task, name) for name in _TASK] + [getattr(entry, name) for name in _ENTRY]
    for kind in _KINDS:
        comparison: Comparison | None = getattr(entry, kind)
        found += [None if comparison is None else getattr(comparison, n) for n in _COMPARISON]
    return found


def _line(cells: Sequence[Any]) -> str:
    out = io.StringIO()
    csv.writer(out).writerow([_cell(value) for value in cells])
    return out.getvalue()


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, str) and value.startswith(_FORMULA):
        return "'" + value
    return value
