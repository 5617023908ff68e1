"""Masks, versioned per task."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, func, insert, select

from lori_manager.errors import NotFound
from lori_manager.records import JSON, Mask, Task
from lori_manager.store import names, tasks
from lori_manager.store import tables as t
from lori_manager.store.tables import now


def add(
    connection: Connection,
    *,
    task: Task,
    digest: str,
    projection: str,
    sparsity: float,
    scope: str,
    kept: int,
    total: int,
    config: JSON,
) -> Mask:
    """Commit the task's next mask."""
    tasks.one(connection, task.name, task.revision)
    names.find(connection, task.name, lock=True)
    version = _latest(connection, task.name) + 1
    connection.execute(
        insert(t.masks).values(
            task=task.name,
            task_revision=task.revision,
            version=version,
            digest=digest,
            projection=projection,
            sparsity=sparsity,
            scope=scope,
            kept=kept,
            total=total,
            config=config,
            created_at=now(),
        )
    )
    return one(connection, task.name, version)


def one(connection: Connection, task: str, version: int) -> Mask:
    """The mask `task%version`.

    Raises:
        NotFound: no such task or version.
    """
    found = []
    if 1 <= version <= _latest(connection, task):
        found = _select(connection, t.masks.c.task == task, t.masks.c.version == version)
    if not found:
        known = [mask.version for mask in every(connection, task)]
        there = (
            f"it has {names.numbers(known)}" if known else "it has none yet: run `lori calibrate`"
        )
        raise NotFound(f"task {task!r} has no mask {version}: {there}")
    return found[0]


def every(connection: Connection, task: str | None) -> list[Mask]:
    """The masks of a task, or of all tasks, oldest first."""
    if task is None:
        return _select(connection)
    tasks.one(connection, task, None)
    return _select(connection, t.masks.c.task == task)


def _latest(connection: Connection, task: str) -> int:
    newest = select(func.max(t.masks.c.version)).where(t.masks.c.task == task)
    return connection.execute(newest).scalar_one() or 0


def _select(connection: Connection, *where: ColumnElement[bool]) -> list[Mask]:
    query = select(t.masks).where(*where).order_by(t.masks.c.id)
    return [_mask(row) for row in connection.execute(query)]


def _mask(row: Row[Any]) -> Mask:
    return Mask(
        task=row.task,
        task_revision=row.task_revision,
        version=row.version,
        digest=row.digest,
        projection=row.projection,
        sparsity=row.sparsity,
        scope=row.scope,
        kept=row.kept,
        total=row.total,
        config=row.config,
        created_at=row.created_at,
    )
