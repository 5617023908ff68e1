"""PostgreSQL alone: URLs and passwords, locks, upgrades, servers that fail."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import alembic.command
import pytest
import servers as pg
import store_builders as build
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from store_builders import HEAD, NEXT

from lori_manager.errors import (
    Conflict,
    IncompatibleStore,
    InvalidInput,
    LoriError,
    NotFound,
    StorageFailed,
)
from lori_manager.store import database, postgres, postgres_dump
from lori_manager.store.database import Database
from lori_manager.store.postgres import Postgres
from lori_manager.store.store import Store
from lori_manager.store.tables import metadata

FIRST = "0007"  # the schema with which servers came


@pytest.fixture(autouse=True)
def no_password(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "none"))


def revision(at: Postgres) -> str | None:
    reached = Database(at)
    try:
        return reached.noted_revision()
    finally:
        reached.close()


def everything_below(folder: Path) -> str:
    return "".join(
        path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file()
    )


@pytest.fixture
def stores_at(
    servers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Path]]:
    """Makes the store of an earlier schema."""

    def make(schema: str) -> Path:
        with monkeypatch.context() as patch:
            upgrade = alembic.command.upgrade
            patch.setattr(alembic.command, "upgrade", lambda config, _: upgrade(config, schema))
            patch.setattr(database, "HEAD", schema)
            (tmp_path / schema).mkdir()
            database.create_served(tmp_path / schema, servers.backend())
        return tmp_path / schema

    yield make
    servers.tidy()


# the URL


@pytest.mark.parametrize(
    ("given", "shown", "password"),
    [
        ("postgresql://me@host/db", "postgresql://me@host/db", None),
        ("postgres://me:se%40cret@host:5433/db", "postgresql://me@host:5433/db", "se@cret"),
        ("postgresql+psycopg://host/db", "postgresql://host/db", None),
        ("postgresql:///db?host=/run/pg", "postgresql:///db?host=%2Frun%2Fpg", None),
        ("postgresql://me@h/db?password=x&sslmode=require", "postgresql://me@h/db?sslmode=require",
         "x"),
        ("postgresql://h/db?options=-csearch_path%3Dteam",
         "postgresql://h/db?options=-csearch_path%3Dteam", None),
    ],
)  # fmt: skip
def test_a_url_is_kept_without_its_password(given: str, shown: str, password: str | None) -> None:
    found = Postgres.at(given)
    assert (found.shown, found.password) == (shown, password)
    assert Postgres.at(found.shown) == found
    assert "cret" not in repr(found)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:sesame@host",
        "mysql://me:sesame@host/db",
        "sesame",
        "postgresql://me:ses@ame@host/db",
        "postgresql://me:sesame@host:port/db",
        "postgresql://host/db?sslpassword=sesame",
        "",
    ],
)
def test_what_is_no_such_url_is_refused_without_being_repeated(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Postgres.at(url)
    assert "sesame" not in str(caught.value)
    assert "ame@host" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_password_serves_for_one_call_and_is_written_nowhere(
    postgres_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from urllib.parse import quote

    url = postgres_server.locked_url(quote(pg.PASSWORD, safe=""))
    root = tmp_path / "ws" / ".lori"
    try:
        with Store.create(root, Postgres.at(url)) as store:
            store.set_base(build.base())
            assert store.database == postgres_server.locked_url()
        assert pg.PASSWORD not in everything_below(tmp_path)
        assert quote(pg.PASSWORD, safe="") not in everything_below(tmp_path)
        with pytest.raises(StorageFailed, match=r"refused the login.*PGPASSWORD"):
            Store.open(root)
        with Store.open(root, pg.PASSWORD) as store:
            assert store.base() == build.base()
        with monkeypatch.context() as patch:
            patch.setenv("PGPASSWORD", pg.PASSWORD)
            with Store.open(root) as store:
                assert store.base() == build.base()
        passes = tmp_path / "passes"
        escaped = pg.PASSWORD.replace(":", "\\:")
        passes.write_text(f"127.0.0.1:{postgres_server.port}:*:guarded:{escaped}\n")
        passes.chmod(0o600)
        monkeypatch.setenv("PGPASSFILE", str(passes))
        with Store.open(root) as store:
            assert store.base() == build.base()
    finally:
        postgres_server.sql("DROP OWNED BY guarded CASCADE", pg.LOCKED)


# what cannot be reached


def test_each_way_not_to_get_in_is_one_clear_line_without_a_password(
    postgres_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = postgres_server.locked_url
    cases = {
        locked("wrong"): "refused the login.*password authentication failed",
        locked(): "refused the login.*no password supplied",
        locked("wrong", user="nobody"): "refused the login",
        postgres_server.url("nowhere"): "is not there.*createdb",
        "postgresql://me:wrong@127.0.0.1:1/db": "cannot be reached.*refused",
        "postgresql://me:wrong@/db?host=/nowhere": "cannot be reached",
        "postgresql://me:wrong@no.such.host.invalid/db": "cannot be reached",
    }
    for url, told in cases.items():
        with pytest.raises(StorageFailed, match=told) as caught:
            revision(Postgres.at(url))
        assert "wrong" not in str(caught.value), url
        assert "\n" not in str(caught.value)


def test_a_missing_driver_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from lori_manager import extras

    monkeypatch.setattr(extras, "find_spec", lambda _: None)
    with pytest.raises(InvalidInput, match=r"pip install \"lori-manager\[postgres\]\""):
        Database(Postgres.at("postgresql://host/db"))


def test_a_server_that_is_stopped_and_started_again_is_told_and_gone_on_with(
    tmp_path: Path,
) -> None:
    if pg.missing():
        pytest.skip(f"POSTGRESQL IS NOT TESTED: {pg.missing()}")
    with pg.serving() as server:
        url = server.url(server.database())
        with Store.create(tmp_path / ".lori", Postgres.at(url)) as store:
            store.set_base(build.base())
            adapter = store.add_adapter(build.new_adapter(), b"told")
            server.stop("immediate")  # a crash
            with pytest.raises(StorageFailed, match=r"cannot be reached|ended the connection"):
                store.add_adapter(build.new_adapter(), b"not told")
            server.start()
            assert store.adapters() == [adapter]
            assert store.add_adapter(build.new_adapter(), b"again").version == 2


def test_a_connection_that_the_server_ended_meanwhile_is_made_anew(
    served_store: Store, postgres_server: Any
) -> None:
    served_store.lines()
    name = served_store._db.backend.subject
    postgres_server.sql(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    )
    assert served_store.lines() == []


def test_who_may_only_read_reads(served_store: Store, postgres_server: Any) -> None:
    name = served_store._db.backend.subject
    served_store.add_line("main")
    role = "reader"
    postgres_server.sql(f"CREATE ROLE {role} LOGIN")
    try:
        for right in ("USAGE ON SCHEMA public", "SELECT ON ALL TABLES IN SCHEMA public"):
            postgres_server.sql(f"GRANT {right} TO {role}", name)
        path = served_store.root / "database.json"
        path.write_text(path.read_text().replace("lori@", f"{role}@"))
        with Store.open(served_store.root) as store:
            assert [line.name for line in store.lines()] == ["main"]
            with pytest.raises(StorageFailed, match=r"refused this user.*grant"):
                store.add_line("other")
    finally:
        postgres_server.sql(f"DROP OWNED BY {role} CASCADE", name)
        postgres_server.sql(f"DROP ROLE {role}")


# one database, one folder


def test_another_folder_is_refused_the_database(
    served_store: Store, tmp_path: Path, postgres_server: Any
) -> None:
    backend = served_store._db.backend
    assert isinstance(backend, Postgres)
    with pytest.raises(Conflict, match=r"that of the workspace in .*:.*/\.lori"):
        Store.create(tmp_path / "other", backend)
    with pytest.raises(NotFound, match="lori init"):
        Store.open(tmp_path / "other")
    path = served_store.root / "database.json"
    path.write_text(json.dumps({"url": backend.shown, "folder": "0" * 32}))
    with pytest.raises(Conflict, match="whose files are there alone"):
        Store.open(served_store.root)


def test_several_workspaces_share_a_database_by_schemas(
    postgres_server: Any, tmp_path: Path
) -> None:
    name = postgres_server.database()
    url = postgres_server.url(name) + "&options=-csearch_path%3D"
    try:
        with pytest.raises(InvalidInput, match="CREATE SCHEMA"):
            Store.create(tmp_path / "one", Postgres.at(url + "one"))
        for schema in ("one", "two"):
            postgres_server.sql(f"CREATE SCHEMA {schema}", name)
        with (
            Store.create(tmp_path / "one", Postgres.at(url + "one")) as one,
            Store.create(tmp_path / "two", Postgres.at(url + "two")) as two,
        ):
            one.add_line("main")
            with one._db.write():  # and neither waits for the other
                two.add_line("other")
            assert [line.name for line in one.lines()] == ["main"]
            assert [line.name for line in two.lines()] == ["other"]
    finally:
        postgres_server.drop(name)


def test_other_tables_are_left_alone(postgres_server: Any, tmp_path: Path) -> None:
    name = postgres_server.database()
    try:
        postgres_server.sql("CREATE TABLE tasks (cat text)", name)
        with pytest.raises(Conflict, match="use an empty database, or a schema of its own"):
            Store.create(tmp_path / ".lori", Postgres.at(postgres_server.url(name)))
        found = postgres_server.sql(
            "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace", name
        )
        assert found == [("tasks",)]
    finally:
        postgres_server.drop(name)


def test_an_encoding_that_cannot_hold_every_text_is_refused(
    postgres_server: Any, tmp_path: Path
) -> None:
    postgres_server.sql(
        "CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    )
    try:
        with pytest.raises(IncompatibleStore, match="ENCODING 'UTF8'"):
            Store.create(tmp_path / ".lori", Postgres.at(postgres_server.url("latin")))
    finally:
        postgres_server.drop("latin")


@pytest.mark.parametrize("when", ["before the schema", "after the schema", "while it settles"])
def test_what_a_killed_create_left_is_gone_on_with(
    servers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    root = tmp_path / ".lori"
    backend = servers.backend()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    place = {
        "before the schema": (database, "_run_alembic"),
        "after the schema": (database.databases, "settle"),
        "while it settles": (Path, "unlink"),
    }[when]
    with monkeypatch.context() as patch:
        patch.setattr(*place, die)
        with pytest.raises(KeyboardInterrupt):
            Store.create(root, backend)
    if when == "while it settles":  # whole already
        Store.open(root).close()
    else:
        with pytest.raises(NotFound):
            Store.open(root)
        Store.create(root, backend).close()
    with Store.open(root) as store:
        assert store.add_line("main").name == "main"
    servers.tidy()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"url": 3, "folder": "x"}', '{"url": "x"}'])
def test_a_damaged_note_of_the_database_is_told(served_store: Store, content: str) -> None:
    (served_store.root / "database.json").write_text(content)
    with pytest.raises(LoriError, match=r"database\.json is damaged: write it anew"):
        Store.open(served_store.root)


# locks and transactions


def test_a_writer_waits_for_another_and_a_reader_does_not(served_store: Store) -> None:
    done = []
    with Store.open(served_store.root) as other:
        with served_store._db.write():
            writer = threading.Thread(target=lambda: done.append(other.add_line("main")))
            writer.start()
            time.sleep(0.3)
            assert done == []
            with Store.open(served_store.root) as reader:
                assert reader.lines() == []
        writer.join()
    assert [line.name for line in done] == ["main"]


def test_a_database_that_stays_locked_is_told(
    served_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "BUSY_SECONDS", 0.05)
    told = r"stayed locked by another process for 0\.05 s"
    with served_store._db.write(), Store.open(served_store.root) as other:
        assert other.lines() == []
        with pytest.raises(StorageFailed, match=told):
            other.add_line("main")
    assert served_store.add_line("main").name == "main"


def test_a_writer_that_stands_still_is_ended_and_keeps_nobody_waiting(
    served_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "LOST_SECONDS", 0.2)

    def stand_still() -> None:
        from lori_manager.store import names

        with served_store._db.write() as connection:
            names.add(connection, "half")
            with Store.open(served_store.root) as other:
                assert other.add_line("main").name == "main"
            names.add(connection, "more")

    with pytest.raises(StorageFailed, match="ended"):
        stand_still()
    assert [line.name for line in served_store.lines()] == ["main"]


def test_a_reader_sees_one_state_while_another_commits(served_store: Store) -> None:
    from lori_manager.store import lines

    with served_store._db.read() as connection:
        assert lines.every(connection) == []
        with Store.open(served_store.root) as other:
            other.add_line("main")
        assert lines.every(connection) == []
    assert len(served_store.lines()) == 1


def test_a_reader_cannot_write(served_store: Store) -> None:
    from lori_manager.store import names

    def write() -> None:
        with served_store._db.read() as connection:
            names.add(connection, "main")

    with pytest.raises(StorageFailed, match="read-only transaction"):
        write()


def test_commits_last_whatever_the_server_s_default_is(
    served_store: Store, postgres_server: Any
) -> None:
    def setting() -> str:
        served_store.close()
        with served_store._db.write() as connection:
            return str(connection.exec_driver_sql("SHOW synchronous_commit").scalar_one())

    name = served_store._db.backend.subject
    for given, expected in (("off", "on"), ("remote_write", "remote_write"), ("on", "on")):
        postgres_server.sql(f"ALTER DATABASE {name} SET synchronous_commit = {given}")
        assert setting() == expected


def test_a_change_by_another_program_is_told(served_store: Store) -> None:
    served_store.add_line("main")

    def clash() -> None:
        with served_store._db.write() as connection:
            connection.exec_driver_sql("SELECT * FROM lines")
            build.sql(served_store, "UPDATE lines SET sequence = '[1]'")  # takes no lock of ours
            connection.exec_driver_sql("UPDATE lines SET sequence = '[2]'")

    with pytest.raises(StorageFailed, match=r"by another program at the same time.*run it again"):
        clash()


def test_a_forked_process_leaves_its_parent_s_connection_alone(
    served_store: Store, tmp_path: Path
) -> None:
    def session() -> str:
        with served_store._db.read() as connection:
            return str(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())

    own = session()  # this connection is kept
    child = os.fork()
    if child == 0:
        try:
            served_store.add_line("child")
            (tmp_path / "session").write_text(session())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / "session").read_text() != own == session()
    assert [line.name for line in served_store.lines()] == ["child"]
    assert served_store.add_line("parent").name == "parent"


# upgrades


def test_an_upgrade_keeps_a_dump_that_can_be_restored(
    served_store: Store, next_schema: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = served_store.add_adapter(build.new_adapter(), b"weights")
    served_store.set_alias(adapter.line, "production", 1)
    served_store.close()
    with monkeypatch.context() as patch:
        patch.setattr(database, "HEAD", NEXT)
        done = database.upgrade(served_store.root)
    assert (done.before, done.after, done.unsaved) == (HEAD, NEXT, "")
    assert done.backup == served_store.root / f"registry.{HEAD}.dump"
    assert done.backup.stat().st_mode & 0o077 == 0
    with pytest.raises(IncompatibleStore, match="newer lori"):
        Store.open(served_store.root)
    program = shutil.which("pg_restore")
    assert program is not None
    subprocess.run(
        [program, "--clean", "--dbname", served_store.database, str(done.backup)], check=True
    )
    with Store.open(served_store.root) as restored:
        assert restored.adapters() == [adapter]
        assert restored.set_alias(adapter.line, "production", 1).version == 1
        assert restored.add_adapter(build.new_adapter(), b"more").version == 2
        with pytest.raises(Exception, match="the journal only grows"):
            build.sql(restored, "DELETE FROM journal", rules=True)


def test_a_database_of_every_schema_since_the_first_on_a_server_becomes_one_of_today(
    stores_at: Callable[[str], Path],
) -> None:
    for number in range(int(FIRST), int(HEAD)):
        root = stores_at(f"{number:04d}")
        done = database.upgrade(root)
        assert (done.before, done.after) == (f"{number:04d}", HEAD)
        with Store.open(root) as store, store._db.read() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, metadata) == []


def test_gc_removes_nothing_once_the_server_has_ended_its_transaction(
    served_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the transaction goes the lock: somebody may need the file by now."""
    orphan = served_store.objects.put(b"an orphan")
    size = served_store.objects.size

    def ended(digest: str) -> int:
        build.sql(served_store, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                  "WHERE datname = current_database() AND pid <> pg_backend_pid()")  # fmt: skip
        return size(digest)

    monkeypatch.setattr(served_store.objects, "size", ended)
    with pytest.raises(StorageFailed, match="ended the connection"):
        list(served_store.collect(grace=timedelta(0)))
    assert served_store.objects.exists(orphan)


def test_an_upgrade_waits_for_whoever_migrates_the_same_schema(
    stores_at: Callable[[str], Path],
) -> None:
    """By the advisory lock alone: no table is locked here."""
    import psycopg

    root = stores_at(FIRST)
    url = database.databases.backend(root).shown
    lock = "SELECT {}(hashtextextended('lori migrates ' || current_schema(), 0))"
    done = threading.Event()
    with psycopg.connect(url, autocommit=True) as other:
        other.execute(lock.format("pg_advisory_lock"))
        waiting = threading.Thread(target=lambda: (database.upgrade(root), done.set()))
        waiting.start()
        assert not done.wait(1)
        other.execute(lock.format("pg_advisory_unlock"))
        assert done.wait(60)
    waiting.join()


def test_an_upgrade_killed_at_any_time_is_whole_or_was_not(
    served_store: Store, next_schema: Path, tmp_path: Path, start: Callable[..., Any]
) -> None:
    served_store.add_line("main")
    served_store.close()
    chance, seen = random.Random(0), set()
    for i in range(8):
        process = start(build.upgrade_store, served_store.root, next_schema, tmp_path / "said")
        process.join(chance.uniform(0.2, 0.6) if i < 7 else None)
        process.kill()
        process.join()
        ((noted,),) = build.sql(served_store, "SELECT version_num FROM alembic_version")
        columns = build.sql(
            served_store,
            "SELECT count(*) FROM information_schema.columns WHERE table_name = 'lines' "
            "AND column_name = 'colour'",
        )
        assert columns == [(int(noted == NEXT),)]
        seen.add(noted)
    assert NEXT in seen
    assert (tmp_path / "said").exists()


@pytest.mark.parametrize("here", [None, "an old one", "a failing one"])
def test_an_upgrade_without_a_fitting_pg_dump_says_so(
    served_store: Store,
    next_schema: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    here: str | None,
) -> None:
    program = tmp_path / "pg_dump"
    version = "9.6.1" if here == "an old one" else "99.1"
    program.write_text(
        f"#!/bin/sh\n[ \"$1\" = --version ] && echo 'pg_dump (PostgreSQL) {version}' && exit 0\n"
        "echo 'disk full' >&2; exit 1\n"
    )
    program.chmod(0o700)
    found = None if here is None else str(program)
    monkeypatch.setattr(postgres_dump.shutil, "which", lambda _: found)
    monkeypatch.setattr(database, "HEAD", NEXT)
    if here == "a failing one":
        with pytest.raises(StorageFailed, match=r"disk full.*nothing was changed"):
            database.upgrade(served_store.root)
        assert build.sql(served_store, "SELECT version_num FROM alembic_version") == [(HEAD,)]
        assert not list(served_store.root.glob("*.dump*"))
        return
    done = database.upgrade(served_store.root)
    assert (done.after, done.backup) == (NEXT, None)
    told = "no pg_dump is installed" if here is None else "pg_dump (PostgreSQL) 9.6.1, the server"
    assert told in done.unsaved


def test_readers_wait_for_an_upgrade_and_see_none_of_its_middle(
    served_store: Store, next_schema: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served_store.add_line("main")
    middle = tmp_path / "middle"
    script = next_schema / "versions" / f"{NEXT}_colour.py"
    pause = f"    import pathlib, time; pathlib.Path({str(middle)!r}).touch(); time.sleep(0.5)\n"
    script.write_text(script.read_text() + pause)
    monkeypatch.setattr(database, "HEAD", NEXT)
    upgrading = threading.Thread(target=database.upgrade, args=(served_store.root,))
    upgrading.start()
    while not middle.exists():
        assert upgrading.is_alive()
        time.sleep(0.01)
    assert [line.name for line in served_store.lines()] == ["main"]
    assert served_store.add_line("other").name == "other"
    upgrading.join()


def test_a_store_of_an_upgraded_lori_is_refused_by_one_that_was_open(
    served_store: Store, next_schema: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served_store.lines()
    with monkeypatch.context() as patch:
        patch.setattr(database, "HEAD", NEXT)
        database.upgrade(served_store.root)
    for call in (served_store.lines, lambda: served_store.add_line("main")):
        with pytest.raises(IncompatibleStore, match="newer lori"):
            call()


# care


def test_what_the_server_is_and_how_it_is_set(served_store: Store, postgres_server: Any) -> None:
    backend = served_store._db.backend
    assert isinstance(backend, Postgres)
    facts = backend.facts()
    assert facts.number.startswith(str(facts.version))
    assert (facts.schema, facts.lasting, facts.synchronous_commit) == ("public", True, "on")
    assert not facts.standby
    assert not facts.bare
    assert abs(facts.now - build.now()) < timedelta(minutes=1)


def test_an_index_that_is_not_whole_is_a_finding(served_store: Store) -> None:
    assert list(served_store.verify()) == []
    build.sql(
        served_store,
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_adapters_digest'::regclass",
    )
    (finding,) = served_store.verify()
    assert finding.message == "the index ix_adapters_digest is not whole"


def test_sixteen_writers_on_four_lines_lose_nothing(
    served_store: Store, start: Callable[..., Any]
) -> None:
    started = [start(build.write_versions, served_store.root, f"line{i % 4}", 3) for i in range(16)]
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * 16
    for i in range(4):
        versions = [a.version for a in served_store.adapters(f"line{i}")]
        assert versions == list(range(1, 13))
