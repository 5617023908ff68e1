"""R of a sequence or of a line of merges: every version on every task, and the figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lori_manager.auditing.groups import Group
from lori_manager.auditing.lineage import Lineage
from lori_manager.auditing.results import SequenceAudit
from lori_manager.metrics.continual import Figure, continual_figures, other_figures
from lori_manager.metrics.merge_line import merge_line_figures
from lori_manager.records import Adapter, Line
from lori_manager.refs import BASE

SEQUENCE, MERGES = "sequence", "merges"
_TWO_WAYS = "the tasks' scorers point in different ways, so no figure can average them"


@dataclass(frozen=True)
class Column:
    """The values on one task revision, by the newest scorer: what a matrix needs of a group."""

    task: str
    ref: str
    higher_is_better: bool
    values: Mapping[str, float]  # by subject

    @classmethod
    def of(cls, group: Group) -> Column:
        """Out of the group's scores."""
        own = ((subject, group.score(subject)) for subject in group.scores)
        values = {subject: score.value for subject, score in own if score is not None}
        return cls(group.task, group.ref, group.higher_is_better, values)


class Columns:
    """The columns that a matrix may have, by task ref, the newest revision of a task first."""

    def __init__(self) -> None:
        self._by_ref: dict[str, Column] = {}
        self._by_task: dict[str, list[Column]] = {}

    def add(self, task: str, groups: Sequence[Group]) -> None:
        """A task's groups, newest first; of one revision's the newest scorer counts."""
        for group in groups:
            if group.ref not in self._by_ref:
                column = self._by_ref[group.ref] = Column.of(group)
                self._by_task.setdefault(task, []).append(column)

    def value(self, subject: str | None, ref: str) -> float:
        """NaN where not measured."""
        column = self._by_ref.get(ref)
        if column is None or subject is None:
            return math.nan
        return column.values.get(subject, math.nan)

    def scored(self, task: str, subjects: Sequence[str]) -> str | None:
        """The task's newest revision that any of `subjects` was scored on."""
        for column in self._by_task.get(task, []):
            if any(subject in column.values for subject in subjects):
                return column.ref
        return None

    def tasks(self) -> Sequence[str]:
        """Names of all tasks with scores."""
        return list(self._by_task)

    def directions(self, refs: Sequence[str]) -> set[bool]:
        """Which ways their scorers point."""
        return {self._by_ref[ref].higher_is_better for ref in refs if ref in self._by_ref}


def sequence_audit(
    line: Line, last: Adapter, lineage: Lineage, columns: Columns
) -> SequenceAudit | None:
    """R and the figures of a line that is a sequence, up to `last`; None for any other line."""
    stages = [a for a in lineage.line(last) if a.sequence and a.task is not None]
    if not line.sequence or not stages:
        return None
    taught = [f"{a.task}#{a.task_revision}" for a in stages]
    coming = [t for t in line.sequence if t not in taught]
    names = [str(a.task) for a in stages]
    return _matrix(SEQUENCE, line, stages, taught, coming, names, range(len(stages)),
                   lineage, columns)  # fmt: skip


def merges_audit(
    line: Line, last: Adapter, lineage: Lineage, columns: Columns
) -> SequenceAudit | None:
    """R and the figures of a line of merges, up to `last`; None where there are not two versions.

    Its tasks are those that `last` descends from, in the order in which the versions
    brought them in; what only earlier versions held was dropped and counts as only scored.
    """
    versions = lineage.line(last)
    if line.sequence or len(versions) < 2 or all(a.origin != "merged" for a in versions):
        return None
    held = set(lineage.tasks_in(last))
    introduced: dict[str, int] = {}
    for row, version in enumerate(versions):
        for name in lineage.tasks_in(version):
            if name in held:
                introduced.setdefault(name, row)
    subjects = [a.ref for a in versions]
    scored = {name: columns.scored(name, subjects) for name in introduced}
    names = [name for name, ref in scored.items() if ref is not None]
    taught = [ref for ref in scored.values() if ref is not None]
    if not taught:
        return None
    return _matrix(MERGES, line, versions, taught, [], names, [introduced[n] for n in names],
                   lineage, columns)  # fmt: skip


def _matrix(
    kind: str,
    line: Line,
    stages: Sequence[Adapter],
    taught: Sequence[str],
    coming: Sequence[str],
    names: Sequence[str],
    introduced: Sequence[int],
    lineage: Lineage,
    columns: Columns,
) -> SequenceAudit:
    """
    Args:
        taught: refs of the first columns; `names` are their tasks, `introduced` their rows.
        coming: refs that follow; a task still to be taught is no suite outside the sequence.
    """
    subjects = [a.ref for a in stages]
    known = {*names, *(ref.partition("#")[0] for ref in coming)}
    suites = (columns.scored(t, subjects) for t in columns.tasks() if t not in known)
    outside = [ref for ref in suites if ref is not None]
    every = [*taught, *coming, *outside]
    R = np.array([[columns.value(subject, t) for t in every] for subject in subjects])
    base = np.array([columns.value(BASE, t) for t in every])
    own = [lineage.own(name) for name in names]
    references = [a.ref if a is not None else None for a in own]
    counted = [i for i, t in enumerate(every) if t not in coming]
    directions = columns.directions([every[i] for i in counted])
    figures: tuple[Figure, ...] = ()
    variants: tuple[Figure, ...] = ()
    if len(directions) <= 1:
        reference = [columns.value(r, t) for r, t in zip(references, taught, strict=True)]
        up = directions != {False}
        if kind == SEQUENCE:
            figures = continual_figures(
                R[:, counted], base[counted], reference, higher_is_better=up
            )
            variants = other_figures(R[:, counted], higher_is_better=up)
        else:
            figures = merge_line_figures(R, introduced, base, reference, higher_is_better=up)
    return SequenceAudit(
        line.name,
        tuple(subjects),
        tuple(every),
        len(taught),
        tuple(tuple(float(x) for x in row) for row in R),
        tuple(float(x) for x in base),
        tuple(references),
        figures,
        "" if len(directions) <= 1 else _TWO_WAYS,
        kind,
        tuple(introduced),
        tuple(outside),
        variants,
    )
