"""Two versions side by side: what they are made of, how they score, and which rows flipped.

What they are made of is `changes`. Scores and flipped rows come from stored outcomes; a model
is loaded only to hear what is answered to flipped rows, and each answer is kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lori_manager.answering import (
    RIGHT_IS_THE_COMPLETION,
    in_words,
    known_answers,
    run_answers,
)
from lori_manager.changes import Change, changes_between, relation
from lori_manager.comparing import Difference, difference_of
from lori_manager.config import Config
from lori_manager.context import Context
from lori_manager.errors import InvalidInput, LoriError
from lori_manager.plain import counted, plain
from lori_manager.records import Adapter, Score, Task
from lori_manager.refs import BASE, parse_adapter_ref

if TYPE_CHECKING:
    from lori_manager.tasks.rows import Row

MEASURED = "measured"
VERSION = 1  # of the JSON document: lori_manager/schemas/diff.json, docs/json.md


@dataclass(frozen=True)
class Flip:
    """One row on which two versions differ.

    Attributes:
        row: its place among the eval rows of the later revision, from 0.
        key: the row's hash, in hex.
        before, after: the two outcomes.
        better: whether it is better after.
        answer_before, answer_after: what each side answered; None where that is not known, or
            where the scorer reads no answer.
    """

    row: int
    key: str
    prompt: str
    expected: str
    before: float
    after: float
    better: bool
    answer_before: str | None = None
    answer_after: str | None = None


@dataclass(frozen=True)
class TaskDiff:
    """One task's scores on both sides.

    Attributes:
        task: `nlu#2`, the revision that both were scored on; of two revisions the later.
        before, after: the scores that are compared; None where that side has none.
        difference: after - before on the rows measured in both; None without two scores.
        gained, lost: how many rows are better, or worse, after.
        flips: those of them that were asked for: rows of right and wrong in order, the lost
            ones first; else those that changed most.
        notes: what limits the comparison.
    """

    task: str
    scorer: str
    higher_is_better: bool
    before: Score | None
    after: Score | None
    difference: Difference | None = None
    gained: int = 0
    lost: int = 0
    flips: tuple[Flip, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diff:
    """What `diff` found; `to_json` turns all of it into plain JSON."""

    before: str
    after: str
    relation: str  # such as "nlu@1 is a member of main@4"; empty where there is none
    changes: tuple[Change, ...]
    tasks: tuple[TaskDiff, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Dicts, lists, strings, numbers and null alone; NaN becomes null, times ISO 8601."""
        return {"format": "lori-diff", "version": VERSION, **plain(self)}


def diff(
    ws: Context,
    before: str,
    after: str,
    task: str | None = None,
    *,
    rows: int = 20,
    answers: bool | None = None,
    config: Config | None = None,
) -> Diff:
    """Compare two versions.

    Scores are of the newest revision of each task that both sides were scored on with the same
    scorer, preferably in one precision. Where they share no revision, the rows that two
    revisions have in common are compared.

    Args:
        before, after: adapters or `base`.
        task: only this one; all where None.
        rows: how many flipped rows of each task to give.
        answers: True runs the model for answers that are not known yet; None does so where the
            base is at hand; False gives those alone that are known.
        config: settings of the model; the workspace's own where None.
    Raises:
        NotFound, InvalidInput.
    """
    if rows < 0:
        raise InvalidInput(f"`rows` must be at least 0, got {rows}")
    a, b = _adapter(ws, before), _adapter(ws, after)
    refs = _ref(a), _ref(b)
    tasks = [ws.store.task(task)] if task is not None else ws.store.tasks()
    compared = [_compared(ws, (a, b), one, rows) for one in tasks]
    if task is None:  # one that neither was scored on says nothing unless it was asked for
        compared = [one for one in compared if one.found.before or one.found.after]
    notes = []
    if (a and a.digest) == (b and b.digest):
        notes.append(f"{refs[0]} and {refs[1]} have the same weights")
    try:
        for side in (side for one in compared for side in one.sides):
            side.hear(ws, config or ws.settings.config, run=answers is not False)
    except LoriError as e:
        if answers:
            raise
        notes.append(f"answers that were not known are left out: {e}")
    return Diff(
        refs[0],
        refs[1],
        relation(ws, a, b),
        tuple(changes_between(ws, a, b)),
        tuple(one.answered() for one in compared),
        tuple(notes),
    )


class Asked(Protocol):
    """Which row's answers are wanted, of which two versions."""

    @property
    def task(self) -> str:
        """`nlu#2`."""

    @property
    def index(self) -> int:
        """Among its eval rows, from 0."""

    @property
    def before(self) -> str:
        """The first version's reference."""

    @property
    def after(self) -> str:
        """The second's."""


def stored_answers(ws: Context) -> Callable[[Asked], tuple[str, str] | None]:
    """What tells both versions' answers to a row that flipped, where both are known already."""
    answered = {f"{name}#{revision}" for name, revision in ws.store.answered()}
    found: dict[tuple[str, str, str], dict[int, tuple[str | None, str | None]]] = {}

    def told(asked: Asked) -> tuple[str, str] | None:
        if asked.task not in answered:
            return None
        key = asked.before, asked.after, asked.task
        if key not in found:
            name = asked.task.partition("#")[0]
            both = diff(ws, asked.before, asked.after, name, rows=10**9, answers=False)
            found[key] = {
                flip.row: (flip.answer_before, flip.answer_after)
                for task in both.tasks
                if task.task == asked.task
                for flip in task.flips
            }
        before, after = found[key].get(asked.index, (None, None))
        return None if before is None or after is None else (before, after)

    return told


def _adapter(ws: Context, ref: str) -> Adapter | None:
    parsed = parse_adapter_ref(ref)
    return None if parsed is None else ws.store.adapter(parsed)


def _ref(adapter: Adapter | None) -> str:
    return BASE if adapter is None else adapter.ref


@dataclass
class _Side:
    """One version on one task: the rows whose answers are wanted, and those that are known."""

    adapter: Adapter | None
    task: Task
    score: Score
    rows: list[int]
    answers: dict[int, str] = field(default_factory=dict)

    def hear(self, ws: Context, config: Config, *, run: bool) -> None:
        """Find the answers: those that go with the score, then those of today's settings, and
        what is not known yet by the model.
        """
        if not in_words(ws, self.task):
            return
        self._know(ws, self.score.precision, self.score.encoding)
        if self._missing():
            with nullcontext() if run else suppress(LoriError):  # where the base is gone
                self._know(ws, ws.score_precision(config), ws.encoding)
        missing = self._missing()
        if missing and run:
            told = f"{counted(len(missing), 'row')} of {self.task.ref}, to be kept"
            ws.on_message(f"{self.score.subject} answers {told}")
            self.answers |= run_answers(ws, self.adapter, self.task, missing, config)

    def _missing(self) -> list[int]:
        return [row for row in self.rows if row not in self.answers]

    def _know(self, ws: Context, precision: str, encoding: str) -> None:
        rows = self._missing()
        self.answers |= known_answers(ws, self.adapter, self.task, rows, precision, encoding)


@dataclass
class _Compared:
    """A comparison whose flips have no answers yet."""

    found: TaskDiff
    sides: tuple[_Side, ...] = ()
    places: list[tuple[int, int]] = field(default_factory=list)  # each flip's row on both sides

    def answered(self) -> TaskDiff:
        """With the answers that are known."""
        flips = []
        for flip, (before, after) in zip(self.found.flips, self.places, strict=True):
            told = (self._answer(0, before, flip), self._answer(1, after, flip))
            flips.append(replace(flip, answer_before=told[0], answer_after=told[1]))
        return replace(self.found, flips=tuple(flips))

    def _answer(self, number: int, row: int, flip: Flip) -> str | None:
        side = self.sides[number]
        if _is_right(side.score, flip.after if number else flip.before):
            return flip.expected
        return side.answers.get(row)


def _is_right(score: Score, outcome: float) -> bool:
    """Whether that outcome, as measured, says that the answer is the completion."""
    return outcome == 1 and score.scorer in RIGHT_IS_THE_COMPLETION and score.origin == MEASURED


def _compared(
    ws: Context, adapters: tuple[Adapter | None, Adapter | None], task: Task, limit: int
) -> _Compared:
    """One task on both sides, from what is stored."""
    refs = [_ref(adapter) for adapter in adapters]
    scores = [
        [s for s in ws.store.scores(subject=ref, task=task.name) if not math.isnan(s.value)]
        for ref in refs
    ]
    pair = _pair(*scores)
    if pair is None:
        return _Compared(_unpaired(task, refs, scores))
    old, new = (ws.store.task(task.name, score.task_revision) for score in pair)
    found = TaskDiff(
        new.ref, new.scorer, _upward(pair[1]), *pair, notes=tuple(_limits(task, *pair))
    )
    places = _places(ws, old, new)
    (x, wx), (y, wy) = (ws.store.outcomes(score) for score in pair)
    x, y = _spread(x, [i for i, _ in places]), _spread(y, [j for _, j in places])
    wx = None if wx is None else _spread(wx, [i for i, _ in places])
    wy = None if wy is None else _spread(wy, [j for _, j in places])
    difference = difference_of(x, y, wx, wy, higher_is_better=found.higher_is_better)
    if difference is None:
        note = "the rows are weighted differently, so nothing is compared"
        return _Compared(replace(found, notes=(*found.notes, note)))
    gain = y - x if found.higher_is_better else x - y
    notes = [*found.notes, *_alone(refs, difference)]
    found = replace(
        found,
        difference=difference,
        gained=int((gain > 0).sum()),
        lost=int((gain < 0).sum()),
        notes=tuple(notes),
    )
    shown = _shown(gain, difference.gained is not None, limit)
    rows = [places[n] for n in shown]
    texts, keys = _rows_of(ws, new), ws.store.eval_keys(new)
    flips = [
        Flip(
            j,
            keys[j].hex(),
            texts[j].prompt,
            texts[j].completion,
            float(x[n]),
            float(y[n]),
            bool(gain[n] > 0),
        )
        for n, (_, j) in zip(shown, rows, strict=True)
    ]
    sides = []
    for number, (adapter, one, score) in enumerate(zip(adapters, (old, new), pair, strict=True)):
        wanted = [
            place[number]
            for place, flip in zip(rows, flips, strict=True)
            if not _is_right(score, flip.after if number else flip.before)
        ]
        sides.append(_Side(adapter, one, score, wanted))
    return _Compared(replace(found, flips=tuple(flips)), tuple(sides), rows)


def _pair(before: Sequence[Score], after: Sequence[Score]) -> tuple[Score, Score] | None:
    """The two scores to compare: of one scorer, on the newest revision that both have, measured
    here and in one precision where there are such, else the newest.
    """
    pairs = [
        (a, b)
        for a in before
        for b in after
        if (a.scorer, a.scorer_version) == (b.scorer, b.scorer_version)
    ]
    if not pairs:
        return None

    def rank(pair: tuple[Score, Score]) -> tuple[Any, ...]:
        a, b = pair
        return (
            a.task_revision == b.task_revision,
            min(a.task_revision, b.task_revision),
            max(a.task_revision, b.task_revision),
            (a.precision, a.origin) == (b.precision, b.origin),
            (a.origin == MEASURED) + (b.origin == MEASURED),
            min(a.id, b.id),
            max(a.id, b.id),
        )

    return max(pairs, key=rank)


def _unpaired(task: Task, refs: Sequence[str], scores: Sequence[Sequence[Score]]) -> TaskDiff:
    """What is said where there is nothing to compare."""
    newest = [own[-1] if own else None for own in scores]
    missing = [ref for ref, own in zip(refs, scores, strict=True) if not own]
    if missing:
        note = f"run `lori score {' '.join(missing)} --tasks {task.name}`: not scored yet"
    else:
        note = "the two were scored by different scorers: score them again"
    upward = next((_upward(score) for score in newest if score is not None), True)
    return TaskDiff(task.ref, task.scorer, upward, newest[0], newest[1], notes=(note,))


def _limits(task: Task, before: Score, after: Score) -> list[str]:
    """What must be known of a comparison."""
    notes = []
    for what in ("precision", "origin"):
        told = [getattr(score, what) or "unknown" for score in (before, after)]
        if told[0] != told[1]:
            notes.append(f"{what}: {before.subject} {told[0]}, {after.subject} {told[1]}")
    revisions = (before.task_revision, after.task_revision)
    if revisions[0] != revisions[1]:
        notes.append(
            f"{before.subject} was scored on {task.name}#{revisions[0]}, {after.subject} on "
            f"{task.name}#{revisions[1]}: the rows of both are compared"
        )
    elif revisions[1] != task.revision:
        notes.append(f"not both were scored on {task.ref}, the latest revision")
    return notes


def _alone(refs: Sequence[str], difference: Difference) -> list[str]:
    """Rows that only one of them was scored on."""
    counts = (difference.rows_only_before, difference.rows_only_after)
    return [
        f"{counted(count, 'row')} {'was' if count == 1 else 'were'} scored for {ref} alone and "
        "not compared"
        for ref, count in zip(refs, counts, strict=True)
        if count
    ]


def _upward(score: Score) -> bool:
    return bool(score.facts.get("higher_is_better", True))


def _places(ws: Context, old: Task, new: Task) -> list[tuple[int, int]]:
    """For every row of either revision its place in both, -1 where it is not there."""
    if old.revision == new.revision:
        return [(i, i) for i in range(new.splits["eval"].rows)]
    a, b = (_numbered(ws.store.eval_keys(task)) for task in (old, new))
    return [
        *((a.get(key, -1), place) for key, place in b.items()),
        *((place, -1) for key, place in a.items() if key not in b),
    ]


def _numbered(keys: Sequence[bytes]) -> dict[tuple[bytes, int], int]:
    """(key, how often it came before) -> place: a row may be there twice."""
    seen: Counter[bytes] = Counter()
    found = {}
    for place, key in enumerate(keys):
        found[key, seen[key]] = place
        seen[key] += 1
    return found


def _spread(values: NDArray[Any], places: Sequence[int]) -> NDArray[Any]:
    """The values at those places, NaN at -1."""
    out: NDArray[Any] = np.append(values.astype(np.float64), np.nan)[np.array(places, int)]
    return out


def _shown(gain: NDArray[Any], binary: bool, limit: int) -> list[int]:
    """Which rows to show: of right and wrong the lost, then the gained, in order; else those
    that changed most, the lost first among equals.
    """
    if not binary:
        order = np.lexsort((gain, -np.abs(gain)))
        return [int(i) for i in order if abs(gain[i]) > 0][:limit]
    lost, gained = (np.flatnonzero(sign * gain > 0).tolist() for sign in (-1, 1))
    first = min(len(lost), max(limit - len(gained), (limit + 1) // 2))
    return [*lost[:first], *gained[: limit - first]]


def _rows_of(ws: Context, task: Task) -> list[Row]:
    from lori_manager.tasks.rows import rows_from_jsonl

    return rows_from_jsonl(ws.store.objects.get(task.splits["eval"].digest))
