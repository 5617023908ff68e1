"""The names of lines, which are also those of tasks: unique, and listed when one is missed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, Row, insert, select

from lori_manager.errors import NotFound
from lori_manager.store import tables as t
from lori_manager.store.tables import now

_SHOWN = 20


def find(connection: Connection, name: str, *, lock: bool = False) -> Row[Any] | None:
    """The line's row; `lock` keeps other writers from numbering on it (SQLite has but one)."""
    query = select(t.lines).where(t.lines.c.name == name)
    return connection.execute(query.with_for_update() if lock else query).one_or_none()


def require(connection: Connection, name: str) -> None:
    """Raise NotFound if there is no such line."""
    if find(connection, name) is None:
        known = connection.execute(select(t.lines.c.name).order_by(t.lines.c.id)).scalars().all()
        raise not_found("line", name, known)


def add(
    connection: Connection, name: str, *, of_task: bool = False, sequence: Sequence[str] = ()
) -> None:
    """Add the line; the caller has checked the name."""
    connection.execute(
        insert(t.lines).values(
            name=name, of_task=of_task, sequence=list(sequence), created_at=now()
        )
    )


def numbers(known: Iterable[int]) -> str:
    """`1 to 4, 7`: what there is of numbers that others may have brought with gaps."""
    spans: list[list[int]] = []
    for number in sorted(known):
        if spans and spans[-1][-1] == number - 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    told = [" to ".join(map(str, span)) for span in spans]
    left = "" if len(told) <= _SHOWN else f" and more, up to {spans[-1][-1]}"
    return ", ".join(told[:_SHOWN]) + left


def not_found(what: str, name: str, known: Sequence[str]) -> NotFound:
    """The error for an unknown name: a close match where there is one, and what there is."""
    import difflib

    message = f"no {what} is called {name[:80]!r}"
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        message += f"; did you mean {close[0]!r}?"
    there = ", ".join(known[:_SHOWN]) or "none yet"
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return NotFound(f"{message}; there are: {there}{more}")
