"""Aliases: movable names for adapters; every move goes into the journal."""

from __future__ import annotations

from typing import Literal

from sqlalchemy import Connection, delete, insert, select, update

from lori_manager.errors import Conflict
from lori_manager.records import JSON, Alias
from lori_manager.refs import check_name
from lori_manager.store import adapters, journal, names
from lori_manager.store import tables as t
from lori_manager.store.tables import now


def every(connection: Connection, line: str | None) -> list[Alias]:
    """Aliases of one line or of all, by line and name."""
    query = select(t.aliases)
    if line is not None:
        names.require(connection, line)
        query = query.where(t.aliases.c.line == line)
    found = [
        Alias(line=r.line, name=r.name, version=r.version, moved_at=r.moved_at)
        for r in connection.execute(query)
    ]
    return sorted(found, key=lambda alias: (alias.line, alias.name))  # databases sort by language


def point(
    connection: Connection,
    line: str,
    name: str,
    version: int,
    *,
    action: str,
    reason: str,
    forced: bool,
    verdict: JSON | None,
    expected: int | Literal["any"] | None = "any",
) -> Alias:
    """Point the alias at that version and note the move; where it points there already, neither."""
    check_name(name, "alias")
    target = adapters.of_version(connection, line, version)
    found = _alias(connection, line, name)
    if expected != "any" and (found and found.version) != expected:
        now_at = "is gone" if found is None else f"means {line}@{found.version} by now"
        raise Conflict(f"{line}@{name} {now_at}: somebody moved it meanwhile, look and try again")
    if found is not None and found.version == target.version:
        return found
    moved_at = now()
    key = {"line": line, "name": name}
    if found is None:
        connection.execute(
            insert(t.aliases).values(**key, version=target.version, moved_at=moved_at)
        )
    else:
        connection.execute(
            update(t.aliases)
            .where(t.aliases.c.line == line, t.aliases.c.name == name)
            .values(version=target.version, moved_at=moved_at)
        )
    journal.note(
        connection,
        at=moved_at,
        action=action,
        **key,
        from_version=None if found is None else found.version,
        to_version=target.version,
        forced=forced,
        reason=reason,
        verdict=verdict,
    )
    return Alias(line=line, name=name, version=target.version, moved_at=moved_at)


def remove(connection: Connection, line: str, name: str, *, reason: str) -> None:
    """Take the alias away and note it."""
    found = _alias(connection, line, name)
    if found is None:
        known = [alias.name for alias in every(connection, line)]
        raise names.not_found(f"alias of line {line!r}", name, known)
    connection.execute(delete(t.aliases).where(t.aliases.c.line == line, t.aliases.c.name == name))
    journal.note(
        connection,
        at=now(),
        action="removed",
        line=line,
        name=name,
        from_version=found.version,
        to_version=None,
        reason=reason,
    )


def _alias(connection: Connection, line: str, name: str) -> Alias | None:
    return next((a for a in every(connection, line) if a.name == name), None)
