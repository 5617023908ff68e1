"""The JSON document, written task by task so that a long history need not fit in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lori_manager.auditing.results import FORMAT, VERSION, plain
from lori_manager.auditing.run import AuditRun

_INDENT = "    "


def document(run: AuditRun) -> Iterator[str]:
    """`Audit.to_json` as text, in pieces; lori_manager/schemas/audit.json describes it."""
    head = json.dumps({"format": FORMAT, "version": VERSION}, indent=2)
    yield head.removesuffix("\n}") + ',\n  "tasks": ['
    separator = "\n"
    for task in run.tasks():
        yield separator + _INDENT + _text(plain(task))
        separator = ",\n"
    body = run.rest((), tuple(run.sequences())).to_json()
    rest = {key: value for key, value in body.items() if key not in ("format", "version", "tasks")}
    yield "\n  ],\n" + json.dumps(rest, indent=2, allow_nan=False).removeprefix("{\n") + "\n"


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False).replace("\n", "\n" + _INDENT)
