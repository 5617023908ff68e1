"""Which merge to make, found out on probe rows: the common weight, and the method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from lori_manager.errors import BadData, InvalidInput
from lori_manager.evaluation import counted_progress
from lori_manager.merge_inputs import MergeInputs
from lori_manager.metrics.paired import sign_flip
from lori_manager.metrics.summary import summarize
from lori_manager.models import BaseModel

if TYPE_CHECKING:
    from lori_manager.engine.weights import AdapterWeights
    from lori_manager.merging.methods import MergeOptions
    from lori_manager.registry import Entry

WEIGHTS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
CONFIDENCE = 0.05
TOLERATED = 0.02  # of its members' scores, that a simpler merge may keep less than the best
LEAST = 8  # probe rows of each task to fit to, and to judge by


def searched_weight(
    inputs: MergeInputs, entry: Entry[Any], options: MergeOptions
) -> tuple[float, dict[float, float]]:
    """The common weight of the members with which a merge speaks most as they do.

    Measured on their probe rows, without labels: the mean over tasks of the cross-entropy
    per token against what each member itself says after its own words.
    Returns:
        The weight, and for each of `WEIGHTS` the cross-entropy in nats.
    """
    from lori_manager.distillation import taught_rows, teacher_words

    base, batch = inputs.base, inputs.config.score_batch
    tables = [
        taught_rows(
            [teacher_words(base, inputs.weights[i].updates(), inputs.answered(i), batch)],
            base.device,
        )
        for i in range(len(inputs.members))
    ]
    told = counted_progress(inputs.ws, f"weights for {entry.name}")
    found = {}
    for number, weight in enumerate(WEIGHTS):
        merged = inputs.merged(entry, [weight] * len(inputs.members), options)
        losses = [_loss(base, merged, rows, table, batch) for rows, table in tables]
        found[weight] = sum(losses) / len(losses)
        told(number + 1, len(WEIGHTS))
    if not any(math.isfinite(loss) for loss in found.values()):
        raise InvalidInput(f"no weight gives finite losses by {entry.name}: check the members")
    return min(found, key=lambda w: found[w] if math.isfinite(found[w]) else math.inf), found


def _loss(base: BaseModel, weights: AdapterWeights, rows: Any, table: Any, batch: int) -> float:
    import torch

    from lori_manager.engine.layers import attached, low_rank_layers
    from lori_manager.forward import Forward, place
    from lori_manager.tasks.batches import length_batches

    forward = Forward(base, soft=table)
    total, count = 0.0, 0
    layers = low_rank_layers(base.model, weights.updates())
    with attached(base.model, layers), torch.no_grad(), forward.ready():
        for numbers in length_batches([len(r.ids) for r in rows], batch):
            given = forward.batch([rows[i] for i in numbers])
            total += float(forward.loss(place(given, base.device)))
            count += int(given.counts.sum())
    return total / count


@dataclass(frozen=True)
class Trial:
    """One candidate as it did on rows that it was not fitted to.

    Attributes:
        scores: task -> mean outcome.
        kept: mean over tasks of the share that is left of the own adapter's score, at most 1
            each; of scores that are better when lower, the own one over the merge's.
        losses: task -> p of the difference to its own adapter, where it is worse.
    """

    name: str
    options: Mapping[str, Any]
    weight: float
    rank: int
    scores: Mapping[str, float]
    kept: float
    losses: Mapping[str, float]


@dataclass(frozen=True)
class _Judged:
    """Outcomes (rows,) of one task, and what to make of them."""

    outcomes: np.ndarray
    weights: np.ndarray | None
    higher_is_better: bool

    @property
    def value(self) -> float:
        return summarize(self.outcomes, self.weights).value

    def gain_over(self, other: _Judged) -> np.ndarray:
        """(rows,) by how much each row is better here; weighted where rows are."""
        gain: np.ndarray = self.outcomes.astype(np.float64) - other.outcomes
        if self.weights is not None:
            gain = gain * (self.weights / self.weights.mean())
        return gain if self.higher_is_better else -gain

    def kept_of(self, own: _Judged) -> float:
        """The share of the own adapter's score that is left, at most 1."""
        now, then = self.value, own.value
        part, whole = (now, then) if self.higher_is_better else (then, now)
        return min(1.0, part / whole) if whole > 0 else 1.0


def measured(
    inputs: MergeInputs,
    candidates: Sequence[tuple[Entry[Any], Mapping[str, Any]]],
    options: MergeOptions,
) -> tuple[int, list[Trial]]:
    """Merge by each candidate on one half of the probe rows and score it on the other.

    The best is the one that keeps most; of those before it in the list, which are simpler, the
    first is taken that is shown to keep at most `TOLERATED` less: the upper bound of the paired
    difference over all rows, one-sided at `CONFIDENCE`, in which a row of each task counts in
    shares of its own adapter's score.
    Returns:
        The number of the candidate to take, and all trials.
    Raises:
        InvalidInput: too few probe rows, or members without a task.
    """
    half = _half(inputs)
    fitting = MergeInputs(inputs.ws, inputs.members, inputs.config, half, inputs.general)
    own = _own_outcomes(inputs, half)
    trials: list[Trial] = []
    outcomes: list[dict[str, _Judged]] = []
    for entry, changes in candidates:
        told = replace(options, **changes)
        weight = 1 / len(inputs.members)
        if entry.facts.get("needs") is None:
            weight, _ = searched_weight(fitting, entry, told)
        merged = fitting.merged(entry, [weight] * len(inputs.members), told)
        found = _outcomes(inputs, merged, half, entry.name)
        kept = [found[task].kept_of(own[task]) for task in own]
        losses = {
            task: p
            for task in own
            if (worse := own[task].gain_over(found[task])).sum() > 0
            and (p := sign_flip(worse)) < CONFIDENCE
        }
        scores = {task: judged.value for task, judged in found.items()}
        trials.append(
            Trial(entry.name, changes, weight, merged.rank, scores, sum(kept) / len(kept), losses)
        )
        outcomes.append(found)
        inputs.ws.on_message(
            f"{entry.name}: keeps {trials[-1].kept:.3f} on "
            f"{sum(len(one.outcomes) for one in found.values())} probe rows that it was not "
            "fitted to"
        )
    best = max(range(len(trials)), key=lambda i: (trials[i].kept, -i))
    for number in range(best):
        gains = [
            outcomes[best][task].gain_over(outcomes[number][task]) / (abs(own[task].value) or 1.0)
            for task in own
        ]
        gain = np.concatenate(gains)
        bound = gain.mean() + NormalDist().inv_cdf(1 - CONFIDENCE) * gain.std() / len(gain) ** 0.5
        if bound <= TOLERATED:
            return number, trials
    return best, trials


def _half(inputs: MergeInputs) -> int:
    """How many probe rows of each task the candidates are fitted to; the others judge them."""
    rows = {}
    for number, member in enumerate(inputs.members):
        inputs.labelled(number)  # refuses a member without a task, and a task without rows
        for name in inputs.ws.tasks_of(member):
            rows[name] = inputs.ws.store.task(name).splits["probe"].rows
    fewest = min(rows, key=rows.__getitem__)
    if inputs.probe_rows < 2 * LEAST:
        raise InvalidInput(
            f"`probe_rows` must be at least {2 * LEAST} for `--method auto`, got "
            f"{inputs.probe_rows}: one half fits the candidates, the other judges them"
        )
    if rows[fewest] < 2 * LEAST:
        raise InvalidInput(
            f"task {fewest!r} has {rows[fewest]} probe rows, and `--method auto` needs "
            f"{2 * LEAST} of each task, one half to fit and one to judge: add it again with "
            "--probe, or name a method"
        )
    return min(inputs.probe_rows, rows[fewest]) // 2


def _own_outcomes(inputs: MergeInputs, half: int) -> dict[str, _Judged]:
    own: dict[str, _Judged] = {}
    for i, member in enumerate(inputs.members):
        for name in inputs.ws.tasks_of(member):
            if name not in own:
                own |= _outcomes(inputs, inputs.weights[i], half, member.ref, [name])
    return own


def _outcomes(
    inputs: MergeInputs,
    weights: AdapterWeights,
    half: int,
    label: str,
    names: Sequence[str] | None = None,
) -> dict[str, _Judged]:
    """Task -> outcomes on the judging half of its probe rows."""
    from lori_manager.engine.layers import attached, low_rank_layers
    from lori_manager.scoring import score_rows

    ws, base = inputs.ws, inputs.base
    if names is None:
        names = list(dict.fromkeys(n for m in inputs.members for n in ws.tasks_of(m)))
    out = {}
    with attached(base.model, low_rank_layers(base.model, weights.updates())):
        for name in names:
            task = ws.store.task(name)
            scorer = ws.scorer(task)
            rows, encoded = ws.rows(task, "probe")
            judged = slice(half, inputs.probe_rows)
            try:
                found, counts = score_rows(
                    base,
                    rows[judged],
                    encoded[judged],
                    scorer,
                    inputs.config.score_batch,
                    counted_progress(ws, f"judging {label} on {name}"),
                    inputs.config.packing,
                )
            except BadData as e:
                raise InvalidInput(
                    f"probe rows of task {name!r} cannot be scored by {task.scorer}, so nothing "
                    f"can be tried on them: name a method ({e})"
                ) from e
            out[name] = _Judged(found, counts, scorer.higher_is_better)
    return out
