"""Comparisons of kinds: a plan, and the steps of it that are done."""

from __future__ import annotations

import hashlib
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select

from lori_manager.errors import NotFound
from lori_manager.records import JSON, KindComparison, KindStep, Task
from lori_manager.store import removals, tasks
from lori_manager.store import tables as t
from lori_manager.store.tables import canonical, now


def start(connection: Connection, task: Task, plan: JSON) -> KindComparison:
    """The comparison of an equal plan, or a new one."""
    digest = hashlib.sha256(canonical(plan).encode()).hexdigest()
    query = select(t.kind_comparisons).where(t.kind_comparisons.c.digest == digest)
    found = connection.execute(query).one_or_none()
    if found is None:
        tasks.one(connection, task.name, task.revision)
        connection.execute(
            insert(t.kind_comparisons).values(
                digest=digest,
                task=task.name,
                task_revision=task.revision,
                plan=plan,
                created_at=now(),
            )
        )
        found = connection.execute(query).one()
    return _comparison(found)


def every(connection: Connection) -> list[KindComparison]:
    """All of them, oldest first."""
    query = select(t.kind_comparisons).order_by(t.kind_comparisons.c.id)
    return [_comparison(row) for row in connection.execute(query)]


def add_step(connection: Connection, digest: str, step: KindStep) -> None:
    """Note a step; one that is noted already stays as it is, unless its adapter was removed."""
    key = _key(connection, digest)
    same = select(t.kind_steps).where(
        t.kind_steps.c.comparison == key,
        t.kind_steps.c.entry == step.entry,
        t.kind_steps.c.step == step.step,
        t.kind_steps.c.point == step.point,
    )
    noted = connection.execute(same).one_or_none()
    if noted is not None:
        if (noted.line, noted.version) not in removals.hidden_now(connection):
            return
        connection.execute(delete(t.kind_steps).where(t.kind_steps.c.id == noted.id))
    line, _, version = (step.adapter or "").partition("@")
    connection.execute(
        insert(t.kind_steps).values(
            comparison=key,
            entry=step.entry,
            step=step.step,
            point=step.point,
            line=line or None,
            version=int(version) if version else None,
            facts=step.facts,
            created_at=now(),
        )
    )


def steps(connection: Connection, digest: str) -> list[KindStep]:
    """What is done, in the order in which it was; what led to a removed adapter is not."""
    gone = removals.hidden_now(connection)
    key = _key(connection, digest)
    query = select(t.kind_steps).where(t.kind_steps.c.comparison == key).order_by(t.kind_steps.c.id)
    return [
        KindStep(
            row.entry,
            row.step,
            row.point,
            None if row.line is None else f"{row.line}@{row.version}",
            row.facts,
        )
        for row in connection.execute(query)
        if (row.line, row.version) not in gone
    ]


def _key(connection: Connection, digest: str) -> int:
    query = select(t.kind_comparisons.c.id).where(t.kind_comparisons.c.digest == digest)
    key = connection.execute(query).scalar_one_or_none()
    if key is None:
        raise NotFound(f"no comparison of kinds has the digest {digest[:12]}")
    return int(key)


def _comparison(row: Row[Any]) -> KindComparison:
    return KindComparison(row.digest, row.task, row.task_revision, row.plan, row.created_at)
