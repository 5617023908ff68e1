"""An audit under way: task after task, each told as soon as it is ready."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from lori_manager.auditing.choosing import Filters, experiments, without
from lori_manager.auditing.comparing import Comparer, Loaded
from lori_manager.auditing.drops import drop
from lori_manager.auditing.families import Families
from lori_manager.auditing.groups import Group, groups
from lori_manager.auditing.lineage import Lineage
from lori_manager.auditing.pairing import Against
from lori_manager.auditing.reading import AuditStore
from lori_manager.auditing.results import Audit, SequenceAudit, TaskAudit
from lori_manager.auditing.sequences import Columns, merges_audit, sequence_audit
from lori_manager.auditing.tasks import View, audit_group, unscored
from lori_manager.errors import InvalidInput
from lori_manager.plain import counted
from lori_manager.records import Adapter, Finding, Line, Task
from lori_manager.refs import BASE, parse_adapter_ref


def audit(
    store: AuditStore,
    ref: str | None = None,
    task: str | Sequence[str] | None = None,
    max_drop: float | None = None,
    *,
    against: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    alias: str | None = None,
    most: int | None = None,
) -> Audit:
    """Compare every score in scope with its parent's and with the best before it.

    Args:
        store: only read.
        ref: `line@3`, `line@latest`, `line@alias`, a bare `line` (the same as its latest) or
            `base`. The scope is then the line's adapters up to that one, their parents and
            members, and the base. None: everything, but what comparisons of kinds trained.
        task: only this task or these, all revisions; no matrices are then reported.
        max_drop: in the score's own units. Gives a finding of kind "drop" for each task on
            which a judged adapter (`ref`, or each line's latest) is further than this below
            the best of its line's history: the base, the line's adapters up to it, and their
            parents and members. Significance is told, not required.
        against: what every version is held against as well: `base` or a reference with an
            `@`, or an alias, on each line that has it. None: each line's `production`, else
            its `champion`, where there is one.
        since, until: only adapters made then, with a time zone. What is told changes with
            these and `alias`, no comparison does; the base is always told.
        alias: only adapters that this alias points at, on any line.
        most: tell no more than what matters of a longer history: base, own, best, aliases,
            the judged, the newest and the largest real regressions. None: all.

    A continued adapter is compared with its parent; one trained on the base with the base;
    a merge with the member that was trained on the task, or with the base where none was.
    Best is by value among the subjects before it in scope, at the same precision where one
    was scored at it; one that was measured on only some of the rows counts only until a
    subject was measured on all. The best of many is partly the luckiest, so a change against
    it leans to the worse; p does not correct that. `families` says how p is corrected for
    the tasks that are looked at together.

    Raises:
        NotFound: no such line, adapter, alias or task.
        InvalidInput: a `ref` that is none, or `max_drop` negative or not a number.
    """
    run = AuditRun(
        store,
        ref,
        task,
        max_drop,
        against=against,
        since=since,
        until=until,
        alias=alias,
        most=most,
    )
    return run.all()


class AuditRun:
    """What `audit` does, one task at a time: `tasks`, then `sequences`, then `rest`.

    Findings, regressions and notes grow on the way and are whole after `tasks`.
    """

    def __init__(
        self,
        store: AuditStore,
        ref: str | None = None,
        task: str | Sequence[str] | None = None,
        max_drop: float | None = None,
        *,
        against: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        alias: str | None = None,
        most: int | None = None,
        judged_alone: bool = False,
    ) -> None:
        """As `audit`, which see; `judged_alone` tells the judged adapters and the base alone."""
        if max_drop is not None and not 0 <= max_drop < math.inf:
            raise InvalidInput(f"`max_drop` must be a number of at least 0, got {max_drop}")
        self.store = store
        self.ref = ref
        self.max_drop = max_drop
        names = [task] if isinstance(task, str) else task
        asked = store.tasks() if names is None else [store.task(name) for name in names]
        self.latest: dict[str, Task] = {}
        for one in asked:
            if one.name not in self.latest or one.revision > self.latest[one.name].revision:
                self.latest[one.name] = one
        adapters, lines = store.adapters(), store.lines()
        left_out = experiments(adapters, lines) if ref is None else frozenset()
        if left_out:
            lines = without(left_out, lines, adapters)
            adapters = [a for a in adapters if a.ref not in left_out]
        self.lineage = Lineage(adapters, lines)
        self.judged = self._judged()
        self.against = Against.of(against, store, self.lineage)
        self.asked: dict[str, Any] = {
            "tasks": names, "since": since, "until": until, "alias": alias, "against": against,
            "most": most,
        }  # fmt: skip
        self.findings: list[Finding] = []
        self.regressions: list[Finding] = []
        self.notes: list[str] = []
        if left_out:
            some = min(left_out).partition("@")[0]
            self.notes.append(
                f"{counted(len(left_out), 'adapter')} of `lori compare` left out: name one, such "
                f"as {some}, to see its line"
            )
        scope = self.lineage.everything()
        if ref is not None:
            scope = self.lineage.history(self.judged[0]) if self.judged else frozenset({BASE})
        judged = frozenset(a.ref for a in self.judged)
        self._revision = lru_cache(maxsize=None)(self._task)
        families = Families(
            store, self.lineage, self.against, judged, self._revision, frozenset(self.latest)
        )
        filters = Filters(since, until, alias, judged if judged_alone else None)
        self._view = View(self.lineage, self.against, families, scope, judged, filters, most)
        self._columns = Columns()

    def tasks(self) -> Iterator[TaskAudit]:
        """Every task in its order, the newest revision first, read and judged when asked for."""
        for current in self.latest.values():
            own = groups(self.store.scores(task=current.name)).get(current.name, [])
            self._columns.add(current.name, own)
            pending = {a.ref: a for a in self.judged}
            reported = False
            for group in own:
                frozen = self._revision(group.task, group.revision)
                comparer = Comparer(Loaded(self.store), group, frozen)
                if self._view.scope & group.scores.keys():
                    reported = True
                    found = audit_group(group, current, self._view, comparer)
                    self.regressions += found.regressions
                    yield found.audit
                if self.max_drop is not None:
                    self._drops(group, current, pending, comparer, self.max_drop)
            if self.max_drop is not None:
                self._not_judged(current, own, list(pending.values()))
            if not reported:
                yield unscored(current)

    def sequences(self) -> Iterator[SequenceAudit]:
        """The matrices of sequences and lines of merges, after `tasks`; none for chosen tasks."""
        if self.asked["tasks"] is not None:
            return
        for last in self.judged:
            line = self.lineage.lines[last.line]
            for make in (sequence_audit, merges_audit):
                found = make(line, last, self.lineage, self._columns)
                if found is not None:
                    yield found

    def rest(
        self, tasks: Sequence[TaskAudit] = (), sequences: Sequence[SequenceAudit] = ()
    ) -> Audit:
        """All of it as one value, after `tasks`."""
        return Audit(
            self.ref,
            tuple(a.ref for a in self.judged),
            tuple(tasks),
            tuple(sequences),
            self.max_drop,
            tuple(self.findings),
            tuple(self.notes),
            tuple(self.regressions),
            self.against.refs,
            self.asked,
        )

    def all(self) -> Audit:
        """Run to the end."""
        tasks = tuple(self.tasks())
        return self.rest(tasks, tuple(self.sequences()))

    def _judged(self) -> list[Adapter]:
        """The adapter of each line in question that stands for it."""
        if self.ref is None:
            lines: list[Line] = list(self.lineage.lines.values())
            return [line.latest for line in lines if line.latest is not None]
        parsed = parse_adapter_ref(self.ref)
        return [] if parsed is None else [self.store.adapter(parsed)]

    def _task(self, name: str, revision: int) -> Task:
        current = self.latest.get(name)
        if current is not None and current.revision == revision:
            return current
        return self.store.task(name, revision)

    def _drops(
        self,
        group: Group,
        current: Task,
        pending: dict[str, Adapter],
        comparer: Comparer,
        max_drop: float,
    ) -> None:
        """Judge those of `pending` that were scored here, and take them out of it."""
        for adapter in [a for a in pending.values() if group.score(a.ref) is not None]:
            del pending[adapter.ref]
            if group.revision != current.revision:
                self.notes.append(
                    f"{adapter.ref} is judged on {group.ref}, for want of a score on {current.ref}"
                )
            families = self._view.families
            self.findings += drop(adapter, group, self.lineage, comparer, families, max_drop)

    def _not_judged(self, current: Task, own: Sequence[Group], pending: Sequence[Adapter]) -> None:
        self.notes += [
            f"{a.ref} was never scored on {current.name}, so a drop there cannot be seen"
            for a in pending
            if any(self.lineage.history(a) & group.scores.keys() for group in own)
        ]
