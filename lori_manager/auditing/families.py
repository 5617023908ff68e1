"""Which comparisons are looked at together, and what that does to their p.

Whoever asks whether a version is worse anywhere looks at one p a task. For a judged
version they are corrected by Holm over all its comparisons of one kind that the audit
makes: with parents, with the version before it, with what stands under an alias. They are
read in bulk, apart from the tasks' own tables, so that the first table need not wait for
the last task. All other comparisons, those with the best and those of earlier versions,
are multiplied by the number of tasks (Bonferroni): stricter, and known without looking at
the other tasks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from lori_manager.auditing.comparing import Loaded, Pair, differences
from lori_manager.auditing.groups import Group, Ranking, groups
from lori_manager.auditing.lineage import Lineage
from lori_manager.auditing.pairing import Against, parent_of, told_once
from lori_manager.auditing.reading import AuditStore
from lori_manager.auditing.results import BONFERRONI, HOLM, SIGNIFICANCE, Comparison
from lori_manager.metrics.multiple import holm
from lori_manager.metrics.paired import PairedDifference
from lori_manager.records import Score, Task

PARENT, PREVIOUS, BEST, AGAINST = "parent", "previous", "best", "against"
_TOGETHER = (PARENT, PREVIOUS, AGAINST)  # kinds that are corrected by Holm
Family = dict[tuple[int, int], float]  # (before.id, after.id) -> corrected p


class Families:
    """Corrects comparisons for those that are looked at together with them."""

    def __init__(
        self,
        store: AuditStore,
        lineage: Lineage,
        against: Against,
        judged: frozenset[str],
        revision: Callable[[str, int], Task],
        tasks: frozenset[str],
    ) -> None:
        """
        Args:
            judged: the subjects whose comparisons are corrected by Holm.
            revision: name and revision -> the task.
            tasks: names of all that are audited.
        """
        self._store = store
        self._lineage = lineage
        self._against = against
        self._judged = judged
        self._revision = revision
        self.tasks = tasks

    def p(self, kind: str, before: Score, after: Score, p: float) -> tuple[float, str, int]:
        """Corrected p, by what, and for how many comparisons."""
        several = len(self.tasks)
        if several < 2:
            return p, "", 1
        if kind != BEST and after.subject in self._judged:
            family = self._families.get((after.subject, kind), {})
            found = family.get((before.id, after.id))
            if found is not None:
                return found, HOLM if len(family) > 1 else "", len(family)
        return min(1.0, p * several), BONFERRONI, several

    def correct(self, kind: str, before: Score, after: Score, c: Comparison) -> Comparison:
        """The comparison with its corrected p and whether it is real."""
        if math.isnan(c.p):
            return c
        p, correction, family = self.p(kind, before, after, c.p)
        return replace(
            c, real=p < SIGNIFICANCE, p_corrected=p, correction=correction, family=family
        )

    @cached_property
    def _families(self) -> dict[tuple[str, str], Family]:
        """By judged subject and kind: all of them in one reading."""
        candidates = {subject: self._candidates(subject) for subject in self._judged}
        wanted = self._judged.union(*(refs for of in candidates.values() for refs in of.values()))
        found = groups(s for s in self._store.scores_of(wanted) if s.task in self.tasks)
        pairs: dict[tuple[str, str], list[Pair]] = defaultdict(list)
        for group in [g for own in found.values() for g in own]:
            for subject in self._judged & group.scores.keys():
                for score in group.scores[subject]:
                    for kind, before in self._pairs(score, group, candidates[subject]):
                        pairs[subject, kind].append((before, score))
        every = [pair for own in pairs.values() for pair in own]
        told = iter(differences(Loaded(self._store), every))
        return {key: _corrected(own, [next(told) for _ in own]) for key, own in pairs.items()}

    def _candidates(self, subject: str) -> dict[tuple[str, str], list[str]]:
        """By kind and task, which is empty where all are the same, what it may be held against."""
        found: dict[tuple[str, str], list[str]] = {}
        if self._lineage.is_merge(subject):
            for task in self.tasks:
                found[PARENT, task] = self._lineage.compared_with(subject, task)
        else:
            found[PARENT, ""] = self._lineage.compared_with(subject, "")
        for kind, other in (
            (PREVIOUS, self._lineage.previous(subject)),
            (AGAINST, self._against.target(subject)),
        ):
            found[kind, ""] = [other] if other is not None else []
        return found

    def _pairs(
        self, score: Score, group: Group, candidates: Mapping[tuple[str, str], list[str]]
    ) -> Iterator[tuple[str, Score]]:
        ranking = Ranking(group, self._revision(group.task, group.revision))
        parent: Score | None = None
        for kind in _TOGETHER:
            refs = candidates.get((kind, group.task)) or candidates.get((kind, ""), [])
            before = parent_of(score, group, refs, ranking)
            if kind == PARENT:
                parent = before
            if before is not None and not (kind == PREVIOUS and told_once(parent, before)):
                yield kind, before


def _corrected(pairs: Sequence[Pair], told: Sequence[PairedDifference | str]) -> Family:
    ps = {
        (before.id, after.id): d.p
        for (before, after), d in zip(pairs, told, strict=True)
        if isinstance(d, PairedDifference) and not math.isnan(d.p)
    }
    return dict(zip(ps, holm(list(ps.values())).tolist(), strict=True))
