"""What a loss is owed to: a member of a merge, or a stage of what was continued.

Of a merge, one member at a time is left out (or given half its weight) and the rest merged
anew in memory, by the method, options and rows of the merge; outcomes are kept, the adapters
are not. Of a continued adapter the stored scores of its stages are enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from lori_manager.comparing import Difference, difference_of
from lori_manager.config import Config
from lori_manager.context import Context
from lori_manager.errors import InvalidInput, NotFound
from lori_manager.evaluation import score_missing
from lori_manager.metrics.multiple import holm
from lori_manager.metrics.summary import summarize
from lori_manager.plain import plain
from lori_manager.records import Adapter, Score, Task
from lori_manager.refs import BASE
from lori_manager.remerging import DROPPED, HALVED, Outcomes, Remade, Tried

SIGNIFICANCE = 0.05  # of a cause, after Holm's correction over all that are suspected
MEASURED = "measured"
VERSION = 1  # of the JSON document: lori_manager/schemas/blame.json, docs/json.md
STAGE = "stage"


@dataclass(frozen=True)
class Suspect:
    """One member or stage, and what the task is like without it, or from it on.

    Attributes:
        ref: the member or stage.
        how: "dropped", "halved" (a member at half its weight) or "stage".
        task: what it was trained on last; None where that is not one task.
        weight: of the member in the merge; None of a stage.
        value, error: the task's score without it; of a stage, with it.
        change: against the merge as it is; of a stage, against the stage before.
        left: against the task's own adapter; of a stage, against the one that taught the task.
        p: of `change`, after Holm's correction over all suspects of the same kind.
        verdict: "cause" where the task is better without the member, or worse from the stage
            on, beyond noise; "helps" where it is the other way round; else empty.
    """

    ref: str
    how: str
    task: str | None
    weight: float | None
    value: float
    error: float
    change: Difference
    left: Difference
    p: float
    verdict: str


@dataclass(frozen=True)
class Blame:
    """What `blame` found; `to_json` turns all of it into plain JSON.

    Attributes:
        ref: the adapter that was asked about. task: the task, as `nlu#2`.
        kind: "merge", "stages" or "routed".
        score: of the adapter. own: of what it is measured against: the task's own adapter, the
            stage that taught it, or what everything began from.
        loss: score against own; `loss.worse` where there is one.
        suspects: of a merge the most guilty first; of stages in time.
        cause: the worst suspect that is one beyond noise; None where there is none.
        routed: of a routed merge, how many held-out probe prompts of the task went to each
            member when it was made.
        notes: what limits all this.
    """

    ref: str
    task: str
    kind: str
    higher_is_better: bool
    score: Score
    own: Score
    loss: Difference
    suspects: tuple[Suspect, ...] = ()
    cause: str | None = None
    routed: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Dicts, lists, strings, numbers and null alone; NaN becomes null, times ISO 8601."""
        return {"format": "lori-blame", "version": VERSION, **plain(self)}


def blame(
    ws: Context,
    ref: str,
    task: str,
    *,
    halve: bool = False,
    general: str | Path | None = None,
    config: Config | None = None,
) -> Blame:
    """Find what a task's loss in a merge, or in a continued adapter, is owed to.

    The member that alone knows the task stays in: without it the task is lost whatever the
    others do. Members' weights are as `merge_again` has them, 1/T of those left where all were
    equal. The same again loads no model.

    Args:
        ref: a merge, or an adapter that was continued from another.
        task: which task's loss.
        halve: try each member of a merge at half its weight, too.
        general: the general text, where the merge had one that was not the usual.
        config: settings for scoring; the workspace's own where None.
    Raises:
        NotFound: no such adapter or task, or a stage's scores that are not there.
        InvalidInput: an adapter that is neither merged nor continued.
    """
    adapter, about = ws.adapter(ref), ws.store.task(task)
    if adapter.origin == "merged":
        return _of_merge(ws, adapter, about, halve, general, config or ws.settings.config)
    if halve or general is not None:
        raise InvalidInput(f"{adapter.ref} is no merge: `halve` and `general` go with merges")
    if not adapter.parents:
        raise InvalidInput(
            f"{adapter.ref} was made in one step from the base: blame finds the member of a merge "
            "or the stage of a continued adapter that a task was lost by"
        )
    return _of_stages(ws, adapter, about)


# Stages


def _of_stages(ws: Context, adapter: Adapter, task: Task) -> Blame:
    chain = _chain(ws, adapter)
    stages: list[tuple[str, Adapter | None]] = [(a.ref, a) for a in chain]
    if not chain[0].parents:
        stages.insert(0, (BASE, None))
    taught = [n for n, (_, a) in enumerate(stages) if a is not None and a.task == task.name]
    stages = stages[taught[-1] if taught else 0 :]
    scores = {ref: ws.store.scores(subject=ref, task=task.name) for ref, _ in stages}
    chosen = _alike(scores)
    missing = [ref for ref, _ in stages if ref not in chosen]
    for ref in (stages[0][0], adapter.ref):
        if ref in missing:
            raise NotFound(
                f"{ref} was not scored on {task.name}, at least not as the others were: run "
                f"`lori score {' '.join(missing)} --tasks {task.name}`"
            )
    notes = []
    if missing:
        notes.append(
            f"not scored on {task.name}: {', '.join(missing)}; what they did is told of the next: "
            f"run `lori score {' '.join(missing)} --tasks {task.name}`"
        )
    if len(stages) == 1:
        notes.append(f"{adapter.ref} taught {task.name} itself, so nothing came after")
    elif not taught:
        notes.append(f"none of the stages was taught {task.name}: measured against {stages[0][0]}")
    outcomes = {ref: ws.store.outcomes(score) for ref, score in chosen.items()}
    there = [(ref, a) for ref, a in stages if ref in chosen]
    own, upward = chosen[there[0][0]], _upward(chosen[adapter.ref])
    suspects = []
    for (before, _), (ref, stage) in pairwise(there):
        score = chosen[ref]
        suspects.append(
            Suspect(
                ref,
                STAGE,
                stage.task if stage is not None else None,
                None,
                score.value,
                score.error,
                _difference(outcomes[before], outcomes[ref], upward),
                _difference(outcomes[own.subject], outcomes[ref], upward),
                math.nan,
                "",
            )
        )
    judged = _judged(suspects, cause_is_worse=True)
    return Blame(
        adapter.ref,
        f"{task.name}#{own.task_revision}",
        "stages",
        upward,
        chosen[adapter.ref],
        own,
        _difference(outcomes[own.subject], outcomes[adapter.ref], upward),
        tuple(judged),
        _worst(judged),
        notes=tuple(notes),
    )


def _chain(ws: Context, adapter: Adapter) -> list[Adapter]:
    """What it was continued from, the first of all first: one from the base, or a merge."""
    chain = [adapter]
    while chain[0].parents and chain[0].origin != "merged":
        chain.insert(0, ws.adapter(chain[0].parents[0].ref))
    return chain


def _alike(scores: Mapping[str, Sequence[Score]]) -> dict[str, Score]:
    """One score a subject, all of one revision, scorer, precision and origin: of the newest such
    kind that the most subjects have.
    """
    kinds: dict[tuple[Any, ...], dict[str, Score]] = {}
    for ref, own in scores.items():
        for s in own:
            kind = (s.task_revision, s.scorer, s.scorer_version, s.precision, s.origin)
            if not math.isnan(s.value):
                kinds.setdefault(kind, {})[ref] = s
    ends = (next(iter(scores)), list(scores)[-1])

    def rank(found: dict[str, Score]) -> tuple[Any, ...]:
        newest = max(found.values(), key=lambda s: s.id)
        whole = all(ref in found for ref in ends)
        return whole, newest.task_revision, newest.origin == MEASURED, len(found), newest.id

    return max(kinds.values(), key=rank, default={})


# Members


def _of_merge(
    ws: Context,
    adapter: Adapter,
    task: Task,
    halve: bool,
    general: str | Path | None,
    config: Config,
) -> Blame:
    members = [ws.adapter(parent.ref) for parent in adapter.parents]
    if len(members) < 2:
        raise InvalidInput(f"{adapter.ref} was made of one member, so there is no other to blame")
    knowing = _knowing(ws, members, task)
    refs = [members[n].ref for n in knowing] or [BASE]
    notes = [] if knowing else [f"no member was trained on {task.name}: measured against {BASE}"]
    if "routing" in adapter.facts:
        return _of_routed(ws, adapter, members, knowing, task, config, notes)
    remade = Remade(ws, adapter, members, task, config, general)
    suspected = [n for n in range(len(members)) if knowing != [n]]
    trials = [(n, remade.without(n)) for n in suspected]
    if halve:
        trials += [(n, remade.halved(n)) for n in suspected]
    again = [remade.again()] if remade.stale else []
    scores, found = remade.outcomes([adapter.ref, *refs], [*again, *(t for _, t in trials)])
    score, upward = scores[adapter.ref], _upward(scores[adapter.ref])
    own = _best([scores[ref] for ref in refs])
    merge, alone = ws.store.outcomes(score), ws.store.outcomes(own)
    loss = _difference(alone, merge, upward)
    for trial in again:
        if found[trial].digest == adapter.digest:
            continue
        notes.append(
            f"{remade.stale} since {adapter.ref} was merged, and the same merge now has other "
            "weights: what members do is measured against that one"
        )
        merge = found[trial].outcomes
    judged: list[Suspect] = []
    for how in (DROPPED, HALVED):
        same = [
            _suspect(members[n], how, remade.weights[n], found[trial], merge, alone, upward)
            for n, trial in trials
            if trial.how == how
        ]
        same = _judged(same, cause_is_worse=False)
        judged += sorted(same, key=lambda s: s.change.change, reverse=upward)
    return Blame(
        adapter.ref,
        task.ref,
        "merge",
        upward,
        score,
        own,
        loss,
        tuple(judged),
        _worst([s for s in judged if s.how == DROPPED]),
        notes=tuple(notes),
    )


def _suspect(
    member: Adapter,
    how: str,
    weight: float,
    tried: Tried,
    merge: Outcomes,
    alone: Outcomes,
    upward: bool,
) -> Suspect:
    summary = summarize(*tried.outcomes)
    return Suspect(
        member.ref,
        how,
        member.task,
        weight,
        summary.value,
        summary.error,
        _difference(merge, tried.outcomes, upward),
        _difference(alone, tried.outcomes, upward),
        math.nan,
        "",
    )


def _of_routed(
    ws: Context,
    adapter: Adapter,
    members: Sequence[Adapter],
    knowing: Sequence[int],
    task: Task,
    config: Config,
    notes: Sequence[str],
) -> Blame:
    """No member acts on another's prompts, so all that can be lost is prompts that go astray."""
    (score,) = score_missing(ws, adapter.ref, [task], config)
    refs = [members[n].ref for n in knowing] or [BASE]
    own = _best([score_missing(ws, ref, [task], config)[0] for ref in refs])
    held_out = adapter.facts["routing"].get("held_out", [])
    counts = {
        member.ref: sum(int(held_out[row][column]) for row in knowing)
        for column, member in enumerate(members)
        if held_out
    }
    told = f"{adapter.ref} is routed: one member acts on each prompt and none changes another"
    upward = _upward(score)
    return Blame(
        adapter.ref,
        task.ref,
        "routed",
        upward,
        score,
        own,
        _difference(ws.store.outcomes(own), ws.store.outcomes(score), upward),
        routed=counts,
        notes=(told, *notes),
    )


def _knowing(ws: Context, members: Sequence[Adapter], task: Task) -> list[int]:
    """The members that were trained on the task themselves, else those that descend from one."""
    direct = [n for n, member in enumerate(members) if member.task == task.name]
    return direct or [n for n, member in enumerate(members) if task.name in ws.tasks_of(member)]


# Both


def _upward(score: Score) -> bool:
    return bool(score.facts.get("higher_is_better", True))


def _best(scores: Sequence[Score]) -> Score:
    return max(scores, key=lambda s: s.value if _upward(s) else -s.value)


def _difference(before: Outcomes, after: Outcomes, upward: bool) -> Difference:
    (x, wx), (y, wy) = before, after
    found = difference_of(x, y, wx, wy, higher_is_better=upward)
    if found is None:
        raise InvalidInput("the rows are weighted differently in two scores: score them again")
    return found


def _judged(suspects: Sequence[Suspect], *, cause_is_worse: bool) -> list[Suspect]:
    """With p corrected for how many they are, and what that makes of each."""
    out = []
    for suspect, p in zip(suspects, holm([s.change.p for s in suspects]), strict=True):
        verdict = ""
        if p < SIGNIFICANCE:
            verdict = "cause" if suspect.change.worse == cause_is_worse else "helps"
        out.append(replace(suspect, p=float(p), verdict=verdict))
    return out


def _worst(suspects: Sequence[Suspect]) -> str | None:
    causes = [s for s in suspects if s.verdict == "cause"]
    return max(causes, key=lambda s: abs(s.change.change)).ref if causes else None
