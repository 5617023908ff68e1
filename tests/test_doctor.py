"""doctor: what it finds wrong with the ground under a workspace, and that it needs no torch."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections import namedtuple
from datetime import UTC, datetime
from pathlib import Path

import pytest
from small_workspaces import copied, make_workspace

from lori_manager import doctor
from lori_manager.doctor import NOTE, OK, TROUBLE, examine
from lori_manager.records import NewAdapter
from lori_manager.store import sqlite
from lori_manager.workspace import Workspace


@pytest.fixture(scope="module")
def made(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("doctor") / "ws", tiny_base)


@pytest.fixture
def ws(made: Workspace, tmp_path: Path) -> Workspace:
    ws = copied(made, tmp_path / "ws")
    shutil.copystat(made.store.root, ws.store.root)
    return ws


def states(ws: Workspace) -> dict[str, str]:
    return {check.name: check.state for check in examine(ws.store.root)}


def told(ws: Workspace, name: str) -> tuple[str, str]:
    (check,) = [check for check in examine(ws.store.root) if check.name == name]
    return check.state, check.told


def add(ws: Workspace) -> None:
    base = ws.store.base().fingerprint
    new = NewAdapter("main", "trained", None, None, None, (), "lori-s", 4, None, base)
    ws.store.add_adapter(new, b"weights")


def test_a_sound_workspace_has_no_trouble(ws: Workspace) -> None:
    found = states(ws)
    assert set(found) == {
        "schema", "journal", "file system", "space", "locks", "permissions", "objects", "clock",
        "base", "trainings", "libraries", "gpu",
    }  # fmt: skip
    assert TROUBLE not in found.values()
    assert sqlite3.sqlite_version in told(ws, "journal")[1]


def test_it_imports_neither_torch_nor_transformers_and_ends_with_0(ws: Workspace) -> None:
    code = (
        "import sys; from lori_manager.cli.app import app\n"
        "try: app(['doctor'], prog_name='lori')\n"
        "except SystemExit as e: print(e.code, [m for m in ('torch', 'transformers') "
        "if m in sys.modules])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ws.root, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "0 []"


def test_wal_with_an_old_sqlite_is_trouble(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    with sqlite3.connect(ws.store.root / "registry.db") as connection:
        connection.execute("PRAGMA journal_mode = wal")
    connection.close()
    for module in (doctor, sqlite):
        monkeypatch.setattr(module, "SAFE_WAL", (9, 0, 0))
    state, message = told(ws, "journal")
    assert state == TROUBLE
    assert "lori db journal rollback" in message


def test_an_older_schema_is_trouble(ws: Workspace) -> None:
    with sqlite3.connect(ws.store.root / "registry.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
    connection.close()
    state, message = told(ws, "schema")
    assert state == TROUBLE
    assert "at 0001" in message
    assert "lori db upgrade" in message


def test_a_database_that_is_none_is_trouble(ws: Workspace) -> None:
    (ws.store.root / "registry.db").write_bytes(b"nonsense" * 1000)
    assert states(ws)["database"] == TROUBLE
    (ws.store.root / "registry.db").unlink()
    assert "restore it from a copy" in told(ws, "database")[1]


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "state"), [(2e10, OK), (1e9, NOTE), (1e6, TROUBLE)])
def test_a_disk_that_fills_up_is_told(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch, free: float, state: str
) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(1e12, 0, free))
    assert told(ws, "space")[0] == state


@pytest.mark.skipif(os.name == "nt", reason="no modes there")
def test_a_folder_that_others_may_enter_is_trouble(ws: Workspace) -> None:
    ws.store.root.chmod(0o755)
    state, message = told(ws, "permissions")
    assert state == TROUBLE
    assert f"chmod 700 {ws.store.root}" in message


def test_a_version_of_the_future_is_trouble(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    add(ws)
    monkeypatch.setattr(doctor, "now", lambda: datetime(2001, 1, 1, tzinfo=UTC))
    assert told(ws, "clock")[0] == TROUBLE


def test_a_clock_that_went_back_and_files_of_the_future_are_noted(ws: Workspace) -> None:
    add(ws)
    add(ws)
    with sqlite3.connect(ws.store.root / "registry.db") as connection:
        connection.execute(
            "UPDATE adapters SET created_at = '2001-01-01T00:00:00.000000+00:00' WHERE version = 2"
        )
    connection.close()
    assert told(ws, "clock") == (
        NOTE, "it went back 1 time(s) between versions: times may mislead, version numbers do not"
    )  # fmt: skip
    os.utime(ws.store.root / "registry.db", (4e9, 4e9))
    state, message = told(ws, "clock")
    assert state == NOTE
    assert "registry.db was changed in what is the future" in message


def test_other_weights_and_a_base_that_is_gone_are_trouble(ws: Workspace, tmp_path: Path) -> None:
    base = Path(ws.store.base().path)
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    ws.store.move_base(path=str(copy), source=str(copy))
    assert told(ws, "base")[0] == OK
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert told(ws, "base")[0] == TROUBLE
    shutil.rmtree(copy)
    state, message = told(ws, "base")
    assert state == TROUBLE
    assert "lori base --move" in message


def test_unfinished_trainings_are_noted(ws: Workspace) -> None:
    ws.store.open_run({"tasks": ["colour#1"]})
    state, message = told(ws, "trainings")
    assert state == NOTE
    assert "colour#1" in message


def test_the_cuda_of_torch_is_read_from_its_sources() -> None:
    import torch

    assert doctor._torch_cuda() == torch.version.cuda
