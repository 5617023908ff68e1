"""Which merge to make, found out on probe rows: the common weight, and the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lori_manager.errors import InvalidInput
from lori_manager.evaluation import counted_progress
from lori_manager.merge_inputs import MergeInputs
from lori_manager.metrics.paired import mcnemar_exact
from lori_manager.models import BaseModel

if TYPE_CHECKING:
    import numpy as np

    from lori_manager.engine.weights import AdapterWeights
    from lori_manager.merging.methods import MergeOptions
    from lori_manager.registry import Entry

WEIGHTS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
CONFIDENCE = 0.05


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
    return min(found, key=found.__getitem__), found


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
        kept: mean over tasks of its score over the own adapter's, at most 1 each.
        losses: task -> p of the difference to its own adapter, where it is worse.
    """

    name: str
    options: Mapping[str, Any]
    weight: float
    rank: int
    scores: Mapping[str, float]
    kept: float
    losses: Mapping[str, float]


def measured(
    inputs: MergeInputs,
    candidates: Sequence[tuple[Entry[Any], Mapping[str, Any]]],
    options: MergeOptions,
) -> tuple[int, list[Trial]]:
    """Merge by each candidate on one half of the probe rows and score it on the other.

    The best is the one that keeps most; of those before it in the list, which are simpler, the
    first that is not worse by a paired exact test over all rows (`CONFIDENCE`) is taken.
    Returns:
        The number of the candidate to take, and all trials.
    Raises:
        InvalidInput: too few probe rows.
    """
    from dataclasses import replace

    half = inputs.probe_rows // 2
    if half < 8:
        raise InvalidInput(
            f"`probe_rows` must be at least 16 for `--method auto`, got {inputs.probe_rows}: one "
            "half fits the candidates, the other judges them"
        )
    fitting = MergeInputs(inputs.ws, inputs.members, inputs.config, half, inputs.general)
    own = _own_outcomes(inputs, half)
    trials, outcomes = [], []
    for entry, changes in candidates:
        told = replace(options, **changes)
        weight = 1 / len(inputs.members)
        if entry.facts.get("needs") is None:
            weight, _ = searched_weight(fitting, entry, told)
        merged = fitting.merged(entry, [weight] * len(inputs.members), told)
        found = _outcomes(inputs, merged, half, entry.name)
        scores = {task: float(hits.mean()) for task, hits in found.items()}
        kept = [min(1.0, scores[t] / max(float(own[t].mean()), 1e-9)) for t in scores]
        losses = {
            t: p
            for t in scores
            if scores[t] < float(own[t].mean()) and (p := _p(own[t], found[t])) < CONFIDENCE
        }
        trials.append(
            Trial(entry.name, changes, weight, merged.rank, scores, sum(kept) / len(kept), losses)
        )
        outcomes.append(found)
        inputs.ws.on_message(
            f"{entry.name}: keeps {trials[-1].kept:.3f} on "
            f"{sum(map(len, found.values()))} probe rows that it was not fitted to"
        )
    best = max(range(len(trials)), key=lambda i: (trials[i].kept, -i))
    for number in range(best):
        both = [(outcomes[number][t], outcomes[best][t]) for t in own]
        a = sum(int(((x > 0.5) & (y <= 0.5)).sum()) for x, y in both)
        b = sum(int(((x <= 0.5) & (y > 0.5)).sum()) for x, y in both)
        if b <= a or mcnemar_exact(a, b) >= CONFIDENCE:
            return number, trials
    return best, trials


def _p(own: np.ndarray, merged: np.ndarray) -> float:
    right, now = own > 0.5, merged > 0.5
    return mcnemar_exact(int((right & ~now).sum()), int((~right & now).sum()))


def _own_outcomes(inputs: MergeInputs, half: int) -> dict[str, np.ndarray]:
    own: dict[str, np.ndarray] = {}
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
) -> dict[str, np.ndarray]:
    """Task -> outcomes on the judging half of its probe rows."""
    from lori_manager.engine.layers import attached, low_rank_layers
    from lori_manager.scoring import score_rows
    from lori_manager.tasks.scorers import scorers

    ws, base = inputs.ws, inputs.base
    if names is None:
        names = list(dict.fromkeys(n for m in inputs.members for n in ws.tasks_of(m)))
    out = {}
    with attached(base.model, low_rank_layers(base.model, weights.updates())):
        for name in names:
            task = ws.store.task(name)
            rows, encoded = ws.rows(task, "probe")
            judged = slice(half, inputs.probe_rows)
            out[name], _ = score_rows(
                base,
                rows[judged],
                encoded[judged],
                scorers.get(task.scorer),
                inputs.config.score_batch,
                counted_progress(ws, f"judging {label} on {name}"),
                inputs.config.packing,
            )
    return out
