from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import store_builders as build

from lori_manager.store import database
from lori_manager.store.postgres import Postgres
from lori_manager.store.store import Store


class Files:
    """Stores on SQLite."""

    def __init__(self, folder: Path) -> None:
        self._new = folder / "new" / ".lori"
        with self.make(self._new) as store:
            store.set_base(build.base())

    def make(self, root: Path) -> Store:
        """One with nothing in it."""
        return Store.create(root)

    def backend(self) -> Postgres | None:
        """What to make one on; None for a file."""
        return None

    def new(self, root: Path) -> None:
        """One with a base and nothing else; quicker than to make it."""
        shutil.copytree(self._new, root)

    def copy(self, store: Store, root: Path) -> None:
        shutil.copytree(store.root, root)

    def tidy(self) -> None:
        """Between tests."""


class Servers(Files):
    """Stores on PostgreSQL, each in a database of its own."""

    def __init__(self, folder: Path, server: Any) -> None:
        self.server = server
        self._made: list[str] = []
        super().__init__(folder)
        self._template, self._made = self._made[0], []

    def backend(self) -> Postgres:
        """An empty database."""
        return self._at(self.server.database())

    def make(self, root: Path) -> Store:
        return Store.create(root, self.backend())

    def new(self, root: Path) -> None:
        self._duplicate(self._new, self._template, root)

    def copy(self, store: Store, root: Path) -> None:
        store.close()  # a template must have no connections
        self._duplicate(store.root, store._db.backend.subject, root)

    def _at(self, name: str) -> Postgres:
        self._made.append(name)
        return Postgres.at(self.server.url(name))

    def _duplicate(self, folder: Path, name: str, root: Path) -> None:
        shutil.copytree(folder, root)
        path = root / "database.json"
        url = self._at(self.server.database(name)).shown
        path.write_text(json.dumps(json.loads(path.read_text()) | {"url": url}))

    def tidy(self) -> None:
        while self._made:
            self.server.drop(self._made.pop())


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory, postgres_server: Any) -> Servers:
    return Servers(tmp_path_factory.mktemp("servers"), postgres_server)


@pytest.fixture(params=["sqlite", "postgresql"])
def stores(request: pytest.FixtureRequest) -> Iterator[Files]:
    """Every kind of database: what a store promises holds on each."""
    name = {"sqlite": "files", "postgresql": "servers"}[request.param]
    kind: Files = request.getfixturevalue(name)
    yield kind
    kind.tidy()


@pytest.fixture
def store(stores: Files, tmp_path: Path) -> Iterator[Store]:
    stores.new(tmp_path / ".lori")
    with Store.open(tmp_path / ".lori") as store:
        yield store


@pytest.fixture
def file_store(files: Files, tmp_path: Path) -> Iterator[Store]:
    """On SQLite, for what is about its file."""
    files.new(tmp_path / ".lori")
    with Store.open(tmp_path / ".lori") as store:
        yield store


@pytest.fixture
def served_store(servers: Servers, tmp_path: Path) -> Iterator[Store]:
    """On PostgreSQL, for what is about the server."""
    servers.new(tmp_path / ".lori")
    with Store.open(tmp_path / ".lori") as store:
        yield store
    servers.tidy()


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Starts a function of `store_builders` in another process; none outlives the test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lori_manager.store.store", "numpy"])
    started = []

    def run(target: Callable[..., None], *args: object) -> Any:
        process = context.Process(target=target, args=args)
        process.start()
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.join()
        process.close()


@pytest.fixture
def next_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The migrations of a later lori: one more, which rebuilds a table that others point at."""
    folder = tmp_path / "migrations"
    shutil.copytree(
        database.migrations_folder(), folder, ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "versions" / f"{build.NEXT}_colour.py").write_text(
        "import sqlalchemy as sa\n"
        "from alembic import op\n"
        f"revision, down_revision = '{build.NEXT}', '{build.HEAD}'\n"
        "def upgrade():\n"
        "    rebuilt = 'always' if op.get_bind().dialect.name == 'sqlite' else 'never'\n"
        "    with op.batch_alter_table('lines', recreate=rebuilt) as lines:\n"
        "        lines.add_column(sa.Column('colour', sa.Text()))\n"
    )
    monkeypatch.setattr(database, "migrations_folder", lambda: folder)
    return folder
