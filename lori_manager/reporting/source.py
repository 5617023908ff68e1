"""What a report reads: the one place that knows the audit and the store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lori_manager.auditing import Audit, Comparison, TaskAudit, audit
from lori_manager.auditing.choosing import experiments
from lori_manager.comparing import Difference, difference_of
from lori_manager.records import Adapter, Mask, Score
from lori_manager.reporting.kind_comparisons import KindsCompared, kinds_compared
from lori_manager.tasks.rows import Row, rows_from_jsonl

if TYPE_CHECKING:
    import numpy as np

    from lori_manager.store.store import Store

__all__ = ["Audit", "Comparison", "Pair", "Source", "TaskAudit"]


@dataclass(frozen=True)
class Pair:
    """Two versions' outcomes on one task, row by row."""

    before: np.ndarray  # (eval rows,), NaN where not measured
    after: np.ndarray
    difference: Difference


class Source:
    """A store, read for a report."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._scores: dict[str, dict[tuple[str, int, str, str], list[Score]]] = {}
        self._rows: tuple[str, list[Row]] = ("", [])

    def audit(self, ref: str | None, task: str | None) -> Audit:
        """What every step did to every task."""
        return audit(self.store, ref, task)

    @cached_property
    def adapters(self) -> Mapping[str, Adapter]:
        """All adapters by ref, in order of creation."""
        return {a.ref: a for a in self.store.adapters()}

    @cached_property
    def experiments(self) -> frozenset[str]:
        """The adapters that comparisons of kinds alone have to do with."""
        return experiments(self.adapters.values(), self.store.lines())

    def comparisons(self, tasks: Sequence[str]) -> list[KindsCompared]:
        """The comparisons of kinds on these tasks, or on all where none is named."""
        found = [c for c in self.store.kind_comparisons() if not tasks or c.task in tasks]
        told = [kinds_compared(self.store, comparison) for comparison in found]
        return [one for one in told if one.kinds]

    def eval_rows(self, task: TaskAudit) -> int:
        """How many rows the revision is scored on."""
        return self.store.task(task.task, task.revision).splits["eval"].rows

    def rows(self, task: TaskAudit) -> Sequence[Row]:
        """The revision's eval rows; those of the last task asked for are kept."""
        if self._rows[0] != task.ref:
            split = self.store.task(task.task, task.revision).splits["eval"]
            self._rows = task.ref, rows_from_jsonl(self.store.objects.get(split.digest))
        return self._rows[1]

    def pair(self, task: TaskAudit, before: str, after: str) -> Pair | None:
        """The outcomes of both on that task, of one precision and origin where both have
        such; None unless both were scored, and weigh their rows alike.
        """
        now, then = self._of(after, task), self._of(before, task)
        if not now or not then:
            return None
        score = ([s for s in now if s.origin == "measured"] or now)[-1]
        key = score.precision, score.origin
        other = ([s for s in then if (s.precision, s.origin) == key] or then)[-1]
        (b, weights), (a, weights_before) = self.store.outcomes_of([score, other])
        found = difference_of(
            a, b, weights_before, weights, higher_is_better=task.higher_is_better is not False
        )
        return None if found is None else Pair(a, b, found)

    def newest_masks(self) -> list[Mask]:
        """The newest mask of each task that has one, the newest task first."""
        own = {a.mask for a in self.adapters.values() if a.ref not in self.experiments}
        apart = {self.adapters[ref].mask for ref in self.experiments} - own
        found = [
            [mask for mask in self.store.masks(task.name) if mask.ref not in apart]
            for task in self.store.tasks()
        ]
        return [masks[-1] for masks in reversed(found) if masks]

    def _of(self, subject: str, task: TaskAudit) -> list[Score]:
        if subject not in self._scores:
            known: dict[tuple[str, int, str, str], list[Score]] = defaultdict(list)
            for s in self.store.scores(subject=subject):
                known[s.task, s.task_revision, s.scorer, s.scorer_version].append(s)
            self._scores[subject] = known
        key = task.task, task.revision, task.scorer, task.scorer_version
        return self._scores[subject].get(key, [])
