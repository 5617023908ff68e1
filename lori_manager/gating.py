"""The gate before an alias: may this version take the place of that one?"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lori_manager.config import Config, GateRule
from lori_manager.context import Context
from lori_manager.errors import BadData, Conflict, GateRefused, InvalidInput, NotFound
from lori_manager.evaluation import score_missing
from lori_manager.plain import plain
from lori_manager.records import Adapter, Alias, Score, Task
from lori_manager.refs import BASE, check_name

if TYPE_CHECKING:
    from lori_manager.metrics.verdict import Compared, Judged

VERSION = 1  # of the JSON document: lori_manager/schemas/gate.json, docs/json.md
PRODUCTION = "production"
PROMOTED = "promoted"
ROLLED_BACK = "rolled back"


@dataclass(frozen=True)
class MustStay:
    """One row that has to stay right, and its outcome under the candidate."""

    row: int  # of the task revision's eval rows
    key: str  # its hash, in hexadecimal
    prompt: str
    outcome: float  # NaN where not measured


@dataclass(frozen=True)
class TaskGate:
    """What the gate says of one task."""

    task: str
    revision: int
    scorer: str
    precision: str
    before: float  # the score of what is replaced; NaN where it was not scored alike
    after: float  # the candidate's; NaN where it was not scored
    minimum: float | None
    judged: Judged | None  # None where there is nothing to compare with
    must_stay: int  # rows that have to stay right
    broken: tuple[MustStay, ...]  # those of them that are not
    reuse: int  # how many different weights were ever scored on these rows
    refusals: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def ref(self) -> str:
        """`safety#2`."""
        return f"{self.task}#{self.revision}"


@dataclass(frozen=True)
class Gated:
    """The gate's word on a candidate."""

    candidate: str
    against: str | None  # what it would replace; None where the alias is new
    tasks: tuple[TaskGate, ...]
    refusals: tuple[str, ...]  # why not; empty lets it pass
    warnings: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.refusals

    def to_json(self) -> dict[str, Any]:
        """Dicts, lists, strings, numbers and null alone; NaN becomes null."""
        return {
            "format": "lori-gate", "version": VERSION, **plain(self), "passed": self.passed
        }  # fmt: skip


def gate(
    ws: Context,
    ref: str,
    against: str | None = None,
    *,
    measure: bool = False,
    config: Config | None = None,
) -> Gated:
    """Judge a version by the rules in `lori.toml`, against what it would replace.

    Judged are, at their latest revision, the tasks that went into either of the two, those
    that are only evaluated, and those that `[gate.tasks]` names.

    Args:
        ref: the candidate.
        against: an adapter or `base`; None: there is nothing to lose, so that only minimum
            scores and rows that must stay right count.
        measure: score what is missing first; otherwise a missing score refuses.
        config: settings for scoring.
    Raises:
        NotFound, InvalidInput; BadData: a file of rows that must stay right.
    """
    candidate = ws.adapter(ref)
    before = None if against is None else _subject(ws, against)
    tasks = _tasks(ws, candidate, before)
    measured = [_Measured.of(ws, task, candidate.ref, before) for task in tasks]
    lacking = [one.task for one in measured if one.lacks(before)]
    if measure and lacking:
        config = config or ws.settings.config
        for subject in filter(None, (candidate.ref, before)):
            score_missing(ws, subject, lacking, config)
        tasks = _tasks(ws, candidate, before)  # an edited scorer began a new revision
        measured = [_Measured.of(ws, task, candidate.ref, before) for task in tasks]
    verdicts = _verdicts(measured)
    pairs = zip(measured, verdicts, strict=True)
    found = tuple(_task_gate(ws, one, judged, before) for one, judged in pairs)
    refusals = tuple(f"{one.ref}: {why}" for one in found for why in one.refusals)
    warnings = tuple(f"{one.ref}: {why}" for one in found for why in one.warnings)
    if not found:
        refusals = (f"no task is there to judge {candidate.ref} by",)
    return Gated(candidate.ref, before, found, refusals, warnings)


def promote(
    ws: Context,
    ref: str,
    alias: str = PRODUCTION,
    *,
    force: bool = False,
    reason: str = "",
    config: Config | None = None,
) -> tuple[Alias, Gated]:
    """Let the alias mean that version if the gate lets it pass; what is missing is scored.

    The move, the gate's word and, where it is forced, the reason are put into the journal.

    Raises:
        GateRefused: with all reasons; the alias stays where it is.
        InvalidInput: forced without a reason. Conflict: the alias was moved meanwhile.
    """
    check_name(alias, "alias")
    if force and not reason.strip():
        raise InvalidInput("--force needs --reason TEXT: the journal keeps both")
    candidate = ws.adapter(ref)
    now = ws.store.line(candidate.line).aliases.get(alias)
    against = None if now is None else f"{candidate.line}@{now}"
    told = gate(ws, candidate.ref, against, measure=True, config=config)
    if not told.passed and not force:
        raise GateRefused(
            f"{candidate.ref} may not become {alias}: {'; '.join(told.refusals)}. "
            "Mend it, or give --force --reason TEXT",
            told,
        )
    moved = ws.store.set_alias(
        candidate.line,
        alias,
        candidate.version,
        action=PROMOTED,
        reason=reason,
        forced=force and not told.passed,
        verdict=told.to_json(),
        expected=now,
    )
    return moved, told


def rollback(ws: Context, alias: str, reason: str = "") -> Alias:
    """Let the alias mean again what it meant before; given again, it goes one further back.

    Args:
        alias: `production`, or `main@production` where several lines have it.
        reason: kept in the journal.
    Raises:
        NotFound: no such alias. InvalidInput: several. Conflict: it never meant another
            version, or was moved meanwhile.
    """
    line, _, name = alias.rpartition("@")
    found = [a for a in ws.store.aliases(line or None) if a.name == name]
    if not found:
        raise NotFound(f"there is no alias {alias!r}: `lori alias` lists them")
    if len(found) > 1:
        refs = ", ".join(a.ref for a in found)
        raise InvalidInput(f"{alias!r} may be {refs}: name the line, too")
    current = found[0]
    stack: list[int] = []
    for entry in ws.store.journal(current.line, name):
        if entry.to_version is None:
            stack.clear()
        elif entry.action == ROLLED_BACK and len(stack) > 1:
            stack.pop()
        else:
            stack.append(entry.to_version)
    if len(stack) < 2:
        raise Conflict(
            f"{current.ref} has meant {current.line}@{current.version} alone: there is nothing to "
            "roll back to"
        )
    return ws.store.set_alias(
        current.line, name, stack[-2], action=ROLLED_BACK, reason=reason, expected=current.version
    )


def _subject(ws: Context, ref: str) -> str:
    return BASE if ref == BASE else ws.adapter(ref).ref


def _tasks(ws: Context, candidate: Adapter, before: str | None) -> list[Task]:
    names = set(ws.settings.gate.tasks)
    for subject in (candidate.ref, before):
        if subject is not None and subject != BASE:
            names |= set(ws.tasks_of(ws.adapter(subject)))
    known = {task.name: task for task in ws.store.tasks()}
    for name in names:
        if name not in known:
            raise NotFound(f"[gate.tasks.{name}] in lori.toml: there is no such task")
    return [task for task in known.values() if task.name in names or not task.trainable]


@dataclass(frozen=True)
class _Measured:
    """One task's scores on both sides, measured alike, and its rule."""

    task: Task
    rule: GateRule
    before: Score | None
    after: Score | None
    compared: Compared | None
    outcomes: Any  # (rows,) of the candidate; None where not scored

    @classmethod
    def of(cls, ws: Context, task: Task, candidate: str, before: str | None) -> _Measured:
        from lori_manager.metrics.verdict import Compared

        rule = ws.settings.gate.rule(task.name)
        scorer = ws.scorer(task)
        now = {_alike(s): s for s in _scores(ws, candidate, task)}
        then = {} if before is None else {_alike(s): s for s in _scores(ws, before, task)}
        common = [key for key in now if key in then]
        key = common[-1] if common else (next(reversed(now)) if now else None)
        after = now[key] if key is not None else None
        earlier = then.get(key) if key is not None else None
        compared = None
        outcomes = None
        if after is not None:
            wanted = [after] if earlier is None else [after, earlier]
            (outcomes, weights), *rest = ws.store.outcomes_of(wanted)
            if rest:
                first = rest[0][0]
                compared = Compared(
                    first, outcomes, rule.margin, weights, scorer.higher_is_better, rule.confidence
                )
        return cls(task, rule, earlier, after, compared, outcomes)

    def lacks(self, before: str | None) -> bool:
        """Whether a score is missing, or none of both was measured like the other."""
        return self.after is None or (before is not None and self.before is None)


def _scores(ws: Context, subject: str, task: Task) -> list[Score]:
    """Oldest first, those by the task's present scorer."""
    found = ws.store.scores(subject=subject, task=task.name, revision=task.revision)
    return [s for s in found if (s.scorer, s.scorer_version) == (task.scorer, task.scorer_version)]


def _alike(score: Score) -> tuple[str, ...]:
    """What two scores must share to be compared."""
    return (score.precision, score.encoding, score.origin)


def _verdicts(measured: Sequence[_Measured]) -> list[Judged | None]:
    """Of all tasks together, so that many tasks do not refuse by chance."""
    from lori_manager.metrics.verdict import judge_family

    family = [one.compared for one in measured if one.compared is not None]
    judged = iter(judge_family(family))
    return [None if one.compared is None else next(judged) for one in measured]


def _task_gate(ws: Context, one: _Measured, judged: Judged | None, before: str | None) -> TaskGate:
    task, rule, after = one.task, one.rule, one.after
    higher = ws.scorer(task).higher_is_better
    value = math.nan if after is None else after.value
    refusals: list[str] = []
    warnings: list[str] = []
    if after is None:
        refusals.append("it was not scored: run `lori score`")
    elif one.lacks(before):
        refusals.append(f"{before} has no score to compare with, measured in the same way: run "
                        f"`lori score {before} {after.subject}`")  # fmt: skip
    if after is not None and rule.minimum is not None and not _reaches(value, rule.minimum, higher):
        word = "minimum" if higher else "maximum"
        refusals.append(f"its score {value:.4g} misses the {word} {rule.minimum:g}")
    if judged is not None and judged.verdict == "regressed":
        refusals.append(
            f"regressed by {-judged.difference:.4g} (at least {-judged.upper:.4g} at "
            f"{judged.confidence:.0%}, p = {judged.p_holm:.2g} over all tasks)"
        )
    elif judged is not None and judged.verdict == "undecided":
        said = (
            f"undecided: it may be worse by {max(-judged.lower, 0.0):.4g}, allowed is "
            f"{judged.margin:g}; {judged.note}"
        )
        (refusals if ws.settings.gate.undecided == "refuse" else warnings).append(said)
    held = _must_stay(ws, task, rule, one.outcomes)
    broken = tuple(row for row in held if row.outcome != 1)
    if broken:
        rows = ", ".join(str(row.row) for row in broken[:5]) + (", ..." if len(broken) > 5 else "")
        refusals.append(f"{len(broken)} of {len(held)} rows that must stay right are not: {rows}")
    return TaskGate(
        task.name,
        task.revision,
        task.scorer,
        "" if after is None else after.precision,
        math.nan if one.before is None else one.before.value,
        value,
        rule.minimum,
        judged,
        len(held),
        broken,
        ws.store.reuse(task.name, task.revision),
        tuple(refusals),
        tuple(warnings),
    )


def _reaches(value: float, minimum: float, higher_is_better: bool) -> bool:
    """NaN reaches nothing."""
    return value >= minimum if higher_is_better else value <= minimum


def _must_stay(ws: Context, task: Task, rule: GateRule, outcomes: Any) -> list[MustStay]:
    """The rows of the rule's file, which must be among the task's eval rows.

    Raises:
        BadData: by line, what is none. InvalidInput: outcomes are not right or wrong.
    """
    from lori_manager.tasks.rows import rows_from_jsonl

    if rule.must_stay is None:
        return []
    if not ws.scorer(task).binary:
        raise InvalidInput(
            f"[gate.tasks.{task.name}] must_stay: {task.scorer} has no right and wrong rows; leave "
            "it out"
        )
    file = ws.root / rule.must_stay
    rows = rows_from_jsonl(ws.store.objects.get(task.splits["eval"].digest))
    keys = {row.key.hex(): i for i, row in enumerate(rows)}
    texts = {(row.prompt, row.completion): i for i, row in enumerate(rows)}
    found = []
    for number, line in enumerate(_lines(file), 1):
        try:
            entry = json.loads(line)
            if "row" in entry:
                row = entry["row"]
                index = keys[row] if isinstance(row, str) else range(len(rows))[row]
            else:
                index = texts[entry["prompt"], entry["completion"]]
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as e:
            raise BadData(
                f'{file}, line {number}: expected {{"row": index or key}} or the prompt and '
                f"completion of one of {task.ref}'s {len(rows)} eval rows, got {line[:60]!r}; add "
                "the example to the task's eval rows"
            ) from e
        outcome = math.nan if outcomes is None else float(outcomes[index])
        found.append(MustStay(index, rows[index].key.hex(), rows[index].prompt, outcome))
    return found


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as e:
        raise NotFound(f"no file {file}, which lori.toml names as `must_stay`") from e
    except (OSError, UnicodeDecodeError) as e:
        raise BadData(f"cannot read {file}: {e}") from e
    return [line for line in text.split("\n") if line.strip()]
