"""From stored scores to an audit: what every step did to every task, and whether it is real.

Scores are compared row by row, with the standard error of the paired difference, and only
within one revision of a task and one version of its scorer. Outcomes are loaded where a
comparison needs them and let go when their revision is done; no model is ever loaded.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import datetime
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lori_manager.errors import InvalidInput
from lori_manager.metrics.continual import Figure, continual_figures
from lori_manager.metrics.paired import PairedDifference, paired_difference
from lori_manager.records import Adapter, Finding, Line, Score, Task
from lori_manager.refs import BASE, AdapterRef, parse_adapter_ref

SIGNIFICANCE = 0.05  # a change with a smaller p is called real; for one comparison, uncorrected
CHAMPION = "champion"
_ROUNDING = 1e-9  # means of outcomes carry float error: .90 - .85 is not more than .05


class AuditStore(Protocol):
    """What an audit reads from the store."""

    def task(self, name: str, revision: int | None = None) -> Task:
        """One revision of a task, the latest by default; raises NotFound."""

    def tasks(self) -> Sequence[Task]:
        """Every task."""

    def line(self, name: str) -> Line:
        """One line; raises NotFound."""

    def lines(self) -> Sequence[Line]:
        """Every line."""

    def adapter(self, ref: AdapterRef) -> Adapter:
        """One adapter; raises NotFound."""

    def adapters(self, line: str | None = None) -> Sequence[Adapter]:
        """Every adapter, in order of creation."""

    def scores(
        self, *, subject: str | None = None, task: str | None = None, revision: int | None = None
    ) -> Sequence[Score]:
        """Every score that fits, in order of creation."""

    def outcomes(self, score: Score) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """The outcome of each row, NaN where not measured, and the rows' weights if any."""


@dataclass(frozen=True)
class Comparison:
    """How a subject's outcomes differ from another's on the rows that both have.

    `change` is after - before in the score's own units, so its sign alone does not say
    better or worse: `worse` does, whichever way the scorer points. Where the two cannot
    be compared, the numbers are NaN and `note` says why.
    """

    against: str
    change: float = math.nan
    error: float = math.nan
    p: float = math.nan
    test: str = ""
    rows: int = 0  # measured in both
    rows_only_before: int = 0
    rows_only_after: int = 0
    gained: int | None = None  # rows that became right; None unless outcomes are right/wrong
    lost: int | None = None  # rows that were right
    worse: bool = False
    real: bool = False  # p < SIGNIFICANCE
    note: str = ""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class TaskAudit:
    """Every audited score on one revision of a task, in time order, the base first."""

    task: str
    revision: int
    latest: bool  # whether it is the task's latest revision
    scorer: str
    scorer_version: str
    higher_is_better: bool | None  # None where nothing was scored
    entries: tuple[Entry, ...]
    best: str | None  # the subject with the best value among them
    note: str = ""

    @property
    def ref(self) -> str:
        """`safety#2`."""
        return f"{self.task}#{self.revision}"


@dataclass(frozen=True)
class SequenceAudit:
    """R of one sequence and its figures.

    Columns: the tasks taught, in order, at the revision that was trained; then those that
    the line teaches later than the audited stage; then tasks that are only scored.
    """

    line: str
    stages: tuple[str, ...]  # adapter refs, the rows of R
    tasks: tuple[str, ...]  # task refs, the columns of R
    taught: int  # the first so many columns, one per stage
    R: tuple[tuple[float, ...], ...]  # NaN where not measured
    base: tuple[float, ...]  # per column
    references: tuple[str | None, ...]  # per taught task, the adapter of its own line
    figures: tuple[Figure, ...]  # intransigence is against `references`
    note: str = ""


@dataclass(frozen=True)
class Audit:
    """What `audit` found; `to_json` turns all of it into plain JSON."""

    ref: str | None
    adapters: tuple[str, ...]  # the refs that were judged: the audited one, or each line's latest
    tasks: tuple[TaskAudit, ...]
    sequences: tuple[SequenceAudit, ...]
    max_drop: float | None
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]  # what could not be judged, and why

    def to_json(self) -> dict[str, Any]:
        """Dicts, lists, strings, numbers and null alone; NaN becomes null, times ISO 8601."""
        plain: dict[str, Any] = _plain(self)
        return plain


def audit(
    store: AuditStore,
    ref: str | None = None,
    task: str | None = None,
    max_drop: float | None = None,
) -> Audit:
    """Compare every score in scope with its parent and with the best before it.

    Args:
        store: only read.
        ref: `line@3`, `line@latest`, `line@alias`, a bare `line` (the same as its latest) or
            `base`. The scope is then the line's adapters up to that one, their parents and
            members, and the base. None: everything.
        task: only this task, all its revisions; no sequences are then reported.
        max_drop: in the score's own units. Gives a finding of kind "drop" for each task on
            which a judged adapter (`ref`, or each line's latest) is further than this below
            the best of its line's history: the base, the line's adapters up to it, and their
            parents and members. Significance is told, not required.

    A continued adapter is compared with its parent; one trained on the base with the base;
    a merge with the member that was trained on the task, or with the base where none was.
    Best is by value among the subjects before it in scope; one that was measured on only
    some of the rows counts only until a subject was measured on all. The best of many is
    partly the luckiest, so a change against it leans to the worse; p does not correct that.

    Raises:
        NotFound: no such line, adapter or task.
        InvalidInput: a `ref` that is none, or `max_drop` negative or not a number.
    """
    if max_drop is not None and not 0 <= max_drop < math.inf:
        raise InvalidInput(f"`max_drop` must be a number of at least 0, got {max_drop}")
    latest: dict[str, Task] = {}
    for one in [store.task(task)] if task is not None else store.tasks():
        if one.name not in latest or one.revision > latest[one.name].revision:
            latest[one.name] = one
    lineage = _Lineage(store.adapters())
    lines, judged = _judged(store, ref)
    groups = _groups(store.scores(task=task))

    scope = lineage.everything()
    if ref is not None:
        scope = lineage.history(judged[0]) if judged else frozenset({BASE})

    task_audits: list[TaskAudit] = []
    drops: list[Finding] = []
    notes: list[str] = []
    for current in latest.values():
        own = groups.get(current.name, [])
        pending = {a.ref: a for a in judged} if max_drop is not None else {}
        reported = []
        for group in own:
            revised = group.revision != current.revision
            frozen = store.task(current.name, group.revision) if revised else current
            comparer = _Comparer(store, group, frozen)
            if scope & group.scores.keys():
                reported.append(_task_audit(group, current, scope, lineage, comparer))
            for adapter in [a for a in pending.values() if group.score(a.ref) is not None]:
                del pending[adapter.ref]
                if revised:
                    notes.append(
                        f"{adapter.ref} is judged on {group.ref}, for want of a score "
                        f"on {current.ref}"
                    )
                drops += _drop(adapter, group, lineage, comparer, max_drop or 0.0)
        notes += [
            f"{a.ref} was never scored on {current.name}, so a drop there cannot be seen"
            for a in pending.values()
            if any(lineage.history(a) & group.scores.keys() for group in own)
        ]
        task_audits += reported or [_unscored(current)]

    sequences: list[SequenceAudit] = []
    if task is None:
        for line in lines:
            found = _sequence_audit(line, store, judged, lineage, groups)
            sequences += [found] if found else []
    return Audit(
        ref,
        tuple(a.ref for a in judged),
        tuple(task_audits),
        tuple(sequences),
        max_drop,
        tuple(drops),
        tuple(notes),
    )


def _judged(store: AuditStore, ref: str | None) -> tuple[list[Line], list[Adapter]]:
    """The lines in question, and the adapter of each that stands for it."""
    if ref is None:
        lines = list(store.lines())
        return lines, [line.latest for line in lines if line.latest is not None]
    parsed = parse_adapter_ref(ref)
    if parsed is None:
        return [], []
    adapter = store.adapter(parsed)
    return [store.line(adapter.line)], [adapter]


class _Lineage:
    """All adapters in order of creation, and who descends from whom."""

    def __init__(self, adapters: Iterable[Adapter]) -> None:
        self.adapters = {a.ref: a for a in adapters}
        self._order = {ref: i for i, ref in enumerate((BASE, *self.adapters))}
        self._lines: dict[str, list[Adapter]] = defaultdict(list)
        for a in self.adapters.values():
            self._lines[a.line].append(a)
        self._histories: dict[str, frozenset[str]] = {}

    def everything(self) -> frozenset[str]:
        """Every subject."""
        return frozenset(self._order)

    def in_time(self, subjects: Iterable[str]) -> list[str]:
        """The subjects by creation, the base first."""
        return sorted(subjects, key=self._order.__getitem__)

    def line(self, last: Adapter) -> list[Adapter]:
        """The adapters of `last`'s line up to it."""
        return [a for a in self._lines[last.line] if a.version <= last.version]

    def history(self, last: Adapter) -> frozenset[str]:
        """`last`'s line up to it, the parents and members of all these, and the base."""
        if last.ref not in self._histories:
            line = self.line(last)
            refs = {BASE, *(a.ref for a in line), *(p.ref for a in line for p in a.parents)}
            self._histories[last.ref] = frozenset(refs & self._order.keys())
        return self._histories[last.ref]

    def compared_with(self, subject: str, task: str) -> list[str]:
        """What `subject` is measured against on `task`: one ref, or several equal members."""
        if subject == BASE:
            return []
        adapter = self.adapters[subject]
        parents = [p.ref for p in adapter.parents]
        if adapter.origin != "merged":
            return parents[:1] or [BASE]
        members = [self.adapters[p] for p in parents if p in self.adapters]
        direct = [m for m in members if m.task == task]
        indirect = [m for m in members if any(a.task == task for a in self._ancestry(m))]
        return [m.ref for m in direct or indirect] or [BASE]

    def own(self, line: Line) -> Adapter | None:
        """What stands for a task's own line: its champion, else its latest that only ever
        trained on that task.
        """
        champion = line.aliases.get(CHAMPION)
        for a in reversed(self._lines[line.name]):
            if champion is not None:
                if a.version == champion:
                    return a
            elif all(x.task == line.task for x in self._ancestry(a)):
                return a
        return None

    def _ancestry(self, adapter: Adapter) -> Iterator[Adapter]:
        """The adapter and everything that it descends from, each once."""
        seen: set[str] = set()
        waiting = [adapter.ref]
        while waiting:
            ref = waiting.pop()
            if ref in self.adapters and ref not in seen:
                seen.add(ref)
                yield self.adapters[ref]
                waiting += [p.ref for p in self.adapters[ref].parents]


@dataclass
class _Group:
    """The scores that may be compared: one task revision, one scorer in one version."""

    task: str
    revision: int
    scorer: str
    scorer_version: str
    scores: dict[str, list[Score]] = field(default_factory=dict)  # by subject
    last: int = 0  # position of its newest score

    @property
    def ref(self) -> str:
        return f"{self.task}#{self.revision}"

    @property
    def higher_is_better(self) -> bool:
        return all(
            bool(s.facts.get("higher_is_better", True)) for own in self.scores.values() for s in own
        )

    def score(self, subject: str) -> Score | None:
        """The one that stands for a subject: its newest measured here, else its newest.

        One without any measured row is none.
        """
        own = [s for s in self.scores.get(subject, []) if not math.isnan(s.value)]
        measured = [s for s in own if s.origin == "measured"]
        return (measured or own)[-1] if own else None


def _groups(scores: Iterable[Score]) -> dict[str, list[_Group]]:
    """Task name -> its groups, the latest revision first and there the newest scores first."""
    found: dict[tuple[str, int, str, str], _Group] = {}
    for position, s in enumerate(scores):
        key = (s.task, s.task_revision, s.scorer, s.scorer_version)
        group = found.setdefault(key, _Group(*key))
        group.scores.setdefault(s.subject, []).append(s)
        group.last = position
    by_task: dict[str, list[_Group]] = defaultdict(list)
    for group in sorted(found.values(), key=lambda g: (g.revision, g.last), reverse=True):
        by_task[group.task].append(group)
    return by_task


class _Comparer:
    """Compares scores of one group, loading each one's outcomes at most once."""

    def __init__(self, store: AuditStore, group: _Group, task: Task) -> None:
        self.store = store
        self.higher_is_better = group.higher_is_better
        split = task.splits.get("eval")
        self.all_rows = split.rows if split is not None else 0
        self._outcomes: dict[int, tuple[NDArray[Any], NDArray[Any] | None]] = {}
        self._pairs: dict[tuple[str, int, int], Comparison] = {}

    def goodness(self, score: Score) -> float:
        """The value, turned so that more is better."""
        return score.value if self.higher_is_better else -score.value

    def complete(self, score: Score) -> bool:
        """Whether every row was measured."""
        return score.rows >= self.all_rows

    def better(self, a: Score, b: Score | None) -> bool:
        """Whether `a` takes the place of `b` as the best so far; the earlier one keeps a tie."""
        if math.isnan(a.value):
            return False
        if b is None or self.complete(a) != self.complete(b):
            return b is None or self.complete(a)
        return self.goodness(a) > self.goodness(b)

    def compare(self, before: Score, after: Score) -> Comparison:
        """The paired comparison of `after` against `before`."""
        # Adapters of equal weights share scores, so an id alone does not say whose it is.
        key = (before.subject, before.id, after.id)
        if key not in self._pairs:
            self._pairs[key] = self._compare(before, after)
        return self._pairs[key]

    def _compare(self, before: Score, after: Score) -> Comparison:
        a, weights_a = self._load(before)
        b, weights_b = self._load(after)
        notes = []
        if before.precision != after.precision and before.precision and after.precision:
            notes.append(f"in {after.precision}, {before.subject} in {before.precision}")
        if before.origin != after.origin:
            notes.append(f"{after.origin}, {before.subject} {before.origin}")
        weights = weights_a if weights_b is None else weights_b
        if weights_a is not None and weights_b is not None and a.shape == b.shape:
            common = ~(np.isnan(a) | np.isnan(b))
            if not np.array_equal(weights_a[common], weights_b[common]):
                notes.append("the rows are weighted differently, so nothing can be compared")
                return Comparison(before.subject, note="; ".join(notes))
        d = paired_difference(a, b, weights)
        if d.rows == 0:
            notes.append("no row was measured in both")
        return self._comparison(before.subject, d, "; ".join(notes))

    def _comparison(self, against: str, d: PairedDifference, note: str) -> Comparison:
        return Comparison(
            against,
            d.difference,
            d.error,
            d.p,
            d.test,
            d.rows,
            d.rows_only_a,
            d.rows_only_b,
            gained=d.only_b_right,
            lost=d.only_a_right,
            worse=d.difference < 0 if self.higher_is_better else d.difference > 0,
            real=d.p < SIGNIFICANCE,
            note=note,
        )

    def _load(self, score: Score) -> tuple[NDArray[Any], NDArray[Any] | None]:
        if score.id not in self._outcomes:
            self._outcomes[score.id] = self.store.outcomes(score)
        return self._outcomes[score.id]


def _task_audit(
    group: _Group, current: Task, scope: Set[str], lineage: _Lineage, comparer: _Comparer
) -> TaskAudit:
    entries: list[Entry] = []
    best: Score | None = None
    for subject in lineage.in_time(scope & group.scores.keys()):
        own = group.scores[subject]
        for score in own:
            entries.append(
                Entry(
                    subject,
                    lineage.adapters[subject].created_at if subject != BASE else None,
                    score.created_at,
                    score.value,
                    score.error,
                    score.rows,
                    score.origin,
                    score.origin != "measured",
                    score.precision,
                    _against_parent(score, group, lineage, comparer),
                    comparer.compare(best, score) if best is not None else None,
                )
            )
        # Only now, so that a subject scored twice is not compared with itself.
        for score in own:
            best = score if comparer.better(score, best) else best
    return TaskAudit(
        group.task,
        group.revision,
        group.revision == current.revision,
        group.scorer,
        group.scorer_version,
        comparer.higher_is_better,
        tuple(entries),
        best.subject if best is not None else None,
        _group_note(group, current),
    )


def _group_note(group: _Group, current: Task) -> str:
    if group.revision != current.revision:
        return f"{current.ref} is the latest revision; scores on the two are not compared"
    if (group.scorer, group.scorer_version) != (current.scorer, current.scorer_version):
        return (
            f"scored by {group.scorer} version {group.scorer_version}, now it is "
            f"{current.scorer} version {current.scorer_version}; scores of the two are not compared"
        )
    return ""


def _unscored(task: Task) -> TaskAudit:
    note = "nothing in scope was scored on it"
    return TaskAudit(
        task.name, task.revision, True, task.scorer, task.scorer_version, None, (), None, note
    )


def _against_parent(
    score: Score, group: _Group, lineage: _Lineage, comparer: _Comparer
) -> Comparison | None:
    candidates = lineage.compared_with(score.subject, group.task)
    if not candidates:
        return None
    chosen: Score | None = None
    for subject in candidates:
        own = group.scores.get(subject, [])
        # Like with like: another precision or origin only for want of the same.
        alike = [s for s in own if (s.precision, s.origin) == (score.precision, score.origin)]
        for s in (alike or own)[-1:]:
            chosen = s if comparer.better(s, chosen) else chosen or s
    if chosen is None:
        return Comparison(candidates[0], note=f"{candidates[0]} was not scored on {group.ref}")
    return comparer.compare(chosen, score)


def _drop(
    adapter: Adapter, group: _Group, lineage: _Lineage, comparer: _Comparer, max_drop: float
) -> list[Finding]:
    """At most one finding: the adapter's largest drop on this task within its line's history."""
    now = group.score(adapter.ref)
    if now is None:
        return []
    largest, best = 0.0, None
    before = (lineage.history(adapter) - {adapter.ref}) & group.scores.keys()
    for subject in lineage.in_time(before):
        for then in group.scores[subject]:
            drop = comparer.goodness(then) - comparer.goodness(now)
            if not (comparer.complete(then) and comparer.complete(now)):
                # On different rows the two values alone could show or hide a drop.
                change = comparer.compare(then, now).change
                if not math.isnan(change):
                    drop = -change if comparer.higher_is_better else change
            if drop > largest:
                largest, best = drop, then
    if best is None or largest <= max_drop + _ROUNDING:
        return []
    paired = comparer.compare(best, now)
    p = f"paired p = {paired.p:.2g} on {paired.rows} rows; " if paired.rows else ""
    note = f"{paired.note}; " if paired.note else ""
    message = (
        f"{group.ref}: {now.subject} is at {now.value:.4g}, {largest:.4g} worse than the best, "
        f"{best.subject} at {best.value:.4g} ({p}{note}allowed {max_drop:g})"
    )
    facts = {
        "line": adapter.line,
        "task": group.task,
        "revision": group.revision,
        "best": best.subject,
        "best_value": best.value,
        "now": now.subject,
        "now_value": now.value,
        "drop": largest,
        "error": paired.error,
        "p": paired.p,
        "rows": paired.rows,
        "real": paired.real,
        "max_drop": max_drop,
    }
    return [Finding("drop", now.subject, message, facts)]


def _sequence_audit(
    line: Line,
    store: AuditStore,
    judged: Sequence[Adapter],
    lineage: _Lineage,
    groups: Mapping[str, Sequence[_Group]],
) -> SequenceAudit | None:
    """R and the figures of a line that is a sequence, up to its judged adapter."""
    last = next((a for a in judged if a.line == line.name), None)
    if last is None or not line.sequence:
        return None
    stages = [a for a in lineage.line(last) if a.sequence and a.task is not None]
    if not stages:
        return None
    taught = [f"{a.task}#{a.task_revision}" for a in stages]
    coming = [t for t in line.sequence if t not in taught]
    names = {t.partition("#")[0] for t in (*taught, *coming)}
    newest = {group.ref: group for own in groups.values() for group in reversed(own)}
    outside = []
    for name, own in groups.items():
        scored = [group for group in own if any(a.ref in group.scores for a in stages)]
        if name not in names and scored:
            outside.append(scored[0].ref)
    columns = [*taught, *coming, *outside]

    def value(subject: str | None, task: str) -> float:
        group = newest.get(task)
        score = group.score(subject) if group is not None and subject is not None else None
        return math.nan if score is None else score.value

    R = np.array([[value(a.ref, t) for t in columns] for a in stages])
    base = np.array([value(BASE, t) for t in columns])
    own_lines = {x.task: x for x in store.lines() if x.task is not None and not x.sequence}
    own_adapters = [lineage.own(own_lines[a.task]) if a.task in own_lines else None for a in stages]
    references = [a.ref if a is not None else None for a in own_adapters]

    # A task still to be taught is no suite outside the sequence.
    counted = [i for i, t in enumerate(columns) if t not in coming]
    directions = {newest[columns[i]].higher_is_better for i in counted if columns[i] in newest}
    figures: tuple[Figure, ...] = ()
    note = "the tasks' scorers point in different ways, so no figure can average them"
    if len(directions) <= 1:
        note = ""
        figures = continual_figures(
            R[:, counted],
            base[counted],
            [value(r, t) for r, t in zip(references, taught, strict=True)],
            higher_is_better=directions != {False},
        )
    return SequenceAudit(
        line.name,
        tuple(a.ref for a in stages),
        tuple(columns),
        len(stages),
        tuple(tuple(float(x) for x in row) for row in R),
        tuple(float(x) for x in base),
        tuple(references),
        figures,
        note,
    )


def _plain(value: Any) -> Any:
    """`value` in JSON's own types; what JSON cannot say (NaN, infinities) becomes None."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(v) for v in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
