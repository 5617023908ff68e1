"""A whole road on PostgreSQL, and the ways to be refused, as commands tell them."""

import os
import shutil
from urllib.parse import quote

import pytest
import servers as pg


@pytest.fixture(autouse=True)
def no_password(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "none"))


@pytest.fixture
def ws(empty, tmp_path):
    """Commands in a folder that is to become a workspace."""
    return type(empty)(tmp_path / "ws")


@pytest.fixture
def url(postgres_server):
    name = postgres_server.database()
    yield postgres_server.url(name)
    postgres_server.drop(name)


def test_a_whole_road_on_a_server(ws, workspace_with_tasks, tiny_base, tmp_path, url):
    lori = ws
    told = lori("init", lori.folder, "--base", tiny_base, "--store", url)
    assert "rows in postgresql://lori@/" in told.stdout
    assert told.stderr == ""
    assert not (lori.folder / ".lori" / "registry.db").exists()
    shutil.copy(workspace_with_tasks / "lori.toml", lori.folder)
    shutil.copytree(workspace_with_tasks / "tasks", lori.folder / "tasks")
    for task in ("colour", "shape"):
        lori("add-task", task, "--probe-rows", 4)
    lori("train", "colour", "shape")
    lori("merge", "--tasks", "colour,shape", "--method", "concat")
    assert [a["ref"] for a in lori.json("log")] == ["colour@1", "shape@1", "main@1"]
    lori("alias", "main@1", "champion")
    assert "main@1" in lori("audit").stdout
    lori("rm", "shape@1", code=10)
    assert lori.json("verify") == []
    assert lori.json("gc", "--grace", "0") == []
    found = {check["name"]: check for check in lori.json("doctor")}
    assert {"schema", "server", "durability"} < found.keys()
    assert found["server"]["told"].startswith("PostgreSQL ")
    assert "fsync and full_page_writes are on" in found["durability"]["told"]
    assert "journal" not in found
    assert "already" in lori("db", "upgrade").stdout
    assert "no SQLite database" in lori.refuses("db", "journal", "wal", code=2)
    again = lori.refuses("init", lori.folder, "--base", tiny_base, "--store", url, code=10)
    assert "holds a workspace already" in again
    elsewhere = lori.refuses("init", tmp_path / "b", "--base", tiny_base, "--store", url, code=10)
    assert f"that of the workspace in {os.uname().nodename}:{lori.folder}/.lori" in elsewhere


def test_a_password_in_the_url_serves_once_and_is_shown_nowhere(
    ws, tiny_base, tmp_path, postgres_server, monkeypatch
):
    lori = ws
    secret = quote(pg.PASSWORD, safe="")
    url = postgres_server.locked_url(secret)
    try:
        told = lori("init", lori.folder, "--base", tiny_base, "--store", url)
        assert "the password is not kept: set PGPASSWORD or ~/.pgpass" in told.stderr
        monkeypatch.setenv("LORI_DEBUG", "1")
        refused = lori("log", code=9)
        monkeypatch.delenv("LORI_DEBUG")
        one = lori.refuses("log", code=9)
        assert "refused the login (connection failed" in one
        assert "set PGPASSWORD, or add a line to ~/.pgpass" in one
        for text in (told.output, refused.output, one):
            assert pg.PASSWORD not in text
            assert secret not in text
        for path in tmp_path.rglob("*"):
            if path.is_file():
                assert pg.PASSWORD.encode() not in path.read_bytes(), path
                assert secret.encode() not in path.read_bytes(), path
        rows = postgres_server.sql("SELECT source, path FROM base", pg.LOCKED)
        assert pg.PASSWORD not in str(rows)
        monkeypatch.setenv("PGPASSWORD", pg.PASSWORD)
        assert lori.json("log") == []
        found = {check["name"]: check for check in lori.json("doctor")}
        assert found["encryption"]["state"] == "note"
    finally:
        postgres_server.sql("DROP OWNED BY guarded CASCADE", pg.LOCKED)


def test_what_is_no_server_is_refused_in_one_line_and_leaves_nothing(
    ws, tiny_base, postgres_server
):
    lori = ws
    cases = [
        (postgres_server.url("nowhere"), 9, "make it with `createdb`"),
        ("postgresql://me:sesame@127.0.0.1:1/db", 9, "cannot be reached"),
        (postgres_server.locked_url("sesame"), 9, "refused the login"),
        ("mysql://me:sesame@host/db", 2, "expected postgresql://USER@HOST:PORT/DATABASE"),
    ]
    for url, code, told in cases:
        line = lori.refuses("init", lori.folder, "--base", tiny_base, "--store", url, code=code)
        assert told in line
        assert "sesame" not in line
        assert not lori.folder.exists()


def test_a_workspace_whose_server_is_gone_says_so(ws, tiny_base):
    if pg.missing():
        pytest.skip(f"POSTGRESQL IS NOT TESTED: {pg.missing()}")
    lori = ws
    with pg.serving() as server:
        url = server.url(server.database())
        lori("init", lori.folder, "--base", tiny_base, "--store", url)
        server.sql("ALTER SYSTEM SET fsync = off")
        server.sql("SELECT pg_reload_conf()")
        found = {check["name"]: check for check in lori.json("doctor", code=13)}
        assert found["durability"]["state"] == "trouble"
    assert "cannot be reached" in lori.refuses("log", code=9)
    found = {check["name"]: check for check in lori.json("doctor", code=13)}
    assert found["database"]["state"] == "trouble"
    assert "cannot be reached" in found["database"]["told"]
