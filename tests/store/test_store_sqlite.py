"""The journal, and on which disks it may be which."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from lori_manager.errors import IncompatibleStore, InvalidInput, StorageFailed
from lori_manager.store import sqlite
from lori_manager.store.mounts import file_system
from lori_manager.store.sqlite import ROLLBACK, WAL, SQLite
from lori_manager.store.store import Store

MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:40 / /home rw - nfs4 server:/home rw
31 30 0:41 / /home/with\\040space rw - xfs /dev/vdb rw
32 22 0:42 / /cloud rw - fuse.sshfs host: rw
"""


@pytest.fixture
def database(file_store: Store) -> SQLite:
    return SQLite(file_store.root / "registry.db")


def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this SQLite were free of the bug."""
    monkeypatch.setattr(sqlite, "SAFE_WAL", (3, 0, 0))


def test_a_new_store_has_a_rollback_journal(database: SQLite) -> None:
    assert database.journal() == ROLLBACK


def test_wal_is_refused_with_an_sqlite_that_has_the_bug(
    database: SQLite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "SAFE_WAL", (9, 0, 0))
    with pytest.raises(IncompatibleStore, match=r"use one with 9\.0\.0 or newer"):
        database.set_journal(WAL)
    assert database.journal() == ROLLBACK


def test_wal_is_refused_off_a_local_disk(database: SQLite, monkeypatch: pytest.MonkeyPatch) -> None:
    newer(monkeypatch)
    monkeypatch.setattr(sqlite, "file_system", lambda _: ("nfs4", False))
    with pytest.raises(InvalidInput, match="lies on nfs4, where WAL does not work"):
        database.set_journal(WAL)
    assert database.journal() == ROLLBACK


def test_wal_on_request_and_back(
    file_store: Store, database: SQLite, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer(monkeypatch)
    monkeypatch.setattr(sqlite, "file_system", lambda _: ("ext4", True))
    database.set_journal(WAL)
    assert file_store.add_line("main").name == "main"
    with file_store._db.write() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() >= 2
    # an older one refuses to work so, and can turn it back
    monkeypatch.setattr(sqlite, "SAFE_WAL", (9, 0, 0))
    with pytest.raises(IncompatibleStore, match="run `lori db journal rollback`"):
        file_store.lines()
    database.set_journal(ROLLBACK)
    assert [line.name for line in file_store.lines()] == ["main"]


def test_a_journal_that_others_hold_is_told(
    file_store: Store, database: SQLite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.05)
    newer(monkeypatch)
    monkeypatch.setattr(sqlite, "file_system", lambda _: ("ext4", True))
    other = sqlite3.connect(database.path, isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT * FROM lines").fetchall()
    with pytest.raises(StorageFailed, match="stay"):
        database.set_journal(WAL)
    other.close()


@pytest.mark.parametrize(
    ("path", "kind", "local"),
    [
        ("/data/x", "ext4", True),
        ("/home/me/.lori", "nfs4", False),
        ("/home/with space/.lori", "xfs", True),
        ("/homely", "ext4", True),
        ("/cloud/.lori", "fuse.sshfs", False),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(
    tmp_path: Path, path: str, kind: str, local: bool
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert file_system(Path(path), mounts) == (kind, local)


def test_where_nothing_is_known_nothing_counts_as_local(tmp_path: Path) -> None:
    assert file_system(Path("/x"), tmp_path / "none") == ("unknown", False)
