"""Kills, crowds, full disks and damage."""

from __future__ import annotations

import errno
import os
import random
import resource
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import store_builders as build
from sqlalchemy import event

from lori_manager.errors import DamagedObject, StorageFailed
from lori_manager.store import sqlite
from lori_manager.store.store import Store


def kinds(store: Store) -> list[tuple[str, str]]:
    return [(finding.kind, finding.subject) for finding in store.verify()]


# kills and crowds


def test_kill_9_loses_no_acknowledged_version(
    store: Store, tmp_path: Path, start: Callable[..., Any]
) -> None:
    chance = random.Random(0)
    notes = tmp_path / "acknowledged"
    notes.touch()
    for _ in range(20):
        size = notes.stat().st_size
        process = start(build.write_until_killed, store.root, "main", notes)
        while notes.stat().st_size == size and process.is_alive():
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.06))
        process.kill()
        process.join()
        assert process.exitcode == -9
    told = [line.split() for line in notes.read_text().splitlines()]
    adapters = store.adapters("main")
    assert [adapter.version for adapter in adapters] == list(range(1, len(adapters) + 1))
    stored = {(str(adapter.version), adapter.digest) for adapter in adapters}
    assert {(version, digest) for version, digest in told} <= stored
    assert len(told) >= 20
    for adapter in adapters:
        assert len(store.adapter_bytes(adapter)) == adapter.bytes
    assert {kind for kind, _ in kinds(store)} <= {"orphan"}


def test_eight_processes_write_160_consecutive_versions(
    store: Store, start: Callable[..., Any]
) -> None:
    started = [start(build.write_versions, store.root, "main", 20) for _ in range(8)]
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * 8
    assert [a.version for a in store.adapters("main")] == list(range(1, 161))
    assert kinds(store) == []


def test_threads_share_a_store(store: Store) -> None:
    def write() -> None:
        for i in range(3):
            store.add_adapter(build.new_adapter("main"), str(i).encode())

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [a.version for a in store.adapters("main")] == list(range(1, 13))


def test_readers_see_one_state_while_another_writes(store: Store) -> None:
    first = store.add_adapter(build.new_adapter("main"), b"1")
    with store._db.write() as connection:
        from lori_manager.store import adapters

        adapters.add(connection, build.new_adapter("main"), digest="0" * 64, size=1)
        with Store.open(store.root) as reader:
            assert reader.adapters() == [first]
    assert len(store.adapters()) == 2


def test_an_error_in_a_transaction_takes_all_of_it_back(store: Store) -> None:
    def half() -> None:
        with store._db.write() as connection:
            from lori_manager.store import names

            names.add(connection, "half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        half()
    assert store.lines() == []


# a disk or database that refuses


def test_a_full_disk_under_a_file_leaves_the_old_state_whole(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = store.add_adapter(build.new_adapter("main"), b"1")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageFailed, match="no space left"):
            store.add_adapter(build.new_adapter("main"), b"2")
    assert store.adapters() == [adapter]
    assert kinds(store) == []
    assert store.add_adapter(build.new_adapter("main"), b"2").version == 2


def test_a_full_disk_under_the_database_leaves_the_old_state_whole(file_store: Store) -> None:
    adapter = file_store.add_adapter(build.new_adapter("main"), b"1")
    long = build.new_adapter("main", facts={"log": "x" * 200_000})

    def limit(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # it becomes the present size

    event.listen(file_store._db._engine, "connect", limit)
    with pytest.raises(StorageFailed, match="no space left for"):
        file_store.add_adapter(long, b"2")
    event.remove(file_store._db._engine, "connect", limit)
    assert file_store.adapters() == [adapter]
    assert [kind for kind, _ in kinds(file_store)] == ["orphan"]  # the file, for gc
    assert file_store.add_adapter(long, b"2").version == 2
    assert kinds(file_store) == []


def test_a_write_that_the_kernel_cuts_short_leaves_the_old_state_whole(file_store: Store) -> None:
    adapter = file_store.add_adapter(build.new_adapter("main"), b"1")
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "import store_builders as build\n"
        "from lori_manager.errors import StorageFailed\n"
        "from lori_manager.store.store import Store\n"
        "long = build.new_adapter('main', facts={'log': 'x' * 400_000})\n"
        "try: Store.open(Path(sys.argv[1])).add_adapter(long, b'2')\n"
        "except StorageFailed: sys.exit(9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(file_store.root), str(Path(__file__).parent)],
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )
    assert done.returncode == 9
    assert file_store.adapters() == [adapter]
    assert file_store.add_adapter(build.new_adapter("main"), b"3").version == 2
    assert [kind for kind, _ in kinds(file_store)] == ["orphan"]


def test_a_database_that_stays_locked_is_told(
    file_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.05)
    other = sqlite3.connect(file_store.root / "registry.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with Store.open(file_store.root) as impatient:
        assert impatient.lines() == []  # readers go on
        with pytest.raises(StorageFailed, match=r"stayed locked by another process for 0.05 s"):
            impatient.add_line("main")
        other.execute("ROLLBACK")
        assert impatient.add_line("main").name == "main"
    other.close()


def test_a_writer_waits_for_another_instead_of_failing(file_store: Store) -> None:
    other = sqlite3.connect(
        file_store.root / "registry.db", isolation_level=None, check_same_thread=False
    )
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.3, lambda: other.execute("ROLLBACK"))
    timer.start()
    assert file_store.add_line("main").name == "main"
    timer.join()
    other.close()


def test_a_read_only_database_is_told(file_store: Store) -> None:
    def forbid(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA query_only = ON")

    event.listen(file_store._db._engine, "connect", forbid)
    assert file_store.lines() == []
    with pytest.raises(StorageFailed, match="check the permissions"):
        file_store.add_line("main")


# damage


def test_a_whole_store_has_no_findings(store: Store) -> None:
    task = build.add_task(store)
    store.add_mask(
        task=task, blob=b"m", projection="a" * 64, sparsity=0.9, scope="model", kept=1, total=10,
        config={},
    )  # fmt: skip
    adapter = store.add_adapter(build.new_adapter("main"), b"x")
    store.add_adapter(build.new_adapter("main", parents=build.parents(adapter)), b"y")
    build.score_base(store, task, [1.0] * 10)
    assert kinds(store) == []


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
@pytest.mark.parametrize("what", ["adapter", "mask", "split"])
def test_every_damaged_file_is_found_by_verify_and_by_reading(
    store: Store, what: str, damage: str
) -> None:
    task = build.add_task(store)
    mask = store.add_mask(
        task=task, blob=b"mask", projection="a" * 64, sparsity=0.9, scope="model", kept=1,
        total=10, config={},
    )  # fmt: skip
    adapter = store.add_adapter(build.new_adapter("main"), b"weights")
    digest, subject = {
        "adapter": (adapter.digest, "main@1"),
        "mask": (mask.digest, "safety%1"),
        "split": (task.splits["train"].digest, "safety#1 train"),
    }[what]
    path = store.objects.path(digest)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        altered = bytes([content[0] ^ 1]) + content[1:]
        path.write_bytes(altered if damage == "flip" else content[:-1])
    assert kinds(store) == [("missing" if damage == "missing" else "damaged", subject)]
    with pytest.raises(DamagedObject, match=digest):
        {
            "adapter": lambda: store.adapter_bytes(adapter),
            "mask": lambda: store.mask_bytes(mask),
            "split": lambda: store.objects.get(digest),
        }[what]()


def test_every_name_of_a_damaged_file_is_told(store: Store) -> None:
    adapter = store.add_adapter(build.new_adapter("a"), b"same")
    store.add_adapter(build.new_adapter("b"), b"same")
    store.objects.path(adapter.digest).unlink()
    assert kinds(store) == [("missing", "a@1"), ("missing", "b@1")]


def test_files_that_no_row_needs_are_told(store: Store) -> None:
    digest = store.objects.put(b"nobody's")
    left = store.objects.path(digest).parent / ".tmp-0123"
    left.write_bytes(b"half")
    assert kinds(store) == [("orphan", digest), ("orphan", ".tmp-0123")]


def test_altered_rows_are_findings_and_no_tracebacks(
    store: Store, stores: Any, tmp_path: Path
) -> None:
    build.add_task(store)
    store.add_adapter(build.new_adapter("main"), b"x")
    store.objects.put(b"nobody's")
    alterations = {
        "UPDATE tasks SET options = '{'": ("damaged", None),
        "UPDATE tasks SET created_at = 'yesterday'": ("damaged", None),
        "UPDATE adapters SET digest = '../../etc/passwd'": ("damaged", "main@1"),
        "UPDATE splits SET task = 'ghost'": ("damaged", None),
    }
    for i, (statement, expected) in enumerate(alterations.items()):
        stores.copy(store, tmp_path / str(i))
        with Store.open(tmp_path / str(i)) as altered:
            build.sql(altered, statement)
            subject = expected[1] or altered._db.backend.subject
            assert (expected[0], subject) in kinds(altered), statement
    assert kinds(store) == [("orphan", store.objects.put(b"nobody's"))]


def test_a_database_with_destroyed_pages_is_told(file_store: Store) -> None:
    for i in range(30):
        file_store.add_adapter(
            build.new_adapter("main", facts={"log": "x" * 2000}), str(i).encode()
        )
    path = file_store.root / "registry.db"
    content = bytearray(path.read_bytes())
    content[-60_000:] = bytes(60_000)
    path.write_bytes(content)
    assert ("damaged", "registry.db") in kinds(file_store)
    with pytest.raises(DamagedObject, match="restore it from a copy"):
        file_store.adapters()
