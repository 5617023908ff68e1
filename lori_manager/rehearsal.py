"""A merge tried on probe prompts: how often it says what the members say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lori_manager.evaluation import counted_progress
from lori_manager.merge_inputs import MergeInputs
from lori_manager.records import Adapter, Expected, Task

if TYPE_CHECKING:
    from lori_manager.merging.methods import MergeOptions
    from lori_manager.registry import Entry

JUDGED = 32  # prompts of each task, at most
LEAST = 8  # to fit to, and to judge by


def rehearsed(
    inputs: MergeInputs, entry: Entry[Any], shares: Sequence[float], options: MergeOptions
) -> list[Expected]:
    """Merge in memory and compare with each task's own adapter on prompts not fitted to.

    The merge is fitted to as many prompts of each task as it will be, where there are more to
    judge by, else to half of them.
    Returns:
        One a task; none where a task has too few probe rows, which is said.
    """
    from lori_manager.consolidation import answered
    from lori_manager.engine.layers import attached, low_rank_layers
    from lori_manager.scoring import score_rows
    from lori_manager.tasks.scorers import scorers

    ws, base, config = inputs.ws, inputs.base, inputs.config
    teachers = _teachers(inputs)
    counts = [task.splits["probe"].rows if "probe" in task.splits else 0 for _, task in teachers]
    rows = min(counts, default=0)
    fitted = inputs.probe_rows
    if rows < fitted + LEAST:
        fitted = min(rows, fitted) // 2
    if fitted < LEAST:
        ws.on_message(
            f"no rehearsal: it needs {2 * LEAST} probe rows of every task and --probe-rows of as "
            f"many, there are {min(rows, inputs.probe_rows)}"
        )
        return []
    judged = slice(fitted, min(rows, fitted + JUDGED))
    # What was answered for the interference is what the merge is fitted to, if it is as many.
    fitting = inputs
    if fitted != inputs.probe_rows:
        fitting = replace(inputs, probe_rows=fitted, _answered={})
    merged = low_rank_layers(base.model, fitting.merged(entry, shares, options).updates())
    exact = scorers.get("exact_match")
    found = []
    for number, task in teachers:
        member = inputs.members[number]
        given, encoded = ws.rows(task, "probe")
        progress = counted_progress(ws, f"{member.ref} answers")
        updates = inputs.weights[number].updates()
        said = answered(base, updates, encoded[judged], config.score_batch, progress)
        told = counted_progress(ws, f"rehearsing {task.name}")
        with attached(base.model, low_rank_layers(base.model, updates)):
            ended, _ = score_rows(
                base, given[judged], said, exact, config.score_batch, told, config.packing
            )
        # An answer that was cut at the longest length has an end that the member never said.
        said = [
            row if own else replace(row, ids=row.ids[:-1])
            for row, own in zip(said, ended, strict=True)
        ]
        with attached(base.model, merged):
            agreed, _ = score_rows(
                base, given[judged], said, exact, config.score_batch, told, config.packing
            )
        found.append(_expected(inputs, member, task, float(agreed.mean()), len(agreed)))
    return found


def _teachers(inputs: MergeInputs) -> list[tuple[int, Task]]:
    """Every task with the number of the member that stands for it: trained on it last, if any."""
    found: dict[str, int] = {}
    for number, member in enumerate(inputs.members):
        for name in inputs.ws.tasks_of(member):
            if name not in found or member.task == name:
                found[name] = number
    return [(number, inputs.ws.store.task(name)) for name, number in found.items()]


def _expected(
    inputs: MergeInputs, member: Adapter, task: Task, agrees: float, rows: int
) -> Expected:
    """With the member's own score, where it is known and counts right answers."""
    scorer = inputs.ws.scorer(task)
    own = inputs.ws.store.find_score(
        digest=member.digest,
        task=task,
        scorer=task.scorer,
        scorer_version=str(scorer.version),
        precision=inputs.ws.score_precision(inputs.config),
        encoding=inputs.ws.encoding,
    )
    score = own.value if own is not None and scorer.binary else math.nan
    # Agresti and Coull's shrunken share, so that 32 of 32 is not held for certain.
    shrunk = (agrees * rows + 2) / (rows + 4)
    error = score * math.sqrt(shrunk * (1 - shrunk) / (rows + 4))
    return Expected(
        member.ref, task.name, task.revision, task.scorer, str(scorer.version), agrees, rows, score,
        score * agrees, error,
    )  # fmt: skip
