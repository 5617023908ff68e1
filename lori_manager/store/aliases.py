"""Aliases: movable names for adapters, with a journal that only grows."""

from __future__ import annotations

import getpass
import os

from sqlalchemy import Connection, delete, insert, select, update

from lori_manager.records import Alias, AliasMove
from lori_manager.refs import check_name
from lori_manager.store import adapters, names
from lori_manager.store import tables as t
from lori_manager.store.tables import now


def every(connection: Connection, line: str | None) -> list[Alias]:
    """Aliases of one line or of all, by line and name."""
    query = select(t.aliases).order_by(t.aliases.c.line, t.aliases.c.name)
    if line is not None:
        names.require(connection, line)
        query = query.where(t.aliases.c.line == line)
    return [
        Alias(line=r.line, name=r.name, version=r.version, moved_at=r.moved_at)
        for r in connection.execute(query)
    ]


def point(connection: Connection, line: str, name: str, version: int) -> Alias:
    """Point the alias at that version and note the move; where it points there already, neither."""
    check_name(name, "alias")
    target = adapters.of_version(connection, line, version)
    found = _alias(connection, line, name)
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
    before = None if found is None else found.version
    _note(connection, AliasMove(line, name, before, target.version, _user(), moved_at))
    return Alias(line=line, name=name, version=target.version, moved_at=moved_at)


def remove(connection: Connection, line: str, name: str) -> None:
    """Take the alias away and note it."""
    found = _alias(connection, line, name)
    if found is None:
        known = [alias.name for alias in every(connection, line)]
        raise names.not_found(f"alias of line {line!r}", name, known)
    connection.execute(delete(t.aliases).where(t.aliases.c.line == line, t.aliases.c.name == name))
    _note(connection, AliasMove(line, name, found.version, None, _user(), now()))


def moves(connection: Connection, line: str | None) -> list[AliasMove]:
    """The journal, oldest entry first."""
    query = select(t.alias_moves).order_by(t.alias_moves.c.id)
    if line is not None:
        names.require(connection, line)
        query = query.where(t.alias_moves.c.line == line)
    return [
        AliasMove(
            line=r.line,
            name=r.name,
            from_version=r.from_version,
            to_version=r.to_version,
            user=r.user,
            moved_at=r.moved_at,
        )
        for r in connection.execute(query)
    ]


def _alias(connection: Connection, line: str, name: str) -> Alias | None:
    return next((a for a in every(connection, line) if a.name == name), None)


def _note(connection: Connection, move: AliasMove) -> None:
    connection.execute(
        insert(t.alias_moves).values(
            line=move.line,
            name=move.name,
            from_version=move.from_version,
            to_version=move.to_version,
            user=move.user,
            moved_at=move.moved_at,
        )
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # an id without an account, as in containers
        return f"uid {os.getuid()}" if hasattr(os, "getuid") else "unknown"
