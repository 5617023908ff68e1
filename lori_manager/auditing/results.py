"""What an audit says, as frozen values, and the same as plain JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from typing import Any

import numpy as np

from lori_manager.metrics.continual import Figure
from lori_manager.records import Finding

FORMAT = "lori-audit"
VERSION = 1  # of the JSON document: lori_manager/schemas/audit.json, docs/json.md
SIGNIFICANCE = 0.05  # a change whose corrected p is smaller is called real
POWER = 0.8  # chance of being found of the smallest drop that is told
HOLM = "holm"
BONFERRONI = "bonferroni"


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a subject's outcomes differ from another's on the rows that both have.

    `change` is after - before in the score's own units, so its sign alone does not say
    better or worse: `worse` does, whichever way the scorer points. Where the two cannot
    be compared, the numbers are NaN and `note` says why.
    """

    against: str
    change: float = math.nan
    error: float = math.nan
    p: float = math.nan  # two-sided, for this comparison alone
    test: str = ""
    rows: int = 0  # measured in both
    rows_only_before: int = 0
    rows_only_after: int = 0
    gained: int | None = None  # rows that became right; None unless outcomes are right/wrong
    lost: int | None = None  # rows that were right
    worse: bool = False
    real: bool = False  # p_corrected < SIGNIFICANCE
    note: str = ""
    low: float = math.nan  # 95% interval of `change`, paired
    high: float = math.nan
    interval: str = ""  # how it was made
    p_corrected: float = math.nan  # for the tasks that are looked at together
    correction: str = ""  # "holm", "bonferroni", or "" where nothing is looked at together
    family: int = 1  # how many comparisons it is corrected for
    precision: str = ""  # of what it is compared with


@dataclass(frozen=True, slots=True)
class Entry:
    """One score of one subject, compared with what came before it."""

    subject: str  # "base" or an adapter ref
    created_at: datetime | None  # of the adapter; None for the base
    scored_at: datetime
    value: float
    error: float
    rows: int
    origin: str  # "measured", or what was said of outcomes measured elsewhere
    imported: bool  # measured elsewhere
    precision: str
    parent: Comparison | None  # None for the base
    best: Comparison | None  # None where nothing came before
    previous: Comparison | None = None  # the version before it on its line; None: the parent is
    against: Comparison | None = None  # None where there is nothing to hold it against
    aliases: tuple[str, ...] = ()  # those that point at it


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The smallest true drop that a comparison of two versions on these rows finds.

    Found means a two-sided p of at most `alpha`, .05 over the number of tasks, which is
    Holm's first step; with the probability `power`. It depends on how much the outcomes of
    two versions differ from row to row, which is taken from the steps that were told, each
    version against the one before it or its parent (the median of those not trained on the
    task itself, if there are any).
    """

    drop: float  # in the score's own units, positive; infinite where no drop would be found
    rows: int
    discordance: float  # assumed share of rows that change; NaN unless right/wrong
    deviation: float  # assumed standard deviation of the rows' differences; else NaN
    alpha: float
    power: float
    assumption: str  # in words


@dataclass(frozen=True, slots=True)
class TaskAudit:
    """The audited scores on one revision of a task, in time order, the base first."""

    task: str
    revision: int
    latest: bool  # whether it is the task's latest revision
    scorer: str
    scorer_version: str
    higher_is_better: bool | None  # None where nothing was scored
    entries: tuple[Entry, ...]
    best: str | None  # the subject with the best value in scope
    note: str = ""
    rows: int = 0  # eval rows of the revision
    own: str | None = None  # the adapter that stands for the task's own line
    precisions: tuple[str, ...] = ()  # of all scores in scope
    omitted: int = 0  # entries in scope and within the filters that are not told
    regressions_omitted: int = 0  # those of them that really lost against what they came after
    sensitivity: Sensitivity | None = None  # None where no two versions were compared

    @property
    def ref(self) -> str:
        """`safety#2`."""
        return f"{self.task}#{self.revision}"


@dataclass(frozen=True, slots=True)
class SequenceAudit:
    """R of one sequence, or of a line of merges, and its figures.

    Columns: the tasks taught (or merged), in order, at the revision that was trained; then
    those that a sequence teaches later than the audited stage; then tasks that are only
    scored.
    """

    line: str
    stages: tuple[str, ...]  # adapter refs, the rows of R
    tasks: tuple[str, ...]  # task refs, the columns of R
    taught: int  # the first so many columns
    R: tuple[tuple[float, ...], ...]  # NaN where not measured
    base: tuple[float, ...]  # per column
    references: tuple[str | None, ...]  # per taught task, the adapter of its own line
    figures: tuple[Figure, ...]  # intransigence is against `references`
    note: str = ""
    kind: str = "sequence"  # or "merges"
    introduced: tuple[int, ...] = ()  # per taught task, the row of R that brought it in
    outside: tuple[str, ...] = ()  # the columns that are only scored
    variants: tuple[Figure, ...] = ()  # what others report under the same names; of a sequence


@dataclass(frozen=True, slots=True)
class Audit:
    """What `audit` found; `to_json` turns all of it into plain JSON."""

    ref: str | None
    adapters: tuple[str, ...]  # the refs that were judged: the audited one, or each line's latest
    tasks: tuple[TaskAudit, ...]
    sequences: tuple[SequenceAudit, ...]
    max_drop: float | None
    findings: tuple[Finding, ...]  # drops beyond `max_drop`
    notes: tuple[str, ...]  # what could not be judged, and why
    regressions: tuple[Finding, ...] = ()  # real ones of judged adapters, not from the best
    against: tuple[str, ...] = ()  # the refs behind `Entry.against`
    asked: Mapping[str, Any] | None = None  # the filters, as they were given

    def to_json(self) -> dict[str, Any]:
        """Dicts, lists, strings, numbers and null alone; NaN becomes null, times ISO 8601."""
        body: dict[str, Any] = plain(self)
        return {"format": FORMAT, "version": VERSION, **body}


def plain(value: Any) -> Any:
    """`value` in JSON's own types; what JSON cannot say (NaN, infinities) becomes None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, np.generic):
        return plain(value.item())
    return value
