"""PostgreSQL: its connections, locks, transactions and failures.

A writer holds a lock on the table of the schema's revision that keeps other writers out and lets
readers pass; a migration holds one that keeps both out. So writers queue, nothing has to be tried
again, and whoever waits sees what those before have committed: a transaction's one state is taken
after its lock.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import URL, Connection, Engine, create_engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from lori_manager.errors import (
    Conflict,
    DamagedObject,
    IncompatibleStore,
    InvalidInput,
    LoriError,
    StorageFailed,
)
from lori_manager.extras import load_extra
from lori_manager.store.files import sync_folder

if TYPE_CHECKING:
    from psycopg import Connection as Driver

BUSY_SECONDS = 30.0
LOST_SECONDS = 120.0  # after which the server ends a writer of which nothing is heard
OLDEST = 13  # the first version that has all that is used here and is still cared for
_DRIVERS = ("postgresql", "postgres", "postgresql+psycopg")
_SECRETS = ("password", "sslpassword", "oauth_client_secret")
_DEFAULTS = {  # for a network that swallows packets; the URL may say otherwise
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "application_name": "lori",
}
_REVISION = "alembic_version"
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


@dataclass(frozen=True)
class Postgres:
    """The database of that URL.

    Attributes:
        url: without any password; what is kept and shown.
        password: for this process alone. None leaves it to PGPASSWORD and ~/.pgpass.
    """

    url: URL
    password: str | None = field(default=None, repr=False, compare=False)

    @classmethod
    def at(cls, text: str) -> Postgres:
        """What a URL means: `postgresql://USER@HOST:PORT/DATABASE?OPTION=VALUE`.

        Options are libpq's, such as `sslmode=verify-full` or `options=-csearch_path%3Dteam`.
        Raises:
            InvalidInput: no such URL. The message repeats nothing of it, for it may hold a
                password.
        """
        try:
            url = make_url(text)
        except (ArgumentError, ValueError):
            raise InvalidInput(_SHAPE) from None
        if url.drivername not in _DRIVERS or not url.database or "@" in (url.host or ""):
            raise InvalidInput(_SHAPE)
        password = None if url.password is None else str(url.password)
        given = url.query.get("password")
        if isinstance(given, str):
            password = password or given
        if set(_SECRETS[1:]) & set(url.query):
            raise InvalidInput(
                f"the URL must not hold {' or '.join(_SECRETS[1:])}: name them in libpq's service "
                "file, and that as ?service=NAME"
            )
        plain = URL.create(
            "postgresql", url.username, None, url.host, url.port, url.database,
            {name: value for name, value in url.query.items() if name not in _SECRETS},
        )  # fmt: skip
        return cls(plain, password)

    @property
    def shown(self) -> str:
        """The URL, which has no password."""
        return self.url.render_as_string(hide_password=True)

    @property
    def subject(self) -> str:
        """The database's name."""
        return str(self.url.database)

    def engine(self) -> Engine:
        """Keeps a connection for the next transaction: making one takes several round trips."""
        load_extra("psycopg", "postgres", "a PostgreSQL database")
        arguments: dict[str, object] = {
            name: value for name, value in _DEFAULTS.items() if name not in self.url.query
        }
        arguments["prepare_threshold"] = None  # poolers between hand statements to others
        if self.password is not None:
            arguments["password"] = self.password
        engine = create_engine(
            self.url.set(drivername="postgresql+psycopg"),
            connect_args=arguments,
            pool_size=1,
            max_overflow=-1,  # as many more as threads ask for; they are not kept
            pool_pre_ping=True,  # what a server or a firewall closed meanwhile is made anew
        )
        _engines.add(engine)
        return engine

    def begin(self, connection: Connection, *, write: bool) -> None:
        """Wait for the lock, then fix the state that is seen."""
        if write:
            connection.exec_driver_sql(
                "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ WRITE; "
                f"{_patience(BUSY_SECONDS)}; "
                f"SET LOCAL idle_in_transaction_session_timeout = {_ms(LOST_SECONDS)}; "
                f"LOCK TABLE {_REVISION} IN SHARE ROW EXCLUSIVE MODE"
            )
            connection.exec_driver_sql(_LASTING)
        else:
            connection.exec_driver_sql(
                "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY; "
                f"{_patience(BUSY_SECONDS)}; "
                f"LOCK TABLE {_REVISION} IN ACCESS SHARE MODE"
            )

    def begin_migrating(self, connection: Connection) -> None:
        """One at a time, by an advisory lock; writers are kept out from now on, readers later.

        Raises:
            InvalidInput: the URL names a schema that is not there.
        """
        connection.exec_driver_sql(
            f"SET TRANSACTION ISOLATION LEVEL READ COMMITTED READ WRITE; "
            f"{_patience(4 * BUSY_SECONDS)}; SET LOCAL statement_timeout = 0; "
            "SET LOCAL idle_in_transaction_session_timeout = 0"
        )
        schema = connection.exec_driver_sql("SELECT current_schema()").scalar_one()
        if schema is None:
            raise InvalidInput(
                f"{self.shown} names a schema that is not there: make it with CREATE SCHEMA, or "
                "correct the URL's search_path"
            )
        connection.exec_driver_sql(
            "SELECT pg_advisory_xact_lock(hashtextextended('lori migrates ' || current_schema(), "
            "0))"
        )
        connection.exec_driver_sql(_LASTING)
        if self.has_schema(connection):
            connection.exec_driver_sql(f"LOCK TABLE {_REVISION} IN SHARE ROW EXCLUSIVE MODE")

    def keep_readers_out(self, connection: Connection) -> None:
        """They wait until the migration is done, and never see half of it."""
        if self.has_schema(connection):
            connection.exec_driver_sql(f"LOCK TABLE {_REVISION} IN ACCESS EXCLUSIVE MODE")

    def has_schema(self, connection: Connection) -> bool:
        """Whether Alembic has worked here."""
        query = f"SELECT to_regclass('{_REVISION}') IS NOT NULL"  # noqa: S608 - a constant
        return bool(connection.exec_driver_sql(query).scalar_one())

    def check(self, connection: Connection) -> None:
        """Refuse a server that is too old, or a database that cannot hold every text."""
        info = driver(connection).info
        if info.server_version < OLDEST * 10_000:
            raise IncompatibleStore(
                f"{self.shown} is on PostgreSQL {info.server_version // 10_000}: lori needs "
                f"{OLDEST} or newer"
            )
        encoding = info.parameter_status("server_encoding")
        if encoding != "UTF8":
            raise IncompatibleStore(
                f"{self.shown} has the encoding {encoding}, which cannot hold every text: make a "
                "database with ENCODING 'UTF8'"
            )

    def no_schema(self, error: DBAPIError) -> bool:
        """What the server says of a table that is not there."""
        return _code(error) == "42P01"

    def astray(self, connection: Connection) -> Iterator[str]:
        """None: foreign keys hold at every moment."""
        yield from ()

    def faults(self, connection: Connection) -> Iterator[str]:
        """Pages whose checksum was wrong when they were read, and indexes that are not whole."""
        failures = connection.exec_driver_sql(
            "SELECT checksum_failures FROM pg_stat_database WHERE datname = current_database()"
        ).scalar_one_or_none()
        if failures:
            yield f"the server has read {failures} page(s) with a wrong checksum"
        broken = connection.exec_driver_sql(
            "SELECT i.indexrelid::regclass::text FROM pg_index i JOIN pg_class c "
            "ON c.oid = i.indexrelid WHERE c.relnamespace = current_schema()::regnamespace "
            "AND NOT (i.indisvalid AND i.indisready)"
        )
        for (name,) in broken:
            yield f"the index {name} is not whole"

    def translate(self, error: DBAPIError) -> LoriError:
        """By SQLSTATE; while connecting there is none, and libpq's words must do."""
        code, reason = _code(error), _reason(error)
        if code is None:
            return self._unconnected(error, reason)
        shown = self.shown
        if code in _TOLD:
            kind, told = _TOLD[code]
            return kind(told.format(shown=shown, reason=reason, seconds=f"{BUSY_SECONDS:g}"))
        family = code[:2]
        if family == "23" or code == "P0001":  # P0001: a trigger's own refusal
            return Conflict(
                f"{shown} refused the change ({reason}): another process may have made it "
                "already; run the command again"
            )
        if family in ("08", "57"):
            return StorageFailed(f"{shown} ended the connection ({reason}): {_RETRY}")
        if family == "53":
            return StorageFailed(f"{shown} has run out of something ({reason}): free some, retry")
        if family == "XX":
            return DamagedObject(f"{shown} is damaged ({reason}): restore it from a copy")
        if family == "42":
            return IncompatibleStore(
                f"{shown} lacks what this lori expects ({reason}): it was altered by another "
                "program; restore it from a copy"
            )
        if family == "28":
            return StorageFailed(f"{shown} refused the login ({reason}): {_LOGIN}")
        return StorageFailed(f"{shown} failed: {reason}")

    def _unconnected(self, error: DBAPIError, reason: str) -> LoriError:
        shown = self.shown
        if isinstance(error.orig, ValueError) or "NUL" in reason:
            return InvalidInput(f"PostgreSQL cannot keep this text ({reason}): use other text")
        if re.search(r"password|authentication|pg_hba|role .* does not exist", reason):
            return StorageFailed(f"{shown} refused the login ({reason}): {_LOGIN}")
        if re.search(r"database .* does not exist", reason):
            return StorageFailed(
                f"{shown} is not there ({reason}): make it with `createdb`, or correct the URL"
            )
        if "too many clients" in reason or "connection slots" in reason:
            return StorageFailed(f"{shown} has no connection left ({reason}): wait, retry")
        if error.connection_invalidated or "server closed the connection" in reason:
            return StorageFailed(f"{shown} ended the connection ({reason}): {_RETRY}")
        return StorageFailed(
            f"{shown} cannot be reached ({reason}): check the URL, the network and whether the "
            "server runs"
        )

    def back_up(self, folder: Path, revision: str) -> tuple[Path | None, str]:
        """Dump the schema's tables; while a migration holds the write lock none changes.

        Returns:
            The dump, or None and why there is none: no pg_dump, or one older than the server.
        Raises:
            StorageFailed: pg_dump failed.
        """
        program = shutil.which("pg_dump")
        if program is None:
            return None, "no pg_dump is installed here"
        server, schema = self._server()
        own = _run([program, "--version"], os.environ).stdout
        found = re.search(r"(\d+)(\.\d+)?", own)
        if found is None or int(found[1]) < server:
            return None, f"pg_dump here is {own.strip() or 'unknown'}, the server is {server}"
        target = folder / f"registry.{revision}.dump"
        unfinished = target.with_name(f".{target.name}.new")
        unfinished.unlink(missing_ok=True)
        unfinished.touch(0o600)
        environment = dict(os.environ)
        if self.password is not None:
            environment["PGPASSWORD"] = self.password
        command = [program, "--format=custom", "--no-owner", "--no-password",
                   f"--schema={_pattern(schema)}", f"--file={unfinished}", f"--dbname={self.shown}"]  # fmt: skip
        done = _run(command, environment)
        if done.returncode:
            unfinished.unlink(missing_ok=True)
            reason = _line(done.stderr) or f"it ended with {done.returncode}"
            raise StorageFailed(f"pg_dump of {self.shown} failed ({reason}): nothing was changed")
        with unfinished.open("rb") as f:
            os.fsync(f.fileno())
        unfinished.replace(target)
        sync_folder(folder)
        return target, ""

    def _server(self) -> tuple[int, str]:
        """The server's major version, and the schema."""
        engine = self.engine()
        try:
            with engine.connect() as connection:
                schema = connection.exec_driver_sql("SELECT current_schema()").scalar_one()
                return driver(connection).info.server_version // 10_000, str(schema)
        finally:
            engine.dispose()


_SHAPE = (
    "expected postgresql://USER@HOST:PORT/DATABASE (`@`, `:`, `/` and `%` of a password as %40, "
    "%3A, %2F, %25; better, leave it to PGPASSWORD or ~/.pgpass)"
)
_RETRY = "what was told as done is there; look what is, and retry"
_LOGIN = "set PGPASSWORD, or add a line to ~/.pgpass; the URL's password is never kept"
_TOLD: dict[str, tuple[type[LoriError], str]] = {
    "55P03": (
        StorageFailed,
        "{shown} stayed locked by another process for {seconds} s: wait for it, retry",
    ),
    "40001": (
        StorageFailed,
        "{shown} was changed by another program at the same time ({reason}): run it again",
    ),
    "40P01": (
        StorageFailed,
        "{shown} was locked by another program in another order ({reason}): run it again",
    ),
    "53100": (
        StorageFailed,
        "no space left for {shown}: free some (what was stored before is untouched), retry",
    ),
    "53300": (StorageFailed, "{shown} has no connection left ({reason}): wait, retry"),
    "25006": (
        StorageFailed,
        "{shown} cannot be written ({reason}): use the server that takes writes",
    ),
    "25P03": (
        StorageFailed,
        "{shown} ended a transaction that stood still ({reason}): nothing of it was kept, retry",
    ),
    "42501": (
        StorageFailed,
        "{shown} refused this user ({reason}): its owner must grant the right",
    ),
    "42P07": (
        Conflict,
        "{shown} has tables that are not this store's ({reason}): use an empty database, or a "
        "schema of its own",
    ),
    "22003": (InvalidInput, "a number is too large for the database: use a smaller one"),
    "22021": (InvalidInput, "PostgreSQL cannot keep this text ({reason}): use other text"),
    "22P05": (InvalidInput, "PostgreSQL cannot keep this text ({reason}): use other text"),
    "3D000": (
        StorageFailed,
        "{shown} is not there ({reason}): make it with `createdb`, or correct the URL",
    ),
}
# Whatever the server's default is, a commit that was told survives a crash of the server.
_LASTING = (
    "SELECT set_config('synchronous_commit', 'on', true) "
    "WHERE current_setting('synchronous_commit') = 'off'"
)


def driver(connection: Connection) -> Driver[tuple[object, ...]]:
    """The driver's own connection."""
    from psycopg import Connection as Driver

    raw = connection.connection.driver_connection
    if not isinstance(raw, Driver):
        raise TypeError(f"expected a PostgreSQL connection, got {type(raw).__name__}")
    return raw


def _patience(seconds: float) -> str:
    return f"SET LOCAL lock_timeout = {_ms(seconds)}"


def _ms(seconds: float) -> int:
    return round(1000 * seconds)


def _code(error: DBAPIError) -> str | None:
    return getattr(error.orig, "sqlstate", None)


def _reason(error: DBAPIError) -> str:
    """The server's sentence alone: what it says below may quote rows."""
    told = getattr(getattr(error.orig, "diag", None), "message_primary", None)
    return _line(told or str(error.orig))


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


def _pattern(schema: str) -> str:
    """A schema's name as pg_dump wants it: quoted, for else it is a pattern."""
    return '"' + schema.replace('"', '""') + '"'


def _run(
    command: list[str], environment: os._Environ[str] | dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - pg_dump, without a shell
        command, env=environment, capture_output=True, text=True, check=False, errors="replace"
    )


def _forget_connections() -> None:
    """A forked process must not speak on its parent's connections, nor close them."""
    for engine in list(_engines):
        engine.dispose(close=False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_connections)
