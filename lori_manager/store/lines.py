"""Lines: named histories of adapters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, func, select

from lori_manager.errors import Conflict
from lori_manager.records import Adapter, Line
from lori_manager.refs import check_name
from lori_manager.store import adapters, aliases, names, removals
from lori_manager.store import tables as t


def add(connection: Connection, name: str, sequence: Sequence[str]) -> None:
    """Make a free line; the same one again changes nothing."""
    check_name(name, "line")
    row = names.find(connection, name, lock=True)
    if row is None:
        names.add(connection, name, sequence=sequence)
    elif row.of_task:
        raise Conflict(f"{name!r} is a task's own line: choose another name")
    elif row.sequence != list(sequence):
        raise Conflict(f"the line {name!r} exists {_taught(row.sequence)}: choose another name")


def _taught(sequence: Sequence[str]) -> str:
    return f"as the sequence {', '.join(sequence)}" if sequence else "and is no sequence"


def one(connection: Connection, name: str) -> Line:
    """The line of that name."""
    names.require(connection, name)
    return _select(connection, name)[0]


def every(connection: Connection) -> list[Line]:
    """All lines, in as many queries for many as for one."""
    return _select(connection, None)


def _select(connection: Connection, name: str | None) -> list[Line]:
    lines = select(t.lines).order_by(t.lines.c.id)
    newest = select(
        t.adapters.c.line,
        func.max(t.adapters.c.version).label("version"),
        func.count().label("versions"),
    ).group_by(t.adapters.c.line)
    if removals.any_hidden(connection):
        newest = newest.where(removals.visible())
    if name is not None:
        lines = lines.where(t.lines.c.name == name)
        newest = newest.where(t.adapters.c.line == name)
    rows = connection.execute(lines).all()
    versions = {row.line: row.versions for row in connection.execute(newest)}
    latest = {a.line: a for a in adapters.newest_of(connection, newest.subquery())}
    marks: dict[str, dict[str, int]] = defaultdict(dict)
    for alias in aliases.every(connection, name):
        marks[alias.line][alias.name] = alias.version
    return [_line(r, versions.get(r.name, 0), latest.get(r.name), marks[r.name]) for r in rows]


def _line(row: Row[Any], versions: int, latest: Adapter | None, marks: dict[str, int]) -> Line:
    return Line(
        name=row.name,
        task=row.name if row.of_task else None,
        sequence=tuple(row.sequence),
        versions=versions,
        latest=latest,
        aliases=marks,
        created_at=row.created_at,
    )
