"""Forecasts: what dry runs expected of merges, kept to be compared with what came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields

from sqlalchemy import Connection, insert, select

from lori_manager.records import Expected, Forecasted
from lori_manager.store import tables as t
from lori_manager.store.tables import now


def add(connection: Connection, forecasts: Sequence[Forecasted]) -> None:
    """Note them, with the time."""
    for one in forecasts:
        values = asdict(one.expected) | {
            "merge": one.merge,
            "precision": one.precision,
            "encoding": one.encoding,
        }
        connection.execute(insert(t.forecasts).values(**values, created_at=now()))


def every(connection: Connection) -> list[Forecasted]:
    """All of them, oldest first."""
    names = [f.name for f in fields(Expected)]
    rows = connection.execute(select(t.forecasts).order_by(t.forecasts.c.id)).mappings()
    return [
        Forecasted(
            row["merge"],
            row["precision"],
            row["encoding"],
            Expected(**{name: row[name] for name in names}),
            row["created_at"],
        )
        for row in rows
    ]
