from __future__ import annotations

import contextlib
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import store_builders as build
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import CheckConstraint, inspect
from store_builders import HEAD, NEXT

from lori_manager.errors import Conflict, DamagedObject, IncompatibleStore, NotFound
from lori_manager.store import database, sqlite
from lori_manager.store.store import Store
from lori_manager.store.tables import metadata


def test_head_is_the_last_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(database.migrations_folder()))
    assert ScriptDirectory.from_config(config).get_heads() == [database.HEAD]


def test_the_tables_in_code_are_the_tables_that_migrations_make(store: Store) -> None:
    with store._db.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        inspector = inspect(connection)
        for name, table in metadata.tables.items():  # what compare_metadata passes over
            columns = {c["name"]: c["nullable"] for c in inspector.get_columns(name)}
            assert columns == {c.name: c.nullable for c in table.c}
            assert list(columns) == [c.name for c in table.c]
            key = inspector.get_pk_constraint(name)
            assert key["constrained_columns"] == [c.name for c in table.primary_key]
            checks = {(c["name"], c["sqltext"]) for c in inspector.get_check_constraints(name)}
            assert checks == {
                (f"ck_{name}_{c.name}" if "ck_" not in str(c.name) else c.name, str(c.sqltext))
                for c in table.constraints
                if isinstance(c, CheckConstraint)
            }


def test_a_new_store_has_private_folders_and_nothing_half_made(tmp_path: Path) -> None:
    root = tmp_path / "project" / ".lori"
    Store.create(root).close()
    assert sorted(p.name for p in root.iterdir()) == [
        "migrate.lock",
        "objects",
        "registry.db",
        "runs",
    ]
    for folder in (root, root / "objects", root / "runs"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_second_create_is_refused_and_changes_nothing(store: Store, stores: Any) -> None:
    base = store.base()

    def look() -> list[tuple[str, bytes]]:
        return sorted((p.name, p.read_bytes()) for p in store.root.iterdir() if p.is_file())

    before = look()
    with pytest.raises(Conflict, match=r"already there|holds a store already"):
        stores.make(store.root)
    assert look() == before
    assert store.base() == base


def test_what_a_killed_create_left_is_cleared_away(tmp_path: Path) -> None:
    root = tmp_path / ".lori"
    root.mkdir()
    (root / ".registry.db.new").write_bytes(b"half a database")
    (root / ".registry.db.new-journal").write_bytes(b"half a journal")
    with Store.create(root) as store:
        assert store.lines() == []
    assert not list(root.glob(".registry*"))


def test_a_failing_migration_leaves_no_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(database, "_run_alembic", fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            Store.create(tmp_path / ".lori")
    assert [p.name for p in (tmp_path / ".lori").iterdir()] == ["migrate.lock"]
    Store.create(tmp_path / ".lori").close()


def test_a_path_with_odd_characters_is_only_a_path(tmp_path: Path) -> None:
    root = tmp_path / "a b?mode=memory#%41'é" / ".lori"
    Store.create(root).close()
    with Store.open(root) as store:
        store.set_base(build.base())
    assert (root / "registry.db").stat().st_size > 0


def test_a_relative_root_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Store.create(Path(".lori")) as store:
        store.set_base(build.base())
    assert (tmp_path / ".lori" / "registry.db").exists()


def test_nothing_is_opened_or_made_where_no_store_is(tmp_path: Path) -> None:
    for call in (Store.open, database.upgrade):
        with pytest.raises(NotFound, match="lori init"):
            call(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_database_removed_under_an_open_store_is_not_replaced_by_an_empty_one(
    file_store: Store,
) -> None:
    (file_store.root / "registry.db").unlink()
    with pytest.raises(Exception, match="cannot be opened"):
        file_store.lines()
    assert not (file_store.root / "registry.db").exists()


def test_connections_keep_the_promised_settings(file_store: Store) -> None:
    with file_store._db.read() as connection:
        settings = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        ]
        assert sqlite.driver(connection).isolation_level is None
    assert settings == ["delete", 3, 1, 30_000]  # 3 is synchronous=EXTRA


@pytest.mark.parametrize("revision", ["0000", NEXT, "9f3ab2", f"0001+{NEXT}"])
def test_another_schema_is_refused_with_what_to_do(store: Store, revision: str) -> None:
    build.sql(store, "DELETE FROM alembic_version")
    for part in revision.split("+"):
        build.sql(store, f"INSERT INTO alembic_version VALUES ('{part}')")
    if revision == "0000":
        expected = f"database is at 0000, this lori needs {HEAD}: run `lori db upgrade`"
    else:
        expected = "newer lori; upgrade lori"
    with pytest.raises(IncompatibleStore, match=expected):
        Store.open(store.root)
    with pytest.raises(IncompatibleStore, match=expected):  # one that was open before
        store.add_line("main")
    if revision != "0000":
        with pytest.raises(IncompatibleStore, match=expected):
            database.upgrade(store.root)


@pytest.mark.parametrize(
    "content", [b"", b"not a database, " * 1000, b"SQLite format 3\0" + b"x" * 4080]
)
def test_a_file_that_is_no_database_is_told(file_store: Store, content: bytes) -> None:
    path = file_store.root / "registry.db"
    path.write_bytes(content)
    for call in (Store.open, database.upgrade):
        with pytest.raises((DamagedObject, IncompatibleStore), match="restore it from a copy"):
            call(file_store.root)
    assert path.read_bytes() == content


def test_another_programs_database_is_told_and_left_alone(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "registry.db")) as file:
        file.execute("CREATE TABLE cats (name TEXT)")
        for call in (Store.open, database.upgrade):
            with pytest.raises(IncompatibleStore, match="no registry of lori"):
                call(tmp_path)
        assert file.execute("SELECT name FROM sqlite_master").fetchall() == [("cats",)]


def test_a_table_that_someone_dropped_is_no_traceback(store: Store) -> None:
    build.sql(store, "DROP TABLE aliases")
    told = r'no such table: aliases|relation "aliases" does not exist'
    with pytest.raises(IncompatibleStore, match=told):
        store.lines()


def test_upgrade_has_nothing_to_do_at_head(store: Store) -> None:
    assert database.upgrade(store.root) == database.Upgrade(HEAD, HEAD, None)


def test_upgrade_keeps_the_rows(
    store: Store, next_schema: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = store.add_adapter(build.new_adapter(), b"weights")
    monkeypatch.setattr(database, "HEAD", NEXT)
    told = f"at {HEAD}, this lori needs {NEXT}: run `lori db up"
    with pytest.raises(IncompatibleStore, match=told):
        Store.open(store.root)
    done = database.upgrade(store.root)
    assert (done.before, done.after) == (HEAD, NEXT)
    with Store.open(store.root) as upgraded:
        assert upgraded.adapters() == [adapter]
        assert list(upgraded.verify()) == []
    assert build.sql(store, "SELECT colour FROM lines") == [(None,)]
    assert done.backup is not None
    assert done.backup.stat().st_size > 0
    assert done.unsaved == ""


def test_the_backup_of_an_upgrade_is_the_database_before(
    file_store: Store, next_schema: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = file_store.add_adapter(build.new_adapter(), b"weights")
    with monkeypatch.context() as patch:
        patch.setattr(database, "HEAD", NEXT)
        backup = database.upgrade(file_store.root).backup
    assert backup is not None
    shutil.copyfile(backup, file_store.root / "registry.db")
    with Store.open(file_store.root) as restored:
        assert restored.adapters() == [adapter]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("op.drop_table('aliases'); raise RuntimeError('half way')", RuntimeError),
        ("op.execute('DELETE FROM lines')", (DamagedObject, Conflict)),
    ],
)
def test_an_upgrade_that_fails_changes_nothing(
    store: Store,
    next_schema: Path,
    monkeypatch: pytest.MonkeyPatch,
    body: str,
    error: Any,
) -> None:
    adapter = store.add_adapter(build.new_adapter(), b"weights")
    script = next_schema / "versions" / f"{NEXT}_colour.py"
    script.write_text(
        f"from alembic import op\nrevision, down_revision = '{NEXT}', '{HEAD}'\n"
        f"def upgrade():\n    {body}\n"
    )
    with monkeypatch.context() as patch:
        patch.setattr(database, "HEAD", NEXT)
        with pytest.raises(error):
            database.upgrade(store.root)
    assert store.adapters() == [adapter]
    assert store.aliases() == []


def test_eight_first_starts_at_once_make_one_store(
    tmp_path: Path, start: Callable[..., Any], stores: Any
) -> None:
    said = [tmp_path / str(i) for i in range(8)]
    server = stores.backend()
    started = [start(build.create_store, tmp_path / ".lori", server, path) for path in said]
    for process in started:
        process.join()
    results = [path.read_text() for path in said]
    assert sorted(results) == ["conflict"] * 7 + ["created"]


def test_eight_upgrades_at_once_migrate_once(
    store: Store, next_schema: Path, tmp_path: Path, start: Callable[..., Any]
) -> None:
    said = [tmp_path / str(i) for i in range(8)]
    for process in [start(build.upgrade_store, store.root, next_schema, path) for path in said]:
        process.join()
    assert sorted(path.read_text() for path in said) == [f"{HEAD} {NEXT}"] + [f"{NEXT} {NEXT}"] * 7


def test_scripts_inside_an_installed_package_win_over_a_folder_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "lori_manager"
    (package / "store").mkdir(parents=True)
    (tmp_path / "migrations").mkdir()
    monkeypatch.setattr(database, "__file__", str(package / "store" / "database.py"))
    assert database.migrations_folder() == tmp_path / "migrations"
    (package / "migrations").mkdir()
    assert database.migrations_folder() == package / "migrations"


def test_alembics_command_line_finds_a_store(store: Store, tmp_path: Path) -> None:
    (tmp_path / "alembic.ini").write_text(
        f"[alembic]\nscript_location = {database.migrations_folder()}\n"
    )
    command = ["-m", "alembic.config", "-x", f"store={store.root}", "current"]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [HEAD, "(head)"]


def test_opening_and_listing_import_neither_alembic_nor_numpy_nor_torch(store: Store) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from lori_manager.store.store import Store\n"
        "with Store.open(Path(sys.argv[1])) as store: store.lines(), store.tasks()\n"
        "print([m for m in ('alembic', 'numpy', 'torch', 'filelock') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(store.root)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
