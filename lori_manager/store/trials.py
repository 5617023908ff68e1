"""Outcomes of adapters that were made to be tried and were not kept.

Their key is the recipe: a digest of everything that such an adapter is made of, so that the
outcomes are found again without making it. They can be measured again, so damaged ones count
as none and are replaced when they are added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import ColumnElement, Connection, delete, insert, select

from lori_manager.records import Task
from lori_manager.store import tables as t
from lori_manager.store import tasks
from lori_manager.store.packed import pack_numbers, unpack_numbers
from lori_manager.store.tables import now

if TYPE_CHECKING:
    import numpy as np


def find(
    connection: Connection, *, recipe: str, task: Task, scorer_version: str, precision: str
) -> tuple[str, np.ndarray, np.ndarray | None] | None:
    """The digest of the weights, outcomes and weights by row, if they are known and whole."""
    rows = tasks.one(connection, task.name, task.revision).splits["eval"].rows
    query = select(t.trials).where(*_of(recipe, task, scorer_version, precision))
    row = connection.execute(query).one_or_none()
    if row is None:
        return None
    outcomes = unpack_numbers(row.outcomes, rows)
    weights = None if row.weights is None else unpack_numbers(row.weights, rows)
    if outcomes is None or (weights is None and row.weights is not None):
        return None
    return row.digest, outcomes, weights


def add(
    connection: Connection,
    *,
    recipe: str,
    digest: str,
    task: Task,
    scorer_version: str,
    precision: str,
    outcomes: np.ndarray,
    weights: np.ndarray | None,
) -> None:
    """Keep outcomes; they take the place of those known before."""
    connection.execute(delete(t.trials).where(*_of(recipe, task, scorer_version, precision)))
    connection.execute(
        insert(t.trials).values(
            recipe=recipe,
            digest=digest,
            task=task.name,
            task_revision=task.revision,
            scorer=task.scorer,
            scorer_version=scorer_version,
            precision=precision,
            created_at=now(),
            outcomes=pack_numbers(outcomes),
            weights=None if weights is None else pack_numbers(weights),
        )
    )


def _of(
    recipe: str, task: Task, scorer_version: str, precision: str
) -> tuple[ColumnElement[bool], ...]:
    return (
        t.trials.c.recipe == recipe,
        t.trials.c.task == task.name,
        t.trials.c.task_revision == task.revision,
        t.trials.c.scorer == task.scorer,
        t.trials.c.scorer_version == scorer_version,
        t.trials.c.precision == precision,
    )
