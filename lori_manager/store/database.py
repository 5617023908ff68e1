"""The registry's connections, transactions, failures and schema revision.

SQLite: a rollback journal, writers BEGIN IMMEDIATE, readers BEGIN, and a wait
instead of an error while another process writes. Only Alembic makes or changes the
schema, in exactly one process. What is SQLite's alone sits in functions that say so.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, NullPool, create_engine, event
from sqlalchemy.exc import DBAPIError, IntegrityError, StatementError

from lori_manager.errors import (
    Conflict,
    DamagedObject,
    IncompatibleStore,
    InvalidInput,
    LoriError,
    NotFound,
    StorageFailed,
)
from lori_manager.store.files import storing, sync_folder

HEAD = "0006"  # the schema that this lori reads and writes
REGISTRY = "registry.db"
BUSY_SECONDS = 30.0
_UNFINISHED = ".registry.db.new"


@dataclass(frozen=True)
class Upgrade:
    """What `upgrade` did; `before` equals `after` where there was nothing to do."""

    before: str
    after: str
    backup: Path | None


class Database:
    """Opens short transactions and turns what goes wrong in them into LoriErrors.

    No connection outlives its transaction: none is carried into a forked process,
    and none keeps the file busy while a model trains.
    """

    def __init__(self, url: URL, shown: str) -> None:
        self.shown = shown
        self._engine = create_engine(url, poolclass=NullPool, connect_args=_connect_args(url))
        if url.get_backend_name() == "sqlite":
            event.listen(self._engine, "connect", _prepare_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)

    @classmethod
    def sqlite(cls, path: Path, *, create: bool = False) -> Database:
        """The database in that file, which must be there unless `create`."""
        mode = "rwc" if create else "rw"  # never an empty database where one was removed
        file = "file:" + quote(str(path.absolute()))
        url = URL.create("sqlite", database=file, query={"mode": mode, "uri": "true"})
        return cls(url, str(path))

    def close(self) -> None:
        """Release what the engine holds."""
        self._engine.dispose()

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database and changes nothing."""
        with self._transaction("BEGIN") as connection:
            check_revision(revision(connection), self.shown)
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """The only writing transaction of this moment; commits unless an error leaves it."""
        with self._transaction("BEGIN IMMEDIATE") as connection:
            check_revision(revision(connection), self.shown)
            yield connection

    @contextlib.contextmanager
    def migrating(self) -> Iterator[Connection]:
        """Like `write`, at any revision and with foreign keys off, as rebuilt tables need."""
        with self._transaction("BEGIN IMMEDIATE", foreign_keys=False) as connection:
            yield connection
            if connection.exec_driver_sql("PRAGMA foreign_key_check").first() is not None:
                raise DamagedObject(
                    f"{self.shown} has rows that point nowhere, so it was left as it was: "
                    "restore it from a copy"
                )

    @contextlib.contextmanager
    def _transaction(self, begin: str, *, foreign_keys: bool = True) -> Iterator[Connection]:
        with self._translated(), self._engine.connect() as connection:
            if not foreign_keys:  # cannot be set within a transaction
                sqlite_connection(connection).execute("PRAGMA foreign_keys = OFF")
            connection.execution_options(lori_begin=begin)
            with connection.begin():
                yield connection

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as e:
            raise _translate(e, self.shown) from e
        except StatementError as e:  # a value that its column type refused
            if isinstance(e.orig, (TypeError, ValueError)):
                raise e.orig from e
            raise
        except UnicodeEncodeError as e:
            raise InvalidInput(f"{e.object!r} is not valid Unicode: use other text") from e
        except OverflowError as e:
            raise InvalidInput("a number is too large for the database: use a smaller one") from e


def sqlite_connection(connection: Connection) -> sqlite3.Connection:
    """The driver's own connection."""
    raw = connection.connection.driver_connection
    if not isinstance(raw, sqlite3.Connection):
        raise TypeError(f"expected an SQLite connection, got {type(raw).__name__}")
    return raw


def _connect_args(url: URL) -> dict[str, Any]:
    return {"timeout": BUSY_SECONDS} if url.get_backend_name() == "sqlite" else {}


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # else the driver begins late, and never IMMEDIATE
    connection.execute("PRAGMA foreign_keys = ON")
    # EXTRA is FULL and an fsync of the folder once the journal is deleted: without it
    # the journal may come back after a power cut and undo the last commit
    connection.execute("PRAGMA synchronous = EXTRA")


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("lori_begin", "BEGIN"))


def _translate(e: DBAPIError, shown: str) -> LoriError:
    code = getattr(e.orig, "sqlite_errorcode", None)
    primary = None if code is None else code & 0xFF
    reason = str(e.orig)
    if isinstance(e, IntegrityError):
        return Conflict(
            f"{shown} refused the change ({reason}): another process may have made it already; "
            "run the command again"
        )
    if primary == sqlite3.SQLITE_FULL:
        return StorageFailed(
            f"no space left for {shown}: free some (what was stored before is untouched), retry"
        )
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StorageFailed(
            f"{shown} stayed locked by another process for {BUSY_SECONDS:g} s: wait for it, retry"
        )
    if primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN):
        return StorageFailed(
            f"{shown} cannot be opened or written ({reason}): check the permissions of the file "
            "and its folder, and whether the disk is mounted read-only"
        )
    if primary == sqlite3.SQLITE_IOERR:
        return StorageFailed(f"the disk failed on {shown} ({reason}): check it, retry")
    if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or "decode to UTF-8" in reason:
        return DamagedObject(
            f"{shown} is damaged or no database ({reason}): restore it from a copy"
        )
    if primary == sqlite3.SQLITE_ERROR:
        return IncompatibleStore(
            f"{shown} lacks what this lori expects ({reason}): it was altered by another "
            "program; restore it from a copy"
        )
    return StorageFailed(f"{shown} failed: {reason}")


def revision(connection: Connection) -> str | None:
    """The schema revision that Alembic noted; None where it never worked."""
    try:
        noted = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars()
        return "+".join(noted.all()) or None
    except DBAPIError as e:
        if getattr(e.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:
            return None
        raise


def check_revision(found: str | None, shown: str, *, upgrading: bool = False) -> None:
    """Refuse a database that this lori cannot work with.

    Raises:
        IncompatibleStore: no registry, older (unless `upgrading`), newer, or unknown.
    """
    if found == HEAD:
        return
    if found is None:
        raise IncompatibleStore(
            f"{shown} is no registry of lori: restore it from a copy, or move it away and "
            "run `lori init`"
        )
    if not (len(found) == len(HEAD) and found.isdecimal() and found < HEAD):
        raise IncompatibleStore(
            f"database is at {found}, this lori knows up to {HEAD}: it was written by a newer "
            "lori; upgrade lori"
        )
    if not upgrading:
        raise IncompatibleStore(
            f"database is at {found}, this lori needs {HEAD}: run `lori db upgrade`"
        )


def migrations_folder() -> Path:
    """Alembic's scripts: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "migrations"
    return inside if inside.is_dir() else package.parent / "migrations"


def create(root: Path) -> None:
    """Make `root/registry.db` by Alembic; it appears whole or not at all.

    Raises:
        Conflict: it is there, or another process is at it.
        StorageFailed: the disk refused.
    """
    path, unfinished = root / REGISTRY, root / _UNFINISHED
    with _exclusive(root), storing(path):
        if path.exists():
            raise Conflict(f"{path} is already there: use it, or choose another folder")
        for left in (unfinished, root / f"{_UNFINISHED}-journal"):  # by a killed `create`
            left.unlink(missing_ok=True)
        database = Database.sqlite(unfinished, create=True)
        try:
            with database.migrating() as connection:
                _run_alembic(connection)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        finally:
            database.close()
        unfinished.replace(path)
        sync_folder(root)


def upgrade(root: Path) -> Upgrade:
    """Bring `root/registry.db` to HEAD in one transaction, after a backup beside it.

    Exactly one process migrates; others wait and then find nothing to do.
    Raises:
        NotFound: no registry.db.
        IncompatibleStore: newer than this lori, or not lori's.
        Conflict: another process did not finish in time.
    """
    path = root / REGISTRY
    if not path.is_file():
        raise NotFound(f"there is no {path}: run `lori init`")
    with _exclusive(root), storing(path):
        database = Database.sqlite(path)
        try:
            with database.migrating() as connection:
                before = revision(connection)
                check_revision(before, database.shown, upgrading=True)
                if before is None or before == HEAD:
                    return Upgrade(HEAD, HEAD, None)
                backup = _back_up(path, root / f"registry.{before}.db")
                _run_alembic(connection)
                after = revision(connection)
        finally:
            database.close()
    if after != HEAD:
        raise IncompatibleStore(f"the migrations end at {after}, expected {HEAD}: reinstall lori")
    return Upgrade(before, after, backup)


def _run_alembic(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _back_up(path: Path, target: Path) -> Path:
    """Copy an SQLite database while a migration holds the write lock, so that none slips in."""
    unfinished = target.with_name(f".{target.name}.new")
    unfinished.unlink(missing_ok=True)
    with (
        contextlib.closing(sqlite3.connect(path)) as source,
        contextlib.closing(sqlite3.connect(unfinished)) as copy,
    ):
        copy.execute("PRAGMA synchronous = FULL")
        source.backup(copy)
    unfinished.replace(target)
    sync_folder(target.parent)
    return target


@contextlib.contextmanager
def _exclusive(root: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    with storing(root):
        lock = FileLock(root / "migrate.lock", timeout=4 * BUSY_SECONDS)
        try:
            lock.acquire()
        except Timeout as e:
            raise Conflict(
                f"another process has been creating or upgrading {root} for "
                f"{4 * BUSY_SECONDS:g} s: wait for it, or end it"
            ) from e
    try:
        yield
    finally:
        lock.release()
