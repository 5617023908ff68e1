"""PostgreSQL: its connections, locks, transactions and failures.

A writer holds a lock on the table of the schema's revision that keeps other writers out and lets
readers pass; a migration holds one that keeps both out. So writers queue, nothing has to be tried
again, and whoever waits sees what those before have committed: a transaction's one state is taken
after its lock.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import URL, Connection, Engine, create_engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from lori_manager.errors import IncompatibleStore, InvalidInput, LoriError
from lori_manager.extras import load_extra
from lori_manager.store import postgres_dump, postgres_failures

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
        query = f"SELECT to_regclass('{_REVISION}') IS NOT NULL"
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
        return postgres_failures.code_of(error) == "42P01"

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
        """By SQLSTATE."""
        return postgres_failures.translate(error, self.shown, BUSY_SECONDS)

    def back_up(self, folder: Path, revision: str) -> tuple[Path | None, str]:
        """Dump the schema's tables; while a migration holds the write lock none changes."""
        facts = self.facts()
        return postgres_dump.dump(
            folder / f"registry.{revision}.dump", self.shown, facts.schema, facts.version,
            self.password,
        )  # fmt: skip

    def facts(self) -> ServerFacts:
        """What the server is and how it is set.

        Raises:
            StorageFailed: it cannot be asked.
        """
        engine = self.engine()
        try:
            with engine.connect() as connection:
                info = driver(connection).info
                row = connection.exec_driver_sql(_FACTS).one()
                remote = bool(info.host) and not info.host.startswith("/")
                return ServerFacts(
                    version=info.server_version // 10_000,
                    number=row.number,
                    schema=str(row.schema),
                    lasting=row.fsync == row.full_page_writes == "on",
                    synchronous_commit=row.synchronous_commit,
                    checksums=row.data_checksums == "on",
                    standby=row.standby,
                    bare=remote and not row.ssl,
                    now=row.now,
                )
        except DBAPIError as e:
            raise self.translate(e) from e
        finally:
            engine.dispose()


@dataclass(frozen=True)
class ServerFacts:
    """What `Postgres.facts` finds.

    Attributes:
        version, number: the major one; in full, as the server says it.
        schema: the tables'.
        lasting: fsync and full_page_writes are on.
        synchronous_commit: as set for this user and database.
        checksums: of pages.
        standby: it takes no writes.
        bare: what is sent passes a network unencrypted.
        now: its clock.
    """

    version: int
    number: str
    schema: str
    lasting: bool
    synchronous_commit: str
    checksums: bool
    standby: bool
    bare: bool
    now: datetime


_FACTS = """
SELECT current_schema() AS schema, current_setting('server_version') AS number,
    current_setting('fsync') AS fsync, current_setting('full_page_writes') AS full_page_writes,
    current_setting('synchronous_commit') AS synchronous_commit,
    current_setting('data_checksums') AS data_checksums, pg_is_in_recovery() AS standby,
    COALESCE((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), false) AS ssl,
    clock_timestamp() AS now
"""
_SHAPE = (
    "expected postgresql://USER@HOST:PORT/DATABASE (`@`, `:`, `/` and `%` of a password as %40, "
    "%3A, %2F, %25; better, leave it to PGPASSWORD or ~/.pgpass)"
)
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


def _forget_connections() -> None:
    """A forked process must not speak on its parent's connections, nor close them."""
    for engine in list(_engines):
        engine.dispose(close=False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_connections)
