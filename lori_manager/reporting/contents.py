"""What a report holds, as plain frozen values: everything that the page shows, and no more.

Scores and changes are in the scorer's own units; `low` and `high` bound 95% intervals
(of changes as in comparing.py, of scores as in intervals.py). What was not measured is NaN
or None, never 0. Text is as stored: only
the page makes it harmless.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from lori_manager.metrics.continual import Figure
from lori_manager.reporting.kind_comparisons import KindsCompared

PARENT = "parent"  # the purpose of a comparison with what a version was made from


@dataclass(frozen=True)
class Version:
    """The base or one adapter."""

    ref: str  # "base" or "main@2"
    line: str  # "" for the base
    origin: str  # "base", "trained", "merged" or "imported"
    method: str
    rank: int | None
    bytes: int | None  # of the stored adapter
    created_at: datetime | None
    task: str | None  # the task taught at this stage, "safety#1"
    mask: str | None
    parents: tuple[tuple[str, float | None], ...]  # refs, with weights where merged
    aliases: tuple[str, ...]  # names that point here now
    sequence: bool


@dataclass(frozen=True)
class Change:
    """How a version differs from another on the rows that both have."""

    against: str
    change: float  # after - before
    low: float
    high: float
    p: float  # two-sided, of this comparison alone
    rows: int  # measured in both
    rows_only_before: int
    rows_only_after: int
    gained: int | None  # rows that became right; None unless outcomes are right/wrong
    lost: int | None  # rows that were right
    verdict: str  # "worse" or "better" where beyond noise, Holm over the version's tasks; else ""
    note: str

    def possible_drop(self, higher_is_better: bool) -> float:
        """The largest drop inside the interval, at least 0; NaN where nothing was compared."""
        return max(0.0, -self.low if higher_is_better else self.high)


@dataclass(frozen=True)
class Cell:
    """One version on one task."""

    version: str
    value: float
    low: float
    high: float
    rows: int
    origin: str  # "measured", or what was said of outcomes measured elsewhere
    precision: str
    parent: Change | None  # None for the base
    best: Change | None  # against the best before it; None where nothing came before
    others: int  # further scores of this version here, in other precisions or origins


@dataclass(frozen=True)
class TaskHistory:
    """Every version on one revision of a task under one version of its scorer, in time order."""

    ref: str  # "safety#2"
    name: str
    latest: bool  # whether it is the task's latest revision
    scorer: str
    scorer_version: str
    higher_is_better: bool
    eval_rows: int
    best: str | None
    cells: tuple[Cell, ...]
    note: str

    def cell(self, version: str) -> Cell | None:
        """That version's cell, if it was scored here."""
        return next((c for c in self.cells if c.version == version), None)


@dataclass(frozen=True)
class ChangedRow:
    """One eval row whose outcome changed between two versions."""

    index: int  # position among the task revision's eval rows, from 0
    improved: bool
    prompt: str  # long ones are cut in the middle
    expected: str
    before: float  # outcomes: 1 and 0 for right and wrong
    after: float
    answer_before: str | None  # where answers are stored
    answer_after: str | None


@dataclass(frozen=True)
class ChangedRows:
    """The rows of one task that changed between two versions, the most changed first."""

    pair: str  # what it is compared with: PARENT, an alias's name, or that and " before"
    task: str
    before: str
    after: str
    change: Change
    worsened: int  # how many there are; `rows` may hold fewer
    improved: int
    rows: tuple[ChangedRow, ...]


@dataclass(frozen=True)
class Mask:
    """One mask: which entries of B may train."""

    ref: str  # "safety%2"
    kept: int
    total: int
    projection: str  # digest of the A that it belongs to


@dataclass(frozen=True)
class MaskOverlap:
    """How much the tasks' newest masks share.

    `shares[i][j]` is the share of the smaller mask's entries that the other holds too; None
    where the two have other modules or shapes. By chance it would be the larger mask's density.
    """

    masks: tuple[Mask, ...]
    shares: tuple[tuple[float | None, ...], ...]
    left_out: int  # tasks with masks that are not among them


@dataclass(frozen=True)
class Sequence:
    """R of a sequence and its figures; see `lori_manager.metrics.continual`."""

    line: str
    stages: tuple[str, ...]
    tasks: tuple[str, ...]
    R: tuple[tuple[float, ...], ...]
    figures: tuple[Figure, ...]
    note: str


@dataclass(frozen=True)
class Alias:
    """A movable name, where it points and where it pointed before."""

    ref: str  # "main@production"
    version: str
    moved_at: datetime
    before: str | None  # the version that it meant before the last move
    behind: int  # versions of its line after the one it means


@dataclass(frozen=True)
class Statement:
    """One sentence of the headline, with a command where there is one to give."""

    kind: str  # "in use", "change", "worse", "better", "open", "lost before", "next"
    text: str
    command: str = ""


@dataclass(frozen=True)
class Headline:
    """What the report says in words."""

    title: str
    statements: tuple[Statement, ...]


@dataclass(frozen=True)
class Report:
    """All of it."""

    workspace: str
    base: str  # a hub id, or the name of a folder
    made_at: datetime
    scope: str | None  # the REF that was asked for
    newest: str | None  # the newest adapter in scope
    focus: str | None  # the newest one that has scores: the headline is about it
    versions: tuple[Version, ...]  # in time order, the base first
    aliases: tuple[Alias, ...]
    tasks: tuple[TaskHistory, ...]
    changed: tuple[ChangedRows, ...]
    overlap: MaskOverlap | None
    sequences: tuple[Sequence, ...]
    notes: tuple[str, ...]
    comparisons: tuple[KindsCompared, ...] = ()  # of kinds, oldest first
    headline: Headline = Headline("", ())

    def version(self, ref: str) -> Version:
        """That version; KeyError where it is not in scope."""
        for version in self.versions:
            if version.ref == ref:
                return version
        raise KeyError(ref)
