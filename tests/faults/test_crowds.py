"""Many processes at once: nobody fails, nothing is lost, nothing needed is freed."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import acting
import crowding
import pytest

from lori_manager.store.postgres import Postgres
from lori_manager.store.store import Store


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Starts a function in another process; none outlives the test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crowding", "alembic.command", "filelock", "numpy"])
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


@pytest.fixture(params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest) -> Any:
    """PostgreSQL's, or None; on the real disk, where locks and fsync take their time."""
    return None if request.param == "sqlite" else request.getfixturevalue("disk_server")


@pytest.fixture
def empty(server: Any) -> Postgres | None:
    """An empty database on the server."""
    return server and Postgres.at(server.url(server.database()))


@pytest.fixture
def root(empty: Postgres | None, tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    acting.prepare(tmp_path / "place", empty)
    return tmp_path / "place" / ".lori"


def _called(server: object) -> str:
    return "SQLite" if server is None else "PostgreSQL"


def test_processes_write_consecutive_versions(
    root: Path, server: Any, start: Callable[..., Any], many: Callable[[int, int], int]
) -> None:
    processes, each = many(8, 16), many(10, 50)
    at = time.time() + 1
    began = time.perf_counter()
    started = [start(crowding.write, root, each, at) for _ in range(processes)]
    for process in started:
        process.join()
    spent = time.perf_counter() - began
    assert [process.exitcode for process in started] == [0] * processes
    with Store.open(root) as store:
        versions = [a.version for a in store.adapters("safety")]
        assert versions == list(range(1, 2 + processes * each + 1))
        assert list(store.verify()) == []
    print(
        f"\n{_called(server)}: {processes} processes x {each} versions in {spent:.1f} s, 0 errors"
    )


def test_first_starts_at_once_make_one_store(
    tmp_path: Path,
    start: Callable[..., Any],
    many: Callable[[int, int], int],
    empty: Postgres | None,
) -> None:
    count = many(8, 32)
    at = time.time() + 1
    said = [tmp_path / str(i) for i in range(count)]
    root = tmp_path / "new" / ".lori"
    started = [start(crowding.start, root, empty, path, at) for path in said]
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * count
    results = sorted(path.read_text() for path in said)
    assert results == ["conflict"] * (count - 1) + ["created"]
    print(f"\n{_called(empty)}: {count} first starts: one migration, 0 errors")


def test_gc_frees_nothing_that_merges_and_trainings_need(
    root: Path,
    server: Any,
    tmp_path: Path,
    start: Callable[..., Any],
    many: Callable[[int, int], int],
) -> None:
    rounds = many(10, 100)
    stop, said = tmp_path / "stop", tmp_path / "freed"
    with Store.open(root) as store:
        store.add_line("work")
        store.add_line("merged")
    started = [
        start(target, root, stop, seed)
        for seed, target in enumerate(
            [crowding.train, crowding.train, crowding.merge, crowding.merge, crowding.throw_away]
        )
    ]
    with Store.open(root) as store:
        collecting = start(crowding.collect, root, rounds, said)
        collecting.join()
        stop.touch()
        for process in started:
            process.join()
        assert [process.exitcode for process in [*started, collecting]] == [0] * 6
        wrong = [f for f in store.verify() if f.kind != "orphan"]
        assert wrong == []
        every = store.adapters(removed=True)
        visible = {a.ref for a in store.adapters()}
        for adapter in every:  # what is visible has all that it was made from
            store.objects.check(adapter.digest) if not adapter.hidden else None
            if not adapter.hidden:
                assert {parent.ref for parent in adapter.parents} <= visible
    freed = int(said.read_text())
    assert freed >= rounds  # orphans, one a round
    assert rounds < 50 or freed > rounds  # and, by chance, files of removed versions beside
    hidden = len(every) - len(visible)
    done = f"{rounds} rounds of gc, {len(every)} versions, {hidden} removed, {freed} files freed"
    print(f"\n{_called(server)}: {done}, 0 needed ones")
