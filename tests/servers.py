"""A PostgreSQL server of the tests' own, from the system's package, on a private socket."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PASSWORD = "s3cr@t/:%"
LOCKED = "locked"  # the database that asks for a password, over TCP alone
_BINARIES = "/usr/lib/postgresql"
_CONFIGURATION = """
listen_addresses = '127.0.0.1'
unix_socket_directories = '{folder}'
port = {port}
max_connections = 200
shared_buffers = 32MB
"""
_HBA = f"""
local all all trust
host {LOCKED} all 127.0.0.1/32 scram-sha-256
"""


def missing() -> str | None:
    """What is not here that a server needs."""
    if _binaries() is None:
        return f"no initdb in {_BINARIES}/*/bin: apt-get install postgresql"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "no psycopg (extra dev)"
    if os.geteuid() == 0 and _user() is None:
        return "PostgreSQL refuses root, and there is no user postgres or nobody"
    return None


class Server:
    """Serves until it is closed; the superuser is `lori`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = _free_port()
        self._numbers = itertools.count()
        _own(folder)
        self._run("initdb", "--username=lori", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync",
                  f"--pgdata={folder / 'data'}")  # fmt: skip
        with (folder / "data" / "postgresql.conf").open("a") as f:
            f.write(_CONFIGURATION.format(folder=folder, port=self.port))
        (folder / "data" / "pg_hba.conf").write_text(_HBA)
        self.start()
        quoted = PASSWORD.replace("'", "''")
        self.sql(f"CREATE ROLE guarded LOGIN PASSWORD '{quoted}'")
        self.sql(f"CREATE DATABASE {LOCKED} OWNER guarded")

    def start(self) -> None:
        self._run("pg_ctl", "start", "--wait", f"--pgdata={self.folder / 'data'}",
                  f"--log={self.folder / 'log'}")  # fmt: skip

    def stop(self, mode: str = "fast") -> None:
        """As `pg_ctl` does it; "immediate" is a crash."""
        self._run("pg_ctl", "stop", "--wait", f"--mode={mode}", f"--pgdata={self.folder / 'data'}")

    def url(self, database: str) -> str:
        return f"postgresql://lori@/{database}?host={self.folder}&port={self.port}"

    def locked_url(self, secret: str = "", user: str = "guarded", database: str = LOCKED) -> str:
        """Over TCP, where a password is asked for."""
        login = f"{user}:{secret}" if secret else user
        return f"postgresql://{login}@127.0.0.1:{self.port}/{database}"

    def connect(self, database: str = "postgres") -> Any:
        import psycopg

        return psycopg.connect(
            host=str(self.folder), port=self.port, user="lori", dbname=database, autocommit=True
        )

    def sql(self, statement: str, database: str = "postgres") -> list[Any]:
        with self.connect(database) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def database(self, template: str = "template0") -> str:
        """A new database, like the template; its name."""
        name = f"d{next(self._numbers)}"
        self.sql(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def drop(self, name: str) -> None:
        self.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def _run(self, program: str, *arguments: str) -> None:
        binaries = _binaries()
        assert binaries is not None
        user = _user() if os.geteuid() == 0 else None
        done = subprocess.run(
            [str(binaries / program), *arguments],
            cwd=self.folder, user=user, group=None if user is None else pwd.getpwnam(user).pw_gid,
            extra_groups=None if user is None else [],
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            check=False, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def serving(where: str | None = None) -> Iterator[Server]:
    """A server in memory where there is such a folder, for fsync costs nothing there.

    Args:
        where: a folder to lie in instead.
    """
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="lori-pg-", dir=where or memory))
    try:
        server = Server(folder)
        try:
            yield server
        finally:
            server.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _binaries() -> Path | None:
    """The newest version's programs."""
    found = [path.parent for path in Path(_BINARIES).glob("*/bin/initdb")]
    return max(found, key=lambda path: float(path.parent.name), default=None)


def _user() -> str | None:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return None


def _own(folder: Path) -> None:
    folder.chmod(0o700)
    if os.geteuid() == 0:
        shutil.chown(folder, _user())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
