"""The folder that a server's database goes with: one, for its files are there and nowhere else."""

from __future__ import annotations

from sqlalchemy import Connection, insert, select

from lori_manager.errors import Conflict
from lori_manager.store import tables as t


def take(connection: Connection, folder: str, place: str) -> None:
    """Note the folder, or find it noted.

    Args:
        folder: the name that the folder has given itself.
        place: where it lies, for people.
    Raises:
        Conflict: the database is another folder's.
    """
    row = connection.execute(select(t.home)).one_or_none()
    if row is None:
        connection.execute(insert(t.home).values(id=1, folder=folder, place=place))
    else:
        check(connection, folder)


def check(connection: Connection, folder: str) -> None:
    """Refuse the database of another folder. Raises Conflict."""
    row = connection.execute(select(t.home)).one_or_none()
    if row is None or row.folder != folder:
        where = "that of no folder" if row is None else f"that of the workspace in {row.place}"
        raise Conflict(
            f"the database is {where}, whose files are there alone: work in that folder, or give "
            "this workspace a database or schema of its own"
        )
