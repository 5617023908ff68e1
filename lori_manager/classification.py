"""Encoders at work on rows with labels: how they train on them, and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from lori_manager.adapters.heads import head_attached
from lori_manager.adapters.kind import Training
from lori_manager.config import Config
from lori_manager.engine.weights import Head
from lori_manager.gradients import Gradients, checkpointed
from lori_manager.labelling import Labelling
from lori_manager.models import BaseModel
from lori_manager.tasks.batches import length_batches
from lori_manager.tasks.labelled import Labelled
from lori_manager.tasks.scorers import LabelScorer
from lori_manager.training import Steps, StepsOf


def label_steps(base: BaseModel, config: Config) -> StepsOf:
    """Steps of `training.fit` on rows with labels: the mean cross-entropy over rows."""

    @contextmanager
    def steps(
        training: Training, batches: Sequence[Sequence[list[Labelled]]], first: int
    ) -> Iterator[Steps]:
        trained = list(training.parameters.values())
        with checkpointed(base.model, config.checkpointing == "on"):
            yield Gradients(Labelling(base), trained, batches, "off", training.penalty)

    return steps


def label_logits(
    base: BaseModel,
    head: Head,
    rows: Sequence[Labelled],
    batch: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """(rows, labels of the head) float32, in the order of the rows.

    Args:
        base: the model as it now is, adapter layers included.
        head: put behind it, and taken out again.
        batch: rows a forward.
        on_batch: called with (rows done, rows in all).
    """
    with head_attached(base, head):
        return _logits(base, len(head.labels), rows, batch, on_batch)


def label_losses(base: BaseModel, labels: int, rows: Sequence[Labelled], batch: int) -> np.ndarray:
    """(rows,) float64: each row's cross-entropy in nats, by the head that is in the model.

    Args:
        base: the model as it now is, adapter layers and head included.
        labels: how many the head knows; the rows are numbered by them.
        batch: rows a forward.
    """
    logits = _logits(base, labels, rows, batch).astype(np.float64)
    right = np.array([row.label for row in rows])
    losses: np.ndarray = np.logaddexp.reduce(logits, 1) - logits[np.arange(len(rows)), right]
    return losses


def _logits(
    base: BaseModel,
    labels: int,
    rows: Sequence[Labelled],
    batch: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """(rows, labels) float32 by the head that is in the model."""
    out = np.zeros((len(rows), labels), np.float32)
    done = 0
    labelling = Labelling(base)
    with torch.inference_mode():
        for numbers in length_batches([row.length for row in rows], batch):
            placed = labelling.place(labelling.batch([rows[i] for i in numbers]))
            out[numbers] = labelling.logits(placed).cpu().numpy()
            done += len(numbers)
            if on_batch:
                on_batch(done, len(rows))
    return out


def label_outcomes(
    base: BaseModel,
    head: Head,
    labels: Sequence[str],
    rows: Sequence[Labelled],
    scorer: LabelScorer,
    batch: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """float32 (rows,): each row's outcome by an adapter that has a head for its task.

    Args:
        labels: of the task, by which the rows are numbered; the head may know others.
        base, head, rows, batch, on_batch: see `label_logits`.
    """
    places = {label: i for i, label in enumerate(head.labels)}
    logits = label_logits(base, head, rows, batch, on_batch)
    right = [places.get(labels[row.label]) for row in rows]
    found = [scorer.outcome(own, place)[0] for own, place in zip(logits, right, strict=True)]
    return np.array(found, np.float32)
