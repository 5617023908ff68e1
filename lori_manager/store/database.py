"""The registry's transactions and its schema's revision, whatever database it lies in.

Only Alembic makes or changes the schema, in exactly one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, StatementError

from lori_manager.errors import (
    Conflict,
    DamagedObject,
    IncompatibleStore,
    InvalidInput,
)
from lori_manager.store import databases, homes, places
from lori_manager.store.backend import Backend
from lori_manager.store.databases import REGISTRY
from lori_manager.store.files import PRIVATE, storing, sync_folder
from lori_manager.store.postgres import Postgres
from lori_manager.store.sqlite import BUSY_SECONDS, SQLite, discard

HEAD = "0009"  # the schema that this lori reads and writes
UNFINISHED = ".registry.db.new"


@dataclass(frozen=True)
class Upgrade:
    """What `upgrade` did; `before` equals `after` where there was nothing to do.

    Attributes:
        backup: a copy of the database before; None without one.
        unsaved: why there is none, where one was wanted.
    """

    before: str
    after: str
    backup: Path | None
    unsaved: str = ""


class Database:
    """Opens short transactions and turns what goes wrong in them into LoriErrors.

    None stays open while a model trains, and no connection is carried into a forked process.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._engine = backend.engine()

    @classmethod
    def sqlite(cls, path: Path, *, create: bool = False) -> Database:
        """The database in that file, which must be there unless `create`."""
        return cls(SQLite(path, create))

    @property
    def shown(self) -> str:
        """What messages call it."""
        return self.backend.shown

    def close(self) -> None:
        """Release what the engine holds."""
        self._engine.dispose()

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database and changes nothing."""
        with self._transaction(write=False) as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """The only writing transaction of this moment; commits unless an error leaves it."""
        with self._transaction(write=True) as connection:
            yield connection

    @contextlib.contextmanager
    def migrating(self) -> Iterator[Connection]:
        """Like `write`, at any revision, and free to rebuild tables that others point at."""
        with self._translated(first=True), self._engine.connect() as connection, connection.begin():
            self.backend.check(connection)
            self.backend.begin_migrating(connection)
            yield connection
            if next(self.backend.astray(connection), None) is not None:
                raise DamagedObject(
                    f"{self.shown} has rows that point nowhere, so it was left as it was: "
                    "restore it from a copy"
                )

    @contextlib.contextmanager
    def _transaction(self, *, write: bool) -> Iterator[Connection]:
        with self._translated(), self._engine.connect() as connection, connection.begin():
            revision = self._begin(connection, write=write)
            self.backend.check(connection)
            check_revision(revision, self.shown)
            yield connection

    def _begin(self, connection: Connection, *, write: bool) -> str | None:
        """Begin, and say at what revision; None where no Alembic worked."""
        try:
            self.backend.begin(connection, write=write)
            return _noted(connection)
        except DBAPIError as e:
            if self.backend.no_schema(e):
                return None
            raise

    @contextlib.contextmanager
    def _translated(self, *, first: bool = False) -> Iterator[None]:
        """Tell the database's errors as lori's.

        Args:
            first: what went wrong at first, where more did in tidying up after it.
        """
        try:
            yield
        except DBAPIError as e:
            raise self.backend.translate(_first(e) if first else e) from e
        except StatementError as e:  # a value that its column type refused
            if isinstance(e.orig, (TypeError, ValueError)):
                raise e.orig from e
            raise
        except UnicodeEncodeError as e:
            raise InvalidInput(f"{e.object!r} is not valid Unicode: use other text") from e
        except OverflowError as e:
            raise InvalidInput("a number is too large for the database: use a smaller one") from e

    def noted_revision(self) -> str | None:
        """`revision`, whatever it is."""
        with self._translated(), self._engine.connect() as connection, connection.begin():
            return self._begin(connection, write=False)

    def revision(self, connection: Connection) -> str | None:
        """The schema revision that Alembic noted; None where it never worked."""
        return _noted(connection) if self.backend.has_schema(connection) else None


def _first(error: DBAPIError) -> DBAPIError:
    """The database's error that others followed from, which Alembic's batches let hide it."""
    found, before = error, error.__context__
    while before is not None:
        found = before if isinstance(before, DBAPIError) else found
        before = before.__context__
    return found


def _noted(connection: Connection) -> str | None:
    noted = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars()
    return "+".join(noted.all()) or None


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
    path, unfinished = root / REGISTRY, root / UNFINISHED
    with _exclusive(root), storing(path):
        if path.exists():
            raise Conflict(f"{path} is already there: use it, or choose another folder")
        discard(unfinished)  # of a killed `create`
        unfinished.touch(PRIVATE)
        database = Database.sqlite(unfinished, create=True)
        try:
            with database.migrating() as connection:
                _run_alembic(connection)
        except BaseException:
            discard(unfinished)
            raise
        finally:
            database.close()
        unfinished.replace(path)
        sync_folder(root)


def reach(backend: Backend) -> None:
    """Whether the database answers, for a clear error before long work."""
    database = Database(backend)
    try:
        database.noted_revision()
    finally:
        database.close()


def create_served(root: Path, backend: Postgres) -> None:
    """Make the schema in a server's empty database, whose files `root` will hold.

    A database whose files are in a bucket is joined by any folder.

    Exactly one process does, on whatever machine. What a killed one has begun is gone on with.
    Raises:
        Conflict: `root` is a store, the database is another folder's, or has other tables.
        IncompatibleStore: it holds another lori's schema.
        StorageFailed: no server, no such database, no permission.
    """
    database = Database(backend)
    try:
        with _exclusive(root):
            claimed = databases.claim(root, backend)
            with database.migrating() as connection:
                new = not backend.has_schema(connection)
                if new:
                    _run_alembic(connection)
                check_revision(database.revision(connection), database.shown)
                if new or places.one(connection) is None:  # in a bucket all folders have the files
                    homes.take(connection, claimed.folder, databases.place(root))
            databases.settle(root)
    finally:
        database.close()


def upgrade(root: Path) -> Upgrade:
    """Bring the store's database to HEAD in one transaction, after a backup in `root`.

    Exactly one process migrates; others wait and then find nothing to do.
    Raises:
        NotFound: no store.
        IncompatibleStore: newer than this lori, or not lori's.
        Conflict: another process did not finish in time.
    """
    backend = databases.backend(root)
    with _exclusive(root), storing(root):
        database = Database(backend)
        try:
            with database.migrating() as connection:
                before = database.revision(connection)
                check_revision(before, database.shown, upgrading=True)
                if before is None or before == HEAD:
                    return Upgrade(HEAD, HEAD, None)
                backup, unsaved = backend.back_up(root, before)
                backend.keep_readers_out(connection)
                _run_alembic(connection)
                after = database.revision(connection)
        finally:
            database.close()
    if after != HEAD:
        raise IncompatibleStore(f"the migrations end at {after}, expected {HEAD}: reinstall lori")
    return Upgrade(before, after, backup, unsaved)


def _run_alembic(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


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
