from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import store_builders as build

from lori_manager.store import database
from lori_manager.store.store import Store


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a base and nothing else, for tests to copy."""
    root = tmp_path_factory.mktemp("new") / ".lori"
    with Store.create(root) as store:
        store.set_base(build.base())
    return root


@pytest.fixture
def store(new_store: Path, tmp_path: Path) -> Iterator[Store]:
    shutil.copytree(new_store, tmp_path / ".lori")
    with Store.open(tmp_path / ".lori") as store:
        yield store


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
        "    with op.batch_alter_table('lines', recreate='always') as lines:\n"
        "        lines.add_column(sa.Column('colour', sa.Text()))\n"
    )
    monkeypatch.setattr(database, "migrations_folder", lambda: folder)
    return folder
