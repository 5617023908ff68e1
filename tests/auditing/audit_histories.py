"""Small histories on a store that lives in memory."""

from datetime import UTC, datetime, timedelta

import numpy as np

from lori_manager.errors import NotFound
from lori_manager.metrics.summary import summarize
from lori_manager.records import Adapter, Line, Parent, Score, Split, Task


class FakeStore:
    """The part of the store that an audit reads; counts what it is asked for."""

    def __init__(self):
        self._tasks, self._adapters, self._scores, self._outcomes = {}, {}, [], {}
        self._aliases, self._sequences = {}, {}
        self.loaded, self.readings = [], 0
        self._clock = datetime(2025, 1, 1, tzinfo=UTC)

    def _now(self):
        self._clock += timedelta(minutes=1)
        return self._clock

    def add_task(self, name, rows=10, scorer="exact_match"):
        revision = len(self._tasks.setdefault(name, [])) + 1
        split = {"eval": Split("0" * 64, rows)}
        self._tasks[name].append(Task(name, revision, scorer, "1", "", split, {}, self._now()))

    def add_adapter(self, line, task=None, *, parents=(), origin="trained", sequence=False):
        version = 1 + sum(a.line == line for a in self._adapters.values())
        adapter = Adapter(
            line, origin, task, self.task(task).revision if task else None, None,
            [Parent(p, "") for p in parents], "lori-s", 8, None, "fp", sequence=sequence,
            version=version, created_at=self._now(),
        )  # fmt: skip
        self._adapters[adapter.ref] = adapter
        if sequence:
            self._sequences.setdefault(line, []).append(f"{task}#{adapter.task_revision}")
        return adapter.ref

    def alias(self, ref, name):
        line, version = ref.split("@")
        self._aliases.setdefault(line, {})[name] = int(version)

    def add_score(self, subject, task, outcomes, weights=None, *, revision=None, **changes):
        x = np.asarray(outcomes, dtype=np.float32)
        value, error, rows = summarize(x, weights)
        of = self.task(task, revision)
        fields = {
            "subject": subject, "digest": subject, "task": task, "task_revision": of.revision,
            "scorer": of.scorer, "scorer_version": of.scorer_version, "precision": "fp32",
            "value": value, "error": error, "rows": rows, "id": len(self._scores) + 1,
            "created_at": self._now(),
        } | changes  # fmt: skip
        self._scores.append(Score(**fields))
        self._outcomes[fields["id"]] = (x, weights)

    def right(self, subject, task, n, of=10, **changes):
        """Score `subject` with the first n rows right."""
        self.add_score(subject, task, [1] * n + [0] * (of - n), **changes)

    def task(self, name, revision=None):
        if name not in self._tasks:
            raise NotFound(f"no task is called {name!r}")
        return self._tasks[name][(revision or 0) - 1]

    def tasks(self):
        return [self.task(name) for name in self._tasks]

    def line(self, name):
        own = [a for a in self._adapters.values() if a.line == name]
        if not own:
            raise NotFound(f"no line is called {name!r}")
        return Line(
            name, name if name in self._tasks else None, tuple(self._sequences.get(name, ())),
            len(own), own[-1], self._aliases.get(name, {}), own[0].created_at,
        )  # fmt: skip

    def lines(self):
        return [self.line(name) for name in dict.fromkeys(a.line for a in self._adapters.values())]

    def adapter(self, ref):
        line = self.line(ref.line)
        version = ref.version or (
            line.versions if ref.selector == "latest" else line.aliases.get(ref.selector)
        )
        if f"{ref.line}@{version}" not in self._adapters:
            raise NotFound(f"no adapter is called {ref}")
        return self._adapters[f"{ref.line}@{version}"]

    def adapter_at(self, ref):
        return self._adapters[ref]

    def adapters(self, line=None):
        return [a for a in self._adapters.values() if line in (None, a.line)]

    def scores(self, *, subject=None, task=None, revision=None):
        return [
            s for s in self._scores
            if subject in (None, s.subject) and task in (None, s.task)
            and revision in (None, s.task_revision)
        ]  # fmt: skip

    def scores_of(self, subjects):
        return [s for s in self._scores if s.subject in subjects]

    def outcomes_of(self, scores):
        self.readings += 1
        self.loaded += [(s.subject, s.task, s.task_revision) for s in scores]
        return [self._outcomes[s.id] for s in scores]


def of_task(result, name, revision=None):
    return next(t for t in result.tasks if t.task == name and revision in (None, t.revision))


def entry(result, task, subject):
    return next(e for e in of_task(result, task).entries if e.subject == subject)
