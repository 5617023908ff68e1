"""SQLite: its connections, journal, transactions and failures.

A rollback journal by default. Write-ahead logging (WAL) only on request, on a local disk, with
an SQLite that is free of the rare bug by which versions 3.7.0 to 3.51.2 may damage a database in
that mode when two connections restart its log at once.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event
from sqlalchemy.exc import DBAPIError

from lori_manager.errors import (
    Conflict,
    DamagedObject,
    IncompatibleStore,
    InvalidInput,
    LoriError,
    StorageFailed,
)
from lori_manager.store.files import sync_folder
from lori_manager.store.mounts import file_system

BUSY_SECONDS = 30.0
SAFE_WAL = (3, 51, 3)
ROLLBACK, WAL = "delete", "wal"  # as SQLite calls its journals


@dataclass(frozen=True)
class SQLite:
    """The database in a file, which must be there unless `create`."""

    path: Path
    create: bool = False

    @property
    def shown(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def subject(self) -> str:
        """The file's name."""
        return self.path.name

    def engine(self) -> Engine:
        """Connections of which none outlives its transaction."""
        mode = "rwc" if self.create else "rw"  # never an empty database where one was removed
        file = "file:" + quote(str(self.path.absolute()))
        url = URL.create("sqlite", database=file, query={"mode": mode, "uri": "true"})
        engine = create_engine(url, poolclass=NullPool, connect_args={"timeout": BUSY_SECONDS})
        event.listen(engine, "connect", _prepare)
        return engine

    def begin(self, connection: Connection, *, write: bool) -> None:
        """Writers IMMEDIATE, so that they wait at once and not when they commit."""
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    def begin_migrating(self, connection: Connection) -> None:
        """With foreign keys off, which cannot be set within a transaction."""
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    def check(self, connection: Connection) -> None:
        """Refuse write-ahead logging with an SQLite that has its bug."""
        if sqlite3.sqlite_version_info >= SAFE_WAL:
            return
        if connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == WAL:
            raise IncompatibleStore(
                f"{self.shown} is in WAL mode, in which this Python's SQLite "
                f"{sqlite3.sqlite_version} may damage it: use one with {_told(SAFE_WAL)} or newer, "
                "or run `lori db journal rollback`"
            )

    def no_schema(self, error: DBAPIError) -> bool:
        """What SQLite says of a table that is not there."""
        return getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR

    def keep_readers_out(self, connection: Connection) -> None:
        """They see the state before until the commit, which waits for them."""

    def has_schema(self, connection: Connection) -> bool:
        """Whether Alembic has worked here."""
        query = "SELECT count(*) FROM sqlite_master WHERE name = 'alembic_version'"
        return bool(connection.exec_driver_sql(query).scalar_one())

    def astray(self, connection: Connection) -> Iterator[str]:
        """Rows that point nowhere."""
        for table, row, target, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
            yield f"row {row} of {table} points at a row of {target} that is not there"

    def faults(self, connection: Connection) -> Iterator[str]:
        """Broken pages and indexes, then rows that point nowhere."""
        for fault in connection.exec_driver_sql("PRAGMA integrity_check").scalars().all():
            if fault != "ok":
                yield f"{self.path.name} is damaged: {fault}"
        yield from self.astray(connection)

    def translate(self, error: DBAPIError) -> LoriError:
        """By SQLite's primary result code."""
        return self._told(error.orig)

    def _told(self, error: BaseException | None) -> LoriError:
        """The driver's own error in words."""
        shown = self.shown
        code = getattr(error, "sqlite_errorcode", None)
        primary = None if code is None else code & 0xFF
        reason = str(error)
        if isinstance(error, sqlite3.IntegrityError):
            return Conflict(
                f"{shown} refused the change ({reason}): another process may have made it "
                "already; run the command again"
            )
        if primary == sqlite3.SQLITE_FULL:
            return StorageFailed(
                f"no space left for {shown}: free some (what was stored before is untouched), retry"
            )
        if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StorageFailed(
                f"{shown} stayed locked by another process for {BUSY_SECONDS:g} s: wait for it, "
                "retry"
            )
        if primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN):
            return StorageFailed(
                f"{shown} cannot be opened or written ({reason}): check the permissions of the "
                "file and its folder, and whether the disk is mounted read-only"
            )
        if primary == sqlite3.SQLITE_IOERR:
            return StorageFailed(f"the disk failed on {shown} ({reason}): check it, retry")
        if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or (
            "decode to UTF-8" in reason
        ):
            return DamagedObject(
                f"{shown} is damaged or no database ({reason}): restore it from a copy"
            )
        if primary == sqlite3.SQLITE_ERROR:
            return IncompatibleStore(
                f"{shown} lacks what this lori expects ({reason}): it was altered by another "
                "program; restore it from a copy"
            )
        return StorageFailed(f"{shown} failed: {reason}")

    def journal(self) -> str:
        """The journal mode: `ROLLBACK`, or `WAL`."""
        with self._plain() as connection:
            return str(connection.exec_driver_sql("PRAGMA journal_mode").scalar_one())

    def set_journal(self, mode: str) -> None:
        """Change the journal mode, for good and for everybody.

        Args:
            mode: `ROLLBACK` or `WAL`.
        Raises:
            IncompatibleStore: WAL, and this SQLite has the bug.
            InvalidInput: WAL, and the file does not lie on a local disk.
            StorageFailed: another process has the database open.
        """
        if mode == WAL and sqlite3.sqlite_version_info < SAFE_WAL:
            raise IncompatibleStore(
                f"this Python's SQLite {sqlite3.sqlite_version} may damage a database in WAL "
                f"mode: use one with {_told(SAFE_WAL)} or newer, or stay with rollback"
            )
        kind, local = file_system(self.path)
        if mode == WAL and not local:
            raise InvalidInput(
                f"{self.shown} lies on {kind}, where WAL does not work between machines: stay "
                "with rollback, or move it to a local disk"
            )
        with self._plain() as connection:
            got = connection.exec_driver_sql(f"PRAGMA journal_mode = {mode}").scalar_one()
        if got != mode:
            raise StorageFailed(f"{self.shown} stays with {got}: end other lori processes, retry")

    @contextlib.contextmanager
    def _plain(self) -> Iterator[Connection]:
        """A connection without a transaction."""
        engine = self.engine()
        try:
            with engine.connect() as connection:
                yield connection.execution_options(isolation_level="AUTOCOMMIT")
        except DBAPIError as e:
            raise self.translate(e) from e
        finally:
            engine.dispose()

    def back_up(self, folder: Path, revision: str) -> tuple[Path | None, str]:
        """Copy the database; while a migration holds the write lock none slips in."""
        target = folder / f"registry.{revision}.db"
        unfinished = target.with_name(f".{target.name}.new")
        discard(unfinished)
        try:
            with (
                contextlib.closing(sqlite3.connect(self.path)) as source,
                contextlib.closing(sqlite3.connect(unfinished)) as copy,
            ):
                copy.execute("PRAGMA synchronous = FULL")
                source.backup(copy)
        except sqlite3.Error as e:
            discard(unfinished)
            raise self._told(e) from e
        unfinished.replace(target)
        sync_folder(target.parent)
        return target, ""


def discard(path: Path) -> None:
    """Remove a database that was never finished, and its journal, which would spoil the next."""
    for left in (path, path.with_name(f"{path.name}-journal")):
        left.unlink(missing_ok=True)


def driver(connection: Connection) -> sqlite3.Connection:
    """The driver's own connection."""
    raw = connection.connection.driver_connection
    if not isinstance(raw, sqlite3.Connection):
        raise TypeError(f"expected an SQLite connection, got {type(raw).__name__}")
    return raw


def _prepare(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # else the driver begins late, and never IMMEDIATE
    connection.execute("PRAGMA foreign_keys = ON")
    # EXTRA is FULL and an fsync of the folder once the journal is deleted: without it
    # the journal may come back after a power cut and undo the last commit
    connection.execute("PRAGMA synchronous = EXTRA")


def _told(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
