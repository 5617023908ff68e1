"""Removals: versions that nobody wants to see any more. Rows are only ever added.

A hidden version keeps its row, number and scores; `gc` frees its file.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, func, insert, select, tuple_

from lori_manager.errors import Conflict, NotFound
from lori_manager.records import Removal
from lori_manager.store import journal
from lori_manager.store import tables as t
from lori_manager.store.tables import now


def hidden(before: datetime | None = None) -> Select[tuple[str, int]]:
    """(line, version) of what is hidden now, since before that time where one is given."""
    last = select(func.max(t.removals.c.id)).group_by(t.removals.c.line, t.removals.c.version)
    query = select(t.removals.c.line, t.removals.c.version).where(
        t.removals.c.id.in_(last), t.removals.c.hidden
    )
    return query if before is None else query.where(t.removals.c.at < before)


def hidden_now(connection: Connection) -> set[tuple[str, int]]:
    """(line, version) of what is hidden."""
    return {(row.line, row.version) for row in connection.execute(hidden())}


def any_hidden(connection: Connection) -> bool:
    """Whether anything was ever hidden: most stores need not look further."""
    return connection.execute(select(t.removals.c.id).limit(1)).first() is not None


def visible() -> ColumnElement[bool]:
    """Of rows of adapters: those that are not hidden."""
    return tuple_(t.adapters.c.line, t.adapters.c.version).not_in(hidden())


def last(connection: Connection, line: str, version: int) -> Removal | None:
    """What became of that version last."""
    query = (
        select(t.removals)
        .where(t.removals.c.line == line, t.removals.c.version == version)
        .order_by(t.removals.c.id.desc())
        .limit(1)
    )
    row = connection.execute(query).one_or_none()
    return None if row is None else Removal(**row._mapping)


def every(connection: Connection, line: str | None = None) -> list[Removal]:
    """All there ever was, oldest first."""
    query = select(t.removals).order_by(t.removals.c.id)
    if line is not None:
        query = query.where(t.removals.c.line == line)
    return [Removal(**row._mapping) for row in connection.execute(query)]


def gone(line: str, version: int, removal: Removal) -> NotFound:
    """The error for a version that is hidden."""
    why = f": {removal.reason}" if removal.reason else ""
    ref = f"{line}@{version}"
    return NotFound(
        f"{ref} was removed by {removal.user}{why}; `lori rm --undo {ref}` brings it back while "
        "its file is there"
    )


def hide(connection: Connection, keys: Sequence[tuple[str, int]], reason: str) -> None:
    """Hide versions, all of them or none.

    Raises:
        Conflict: an alias, an open run, or a visible version outside of `keys` needs one.
    """
    for line, version in keys:
        needed_by = _needs(connection, line, version, keys)
        if needed_by:
            raise Conflict(
                f"{line}@{version} is needed by {', '.join(needed_by)}: remove or move these first"
            )
    for line, version in keys:
        note(connection, line, version, reason, hidden=True)


def restore(connection: Connection, line: str, version: int, reason: str) -> None:
    """Bring a hidden version back. Raises NotFound where it is not hidden."""
    known = last(connection, line, version)
    if known is None or not known.hidden:
        raise NotFound(f"{line}@{version} is not removed, so there is nothing to bring back")
    note(connection, line, version, reason, hidden=False)


def note(connection: Connection, line: str, version: int, reason: str, *, hidden: bool) -> None:
    """Note that a version is hidden now, or back."""
    connection.execute(
        insert(t.removals).values(
            at=now(), user=journal.user(), line=line, version=version, hidden=hidden, reason=reason
        )
    )


def _needs(
    connection: Connection, line: str, version: int, leaving: Sequence[tuple[str, int]]
) -> list[str]:
    """What needs that version, in words."""
    ref = f"{line}@{version}"
    aliases = select(t.aliases.c.name).where(
        t.aliases.c.line == line, t.aliases.c.version == version
    )
    needs = [f"the alias {line}@{name}" for name in connection.execute(aliases).scalars()]
    children = (
        select(t.adapters.c.line, t.adapters.c.version, t.adapters.c.origin)
        .join(t.parents, t.parents.c.adapter == t.adapters.c.id)
        .where(and_(t.parents.c.line == line, t.parents.c.version == version), visible())
        .order_by(t.adapters.c.id)
    )
    for child, number, origin in connection.execute(children):
        if (child, number) not in leaving:
            made = "merged" if origin == "merged" else "continued"
            needs.append(f"{child}@{number}, which was {made} from it")
    open_runs = select(t.runs).where(t.runs.c.open_plan.is_not(None)).order_by(t.runs.c.id)
    own = select(t.adapters.c.run).where(t.adapters.c.line == line, t.adapters.c.version == version)
    run = connection.execute(own).scalar_one_or_none()
    for row in connection.execute(open_runs):
        if row.id == run or ref in _texts(row.plan):
            needs.append(f"the unfinished training {row.id[:8]} (`lori db abandon` gives it up)")
    return needs


def _texts(plan: Any) -> set[str]:
    """All text in a plan."""
    if isinstance(plan, str):
        return {plan}
    if isinstance(plan, dict):
        plan = list(plan.values())
    return set().union(*map(_texts, plan)) if isinstance(plan, list) else set()
