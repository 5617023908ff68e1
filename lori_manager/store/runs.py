"""Runs: training commands in progress."""

from __future__ import annotations

import hashlib
import uuid
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from lori_manager.errors import NotFound
from lori_manager.records import JSON, Run
from lori_manager.store import tables as t
from lori_manager.store.tables import canonical, now


def start(connection: Connection, plan: JSON, folder: str = "") -> Run:
    """The open run of an equal plan, or a new one.

    Args:
        folder: whose it is, where several share the rows: checkpoints lie in one of them.
    """
    digest = hashlib.sha256((canonical(plan) + folder).encode()).hexdigest()
    same = select(t.runs).where(t.runs.c.open_plan == digest)
    found = connection.execute(same).one_or_none()
    if found is not None:
        return _run(found)
    key = uuid.uuid4().hex
    connection.execute(insert(t.runs).values(id=key, plan=plan, open_plan=digest, created_at=now()))
    return one(connection, key)


def finish(connection: Connection, key: str) -> None:
    """Close the run; the same plan then starts anew."""
    one(connection, key)
    connection.execute(update(t.runs).where(t.runs.c.id == key).values(open_plan=None))


def one(connection: Connection, key: str) -> Run:
    """The run of that id; raises NotFound."""
    row = connection.execute(select(t.runs).where(t.runs.c.id == key)).one_or_none()
    if row is None:
        raise NotFound(f"there is no run {key[:80]!r}: run the training command anew")
    return _run(row)


def unfinished(connection: Connection) -> list[Run]:
    """The open runs, oldest first."""
    query = (
        select(t.runs)
        .where(t.runs.c.open_plan.is_not(None))
        .order_by(t.runs.c.created_at, t.runs.c.id)
    )
    return [_run(row) for row in connection.execute(query)]


def _run(row: Row[Any]) -> Run:
    return Run(id=row.id, plan=row.plan, done=row.open_plan is None, created_at=row.created_at)
