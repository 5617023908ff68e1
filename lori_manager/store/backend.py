"""What a database must be able to do so that a registry can live in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from lori_manager.errors import LoriError


class Backend(Protocol):
    """One kind of database, open at one place: `SQLite`, `Postgres`."""

    @property
    def shown(self) -> str:
        """What messages call it; never with a password."""
        ...

    @property
    def subject(self) -> str:
        """What findings call it."""
        ...

    def engine(self) -> Engine:
        """Connects, leaving transactions to `begin`."""
        ...

    def begin(self, connection: Connection, *, write: bool) -> None:
        """Begin a transaction on a connection that has none.

        A reader sees one state throughout. A writer is the only one until it ends: what it has
        read cannot change before it commits.
        """
        ...

    def check(self, connection: Connection) -> None:
        """Refuse what must not be worked with, in a transaction.

        Raises:
            IncompatibleStore: says what to do.
        """
        ...

    def begin_migrating(self, connection: Connection) -> None:
        """As `begin` to write, free to rebuild tables that others point at."""
        ...

    def translate(self, error: DBAPIError) -> LoriError:
        """What the driver refused, as an error that says what to do."""
        ...

    def no_schema(self, error: DBAPIError) -> bool:
        """Whether the error says that a table is not there."""
        ...

    def keep_readers_out(self, connection: Connection) -> None:
        """From now on, within such a transaction: what is rebuilt is seen by nobody."""
        ...

    def has_schema(self, connection: Connection) -> bool:
        """Whether Alembic has worked here; goes on where it has not."""
        ...

    def back_up(self, folder: Path, revision: str) -> tuple[Path | None, str]:
        """Copy the database of that revision, while a migration keeps writers out.

        Returns:
            The copy; or None, and why there can be none.
        Raises:
            StorageFailed: it could not be written.
        """
        ...

    def astray(self, connection: Connection) -> Iterator[str]:
        """Rows that point nowhere."""
        ...

    def faults(self, connection: Connection) -> Iterator[str]:
        """All that is wrong with the database itself, rows that point nowhere included."""
        ...
