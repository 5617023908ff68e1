"""One task's history: every score in scope, and what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from lori_manager.auditing.choosing import RECENT, Filters, what_matters
from lori_manager.auditing.comparing import Comparer
from lori_manager.auditing.families import AGAINST, BEST, PARENT, PREVIOUS, Families
from lori_manager.auditing.groups import Group
from lori_manager.auditing.lineage import Lineage
from lori_manager.auditing.pairing import Against, parent_of, told_once
from lori_manager.auditing.regressions import regressions
from lori_manager.auditing.results import (
    SIGNIFICANCE,
    Comparison,
    Entry,
    TaskAudit,
)
from lori_manager.auditing.sensitivity import sensitivity
from lori_manager.metrics.paired import PairedDifference
from lori_manager.records import Finding, Score, Task
from lori_manager.refs import BASE

_Key = tuple[str, int]


@dataclass(frozen=True)
class View:
    """What all tasks of one audit are looked at with."""

    lineage: Lineage
    against: Against
    families: Families
    scope: Set[str]
    judged: Set[str]
    filters: Filters
    most: int | None  # entries a task; None: all


@dataclass(frozen=True)
class _Scored:
    """A score in scope, with those that it is held against; None where there is none."""

    score: Score
    candidates: list[str]  # the subjects that may be its parent here
    parent: Score | None
    previous: Score | None  # where the version before it is not its parent
    best: Score | None
    against: Score | None

    @property
    def step(self) -> tuple[str, Score | None]:
        """What it came after: the version before it on its line, else its parent."""
        return (PREVIOUS, self.previous) if self.previous is not None else (PARENT, self.parent)

    @property
    def key(self) -> _Key:
        """Adapters of equal weights share scores, so an id alone does not say whose it is."""
        return self.score.subject, self.score.id


@dataclass(frozen=True)
class Told:
    """One revision's history, and the real regressions of judged adapters in it."""

    audit: TaskAudit
    regressions: tuple[Finding, ...]


def audit_group(group: Group, current: Task, view: View, comparer: Comparer) -> Told:
    """The history on one revision of a task.

    Args:
        group: its scores.
        current: the task's latest revision.
    """
    scored, best = _scored(group, view, comparer)
    within = [s for s in scored if view.filters.keep(s.score.subject, view.lineage)]
    own = view.lineage.own(group.task)
    steps = _steps(within, comparer)
    dropped = {
        s.key: abs(d.difference)
        for s in within
        if (d := steps.get(s.key)) is not None and _really_worse(s, d, view, comparer)
    }
    shown = within
    if view.most is not None and len(within) > view.most:
        always = [BASE, own.ref if own else None, best.subject if best else None]
        always += view.against.refs
        always += view.judged if len(view.judged) <= RECENT else []
        subjects = list(dict.fromkeys(s.score.subject for s in within))
        sizes = {subject: size for (subject, _), size in dropped.items()}
        kept = what_matters(subjects, always, sizes, view.lineage)
        shown = [s for s in within if s.score.subject in kept]
    keys = {s.key for s in shown}
    looked_at = [s for s in within if s.key in keys or s.score.subject in view.judged]
    entries = _entries(looked_at, group, view, comparer)
    told = [e for s, e in zip(looked_at, entries, strict=True) if s.key in keys]
    found = TaskAudit(
        group.task,
        group.revision,
        group.revision == current.revision,
        group.scorer,
        group.scorer_version,
        comparer.higher_is_better,
        tuple(told),
        best.subject if best is not None else None,
        group.note(current),
        rows=comparer.all_rows,
        own=own.ref if own is not None else None,
        precisions=tuple(sorted({s.score.precision for s in scored})),
        omitted=len(within) - len(shown),
        regressions_omitted=len(dropped.keys() - keys),
        sensitivity=sensitivity(
            _typical(steps, group.task, view.lineage), comparer.all_rows, len(view.families.tasks)
        ),
    )
    of_judged = [e for e in entries if e.subject in view.judged]
    return Told(found, tuple(regressions(of_judged, group)))


def unscored(task: Task) -> TaskAudit:
    """A task that nothing in scope was scored on."""
    split = task.splits.get("eval")
    return TaskAudit(
        task.name,
        task.revision,
        True,
        task.scorer,
        task.scorer_version,
        None,
        (),
        None,
        "nothing in scope was scored on it",
        rows=split.rows if split is not None else 0,
    )


def _scored(group: Group, view: View, comparer: Comparer) -> tuple[list[_Scored], Score | None]:
    """All scores in scope in time order, and the best of them."""
    found: list[_Scored] = []
    best: Score | None = None
    best_of: dict[str, Score] = {}  # by precision
    for subject in view.lineage.in_time(view.scope & group.scores.keys()):
        candidates = view.lineage.compared_with(subject, group.task)
        own = group.scores[subject]
        for score in own:
            parent = parent_of(score, group, candidates, comparer)
            previous, against = (
                parent_of(score, group, [other] if other is not None else [], comparer)
                for other in (view.lineage.previous(subject), view.against.target(subject))
            )
            if told_once(parent, previous):
                previous = None
            before = best_of.get(score.precision, best)
            found.append(_Scored(score, candidates, parent, previous, before, against))
        # Only now, so that a subject scored twice is not compared with itself.
        for score in own:
            best = score if comparer.better(score, best) else best
            if comparer.better(score, best_of.get(score.precision)):
                best_of[score.precision] = score
    return found, best


def _steps(scored: list[_Scored], comparer: Comparer) -> dict[_Key, PairedDifference]:
    """How far each is from what it came after, where that can be said."""
    of = [(s.key, (before, s.score)) for s in scored if (before := s.step[1]) is not None]
    found = comparer.differences([pair for _, pair in of])
    return {
        key: d for (key, _), d in zip(of, found, strict=True) if isinstance(d, PairedDifference)
    }


def _typical(
    steps: Mapping[_Key, PairedDifference], task: str, lineage: Lineage
) -> list[PairedDifference]:
    """The steps of versions that were not trained on the task itself; all where there is none.

    What learning a task changes says nothing of what teaching another one does to it.
    """
    others = [d for (ref, _), d in steps.items() if lineage.adapters[ref].task != task]
    return others or list(steps.values())


def _really_worse(s: _Scored, d: PairedDifference, view: View, comparer: Comparer) -> bool:
    kind, before = s.step
    if before is None or not d.p < SIGNIFICANCE or not comparer.worse(d):
        return False
    return view.families.p(kind, before, s.score, d.p)[0] < SIGNIFICANCE


def _entries(shown: list[_Scored], group: Group, view: View, comparer: Comparer) -> list[Entry]:
    pairs = [
        (kind, before, s)
        for s in shown
        for kind, before in (
            (PARENT, s.parent),
            (PREVIOUS, s.previous),
            (BEST, s.best),
            (AGAINST, s.against),
        )
        if before is not None
    ]
    compared = comparer.compare([(before, s.score) for _, before, s in pairs])
    made = {
        (kind, *s.key): view.families.correct(kind, before, s.score, comparison)
        for (kind, before, s), comparison in zip(pairs, compared, strict=True)
    }
    return [_entry(s, group, view, made) for s in shown]


def _entry(
    s: _Scored, group: Group, view: View, made: Mapping[tuple[str, str, int], Comparison]
) -> Entry:
    def held(kind: str, subject: str | None) -> Comparison | None:
        if subject is None:
            return None
        missing = Comparison(subject, note=f"{subject} was not scored on {group.ref}")
        return made.get((kind, *s.key), missing)

    score = s.score
    first = s.candidates[0] if s.candidates else None
    return Entry(
        score.subject,
        None if score.subject == BASE else view.lineage.adapters[score.subject].created_at,
        score.created_at,
        score.value,
        score.error,
        score.rows,
        score.origin,
        score.origin != "measured",
        score.precision,
        held(PARENT, first),
        made.get((BEST, *s.key)),
        made.get((PREVIOUS, *s.key)),
        held(AGAINST, view.against.target(score.subject)),
        view.lineage.aliases(score.subject),
    )
