"""The journal of aliases: who moved which, when and why. The database refuses to change it."""

from __future__ import annotations

import getpass
import os
from datetime import datetime

from sqlalchemy import Connection, insert, select

from lori_manager.records import JSON, JournalEntry
from lori_manager.store import names
from lori_manager.store import tables as t


def note(
    connection: Connection,
    *,
    at: datetime,
    action: str,
    line: str,
    name: str,
    from_version: int | None,
    to_version: int | None,
    forced: bool = False,
    reason: str = "",
    verdict: JSON | None = None,
) -> None:
    """Add an entry, under the name of the user whose process this is."""
    connection.execute(
        insert(t.journal).values(
            at=at,
            user=user(),
            action=action,
            line=line,
            name=name,
            from_version=from_version,
            to_version=to_version,
            forced=forced,
            reason=reason,
            verdict=verdict,
        )
    )


def entries(
    connection: Connection, *, line: str | None, alias: str | None, since: datetime | None
) -> list[JournalEntry]:
    """What was noted, oldest first."""
    query = select(t.journal).order_by(t.journal.c.id)
    if line is not None:
        names.require(connection, line)
        query = query.where(t.journal.c.line == line)
    if alias is not None:
        query = query.where(t.journal.c.name == alias)
    if since is not None:
        query = query.where(t.journal.c.at >= since)
    return [JournalEntry(**row._mapping) for row in connection.execute(query)]


def user() -> str:
    """Whose process this is."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # an id without an account, as in containers
        return f"uid {os.getuid()}" if hasattr(os, "getuid") else "unknown"
