"""The scores that may be compared with one another."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lori_manager.records import Score, Task


@dataclass
class Group:
    """The scores on one task revision by one scorer in one version."""

    task: str
    revision: int
    scorer: str
    scorer_version: str
    scores: dict[str, list[Score]] = field(default_factory=dict)  # by subject
    last: int = 0  # position of its newest score

    @property
    def ref(self) -> str:
        """`safety#2`."""
        return f"{self.task}#{self.revision}"

    @property
    def higher_is_better(self) -> bool:
        """Which way the scorer points."""
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

    def note(self, current: Task) -> str:
        """Why it stands apart from the task as it is now; empty where it does not."""
        if self.revision != current.revision:
            return f"{current.ref} is the latest revision; scores on the two are not compared"
        if (self.scorer, self.scorer_version) != (current.scorer, current.scorer_version):
            return (
                f"scored by {self.scorer} version {self.scorer_version}, now it is "
                f"{current.scorer} version {current.scorer_version}; scores of the two are "
                "not compared"
            )
        return ""


class Ranking:
    """Which of a group's scores is the better one."""

    def __init__(self, group: Group, task: Task) -> None:
        """`task` is the revision that the group is on."""
        self.higher_is_better = group.higher_is_better
        split = task.splits.get("eval")
        self.all_rows = split.rows if split is not None else 0

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


def groups(scores: Iterable[Score]) -> dict[str, list[Group]]:
    """Task name -> its groups, the latest revision first and there the newest scores first."""
    found: dict[tuple[str, int, str, str], Group] = {}
    for position, s in enumerate(scores):
        key = (s.task, s.task_revision, s.scorer, s.scorer_version)
        group = found.get(key)
        if group is None:
            group = found[key] = Group(*key)
        group.scores.setdefault(s.subject, []).append(s)
        group.last = position
    by_task: dict[str, list[Group]] = defaultdict(list)
    for group in sorted(found.values(), key=lambda g: (g.revision, g.last), reverse=True):
        by_task[group.task].append(group)
    return by_task


def alike(score: Score, own: Sequence[Score]) -> Sequence[Score]:
    """Those of a subject's scores that `score` may be compared with.

    Like with like: another precision, origin or tokens only for want of the same.
    """
    same = [s for s in own if (s.precision, s.origin) == (score.precision, score.origin)] or own
    return [s for s in same if s.encoding == score.encoding] or same
