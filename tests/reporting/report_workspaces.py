"""Workspaces with scores and rows of our own choosing; no model is near."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from lori_manager.metrics.summary import summarize
from lori_manager.records import Base, NewAdapter, NewScore, Parent, Split
from lori_manager.store.store import Store
from lori_manager.tasks.rows import Row, rows_to_jsonl
from lori_manager.workspace import Workspace

FINGERPRINT = "f" * 64


class History:
    """Writes a workspace's store, a line a fact."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self.store = Store.create(root / ".lori")
        self.store.set_base(_base())
        self._digests = {}

    def task(self, name, rows, scorer="exact_match"):
        """Rows as (prompt, completion), or so many made up."""
        if isinstance(rows, int):
            rows = [(f"{name} question {i}", f" answer {i}") for i in range(rows)]
        rows = [Row(prompt, completion) for prompt, completion in rows]
        content = rows_to_jsonl(rows)
        split = Split(self.store.objects.put(content), len(rows))
        self.store.add_task(
            name, scorer=scorer, scorer_version="1", description="", splits={"eval": split},
            options={},
        )  # fmt: skip
        return self

    def adapter(self, line, *parents, origin="trained", task=None, **changes):
        """The line's next version; its ref."""
        found = [a for a in self.store.adapters() if a.ref in parents]
        values = {
            "line": line, "origin": origin, "task": task, "task_revision": task and 1,
            "mask": None, "parents": [
                Parent(a.ref, a.digest, 1 / len(found) if origin == "merged" else None)
                for a in found
            ],
            "method": "layerwise" if origin == "merged" else "lori-s", "rank": 8,
            "projection": None, "base": FINGERPRINT,
        }  # fmt: skip
        content = b"adapter %d" % len(self._digests)
        made = self.store.add_adapter(NewAdapter(**values | changes), content)
        self._digests[made.ref] = made.digest
        return made.ref

    def score(self, subject, task, outcomes, weights=None, **changes):
        """One outcome a row."""
        x = np.asarray(outcomes, np.float32)
        w = None if weights is None else np.asarray(weights, np.float32)
        value, error, rows = summarize(x, w)
        of = self.store.task(task)
        new = NewScore(
            subject, self._digests.get(subject, FINGERPRINT), task, of.revision, of.scorer, "1",
            "fp32", value, error, rows,
        )  # fmt: skip
        self.store.add_score(dataclasses.replace(new, **changes), x, w)
        return self

    def right(self, subject, task, rows, of=100):
        """The first `rows` of `of` right."""
        return self.score(subject, task, [1] * rows + [0] * (of - rows))

    def opened(self) -> Workspace:
        """The workspace; closes nothing."""
        return Workspace(self.root, self.store)


def _base() -> Base:
    from datetime import UTC, datetime

    return Base(FINGERPRINT, "/somewhere/secret/tiny", None, "/models/tiny", "llama",
                datetime(2026, 1, 2, tzinfo=UTC))  # fmt: skip


def two_tasks_and_a_merge(root: Path) -> History:
    """nlu and code, an adapter each, two merges; main@1 is production, main@2 lost on nlu."""
    history = History(root).task("nlu", 100).task("code", 100)
    for task, rows in (("nlu", 90), ("code", 80)):
        history.right("base", task, 10)
        history.right(history.adapter(task, task=task), task, rows)
    for nlu, code in ((85, 50), (60, 79)):
        merged = history.adapter("main", "nlu@1", "code@1", origin="merged")
        history.right(merged, "nlu", nlu).right(merged, "code", code)
    history.store.set_alias("main", "production", 1)
    return history
