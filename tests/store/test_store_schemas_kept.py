"""A small database of every schema there ever was is kept, and becomes one of today."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from lori_manager.store import database
from lori_manager.store.store import Store
from lori_manager.store.tables import metadata

SCHEMAS = Path(__file__).parent / "schemas"
KEPT = sorted(path.stem for path in SCHEMAS.glob("*.sql"))
# What a later migration makes anew, by the revision that did; tests of their own hold these.
MADE_ANEW = {"0001": {"tasks", "scores", "alias_moves"}}


def restore(root: Path, revision: str) -> sqlite3.Connection:
    root.mkdir()
    with sqlite3.connect(root / "registry.db") as file:
        file.executescript((SCHEMAS / f"{revision}.sql").read_text())
    file.close()
    copy = sqlite3.connect(":memory:")
    copy.executescript((SCHEMAS / f"{revision}.sql").read_text())
    return copy


def tables(connection: sqlite3.Connection) -> set[str]:
    query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name <> 'alembic_version'"
    return {name for (name,) in connection.execute(query)}


def triggers(connection: sqlite3.Connection) -> set[str]:
    query = "SELECT sql FROM sqlite_master WHERE type = 'trigger'"
    return {sql for (sql,) in connection.execute(query)}


def test_a_database_of_every_earlier_schema_is_kept() -> None:
    config = Config()
    config.set_main_option("script_location", str(database.migrations_folder()))
    every = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    assert set(KEPT) == every - {database.HEAD}, "run tests/store/keep_schema.py; see there"


@pytest.mark.parametrize("revision", KEPT)
def test_an_old_database_becomes_one_of_today_with_all_its_rows(
    tmp_path: Path, revision: str
) -> None:
    old = restore(tmp_path / "old", revision)
    done = database.upgrade(tmp_path / "old")
    assert (done.before, done.after) == (revision, database.HEAD)
    Store.create(tmp_path / "new").close()
    fresh = sqlite3.connect(tmp_path / "new" / "registry.db")
    upgraded = sqlite3.connect(tmp_path / "old" / "registry.db")
    assert tables(upgraded) == tables(fresh)
    assert triggers(upgraded) == triggers(fresh)
    for table in tables(old) - MADE_ANEW.get(revision, set()):
        cursor = old.execute(f"SELECT * FROM {table}")
        own = ", ".join(f'"{column[0]}"' for column in cursor.description)
        assert sorted(upgraded.execute(f"SELECT {own} FROM {table}")) == sorted(cursor)
    with Store.open(tmp_path / "old") as store:
        with store._db.read() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, metadata) == []
        assert {f.kind for f in store.verify()} == {"missing"}  # files are not kept here
        assert len(store.adapters()) >= 4
        assert len(store.scores()) >= 7
        assert store.lines()
        assert store.journal()
    # the backup is the old one, row for row
    assert done.backup is not None
    backup = sqlite3.connect(done.backup)
    assert list(backup.iterdump()) == list(old.iterdump())
    for connection in (old, fresh, upgraded, backup):
        connection.close()
