"""Small records to store, and what other processes run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lori_manager.errors import Conflict
from lori_manager.records import Base, NewAdapter, NewScore, Parent, Score, Split, Task
from lori_manager.store.database import HEAD
from lori_manager.store.postgres import Postgres
from lori_manager.store.sqlite import SQLite
from lori_manager.store.store import Store

NEXT = f"{int(HEAD) + 1:04d}"  # the schema of a later lori

FINGERPRINT = "f" * 64


def now() -> datetime:
    return datetime.now(UTC)


def base(fingerprint: str = FINGERPRINT, **changes: Any) -> Base:
    values: dict[str, Any] = {
        "fingerprint": fingerprint,
        "source": "hub/tiny",
        "revision": "abc",
        "path": "/models/tiny",
        "model_type": "llama",
        "created_at": datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
    }
    return Base(**values | changes)


def keys(rows: int) -> list[bytes]:
    return [hashlib.sha256(line).digest()[:16] for line in lines(rows)]


def lines(rows: int) -> list[bytes]:
    return [b'{"completion":"%d","prompt":""}' % i for i in range(rows)]


def add_task(store: Store, name: str = "safety", *, rows: int = 10, salt: str = "") -> Task:
    splits = {}
    for split, count in (("train", 100), ("eval", rows)):
        content = f"{name} {split} {count} {salt}".encode()
        if split == "eval" and not salt:
            content = b"".join(line + b"\n" for line in lines(count))
        digest = store.objects.put(content)
        splits[split] = Split(digest, count, tokens=7 * count, longest=40, truncated=1)
    return store.add_task(
        name,
        scorer="exact_match",
        scorer_version="1",
        description="what it is",
        splits=splits,
        options={"seed": 0, "sources": ["a.jsonl"]},
    )


def new_adapter(line: str = "safety", **changes: Any) -> NewAdapter:
    values: dict[str, Any] = {
        "line": line,
        "origin": "trained",
        "task": None,
        "task_revision": None,
        "mask": None,
        "parents": (),
        "method": "lori-s",
        "rank": 8,
        "projection": "a" * 64,
        "base": FINGERPRINT,
        "config": {"seed": 1, "targets": ["q_proj"]},
        "versions": {"torch": "2.13.0"},
        "facts": {"loss": 0.25},
    }
    return NewAdapter(**values | changes)


def parents(*adapters: Any, weights: Sequence[float | None] = ()) -> tuple[Parent, ...]:
    given = list(weights) or [None] * len(adapters)
    return tuple(Parent(a.ref, a.digest, w) for a, w in zip(adapters, given, strict=True))


def new_score(subject: str, digest: str, task: Task, **changes: Any) -> NewScore:
    values: dict[str, Any] = {
        "subject": subject,
        "digest": digest,
        "task": task.name,
        "task_revision": task.revision,
        "scorer": task.scorer,
        "scorer_version": task.scorer_version,
        "precision": "fp32",
        "value": 0.5,
        "error": 0.1,
        "rows": task.splits["eval"].rows,
        "facts": {"seconds": 1.5},
    }
    return NewScore(**values | changes)


def score_base(store: Store, task: Task, outcomes: Sequence[float], **changes: Any) -> Score:
    new = new_score("base", FINGERPRINT, task, **changes)
    return store.add_score(new, np.array(outcomes, np.float32))


def key_of(task: Task, digest: str) -> Mapping[str, Any]:
    return {
        "digest": digest,
        "task": task,
        "scorer": task.scorer,
        "scorer_version": task.scorer_version,
        "precision": "fp32",
    }


def sql(store: Store, statement: str, *values: Any, rules: bool = False) -> list[Any]:
    """What the database itself answers, behind lori's back.

    Args:
        rules: keep triggers and foreign keys on.
    """
    backend = store._db.backend
    if isinstance(backend, SQLite):
        with contextlib.closing(sqlite3.connect(backend.path, isolation_level=None)) as file:
            return file.execute(statement, values).fetchall()
    import psycopg

    with psycopg.connect(backend.shown, autocommit=True) as connection:
        if not rules:
            connection.execute("SET session_replication_role = replica")
        cursor = connection.execute(statement.replace("?", "%s"), values or None)
        return cursor.fetchall() if cursor.description else []


# run by other processes


def write_versions(root: Path, line: str, count: int) -> None:
    with Store.open(root) as store:
        for _ in range(count):
            store.add_adapter(new_adapter(line), os.urandom(200))


def write_until_killed(root: Path, line: str, acknowledged: Path) -> None:
    store = Store.open(root)
    fd = os.open(acknowledged, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    while True:
        adapter = store.add_adapter(new_adapter(line), os.urandom(5000))
        os.write(fd, f"{adapter.version} {adapter.digest}\n".encode())


def create_store(root: Path, server: Postgres | None, said: Path) -> None:
    try:
        Store.create(root, server).close()
    except Conflict:
        result = "conflict"
    else:
        result = "created"
    Store.open(root).lines()
    said.write_text(result)


def upgrade_store(root: Path, migrations: Path, said: Path) -> None:
    from lori_manager.store import database

    database.HEAD = NEXT
    database.migrations_folder = lambda: migrations
    done = database.upgrade(root)
    said.write_text(f"{done.before} {done.after}")


def lose_files(store: Store, patch: pytest.MonkeyPatch) -> list[Collection[str]]:
    """What a writing transaction looks for is gone each time; returns what was looked for."""
    looks: list[Collection[str]] = []

    def gone(files: Collection[str]) -> list[str]:
        looks.append(files)
        for digest in files:
            store.objects.remove(digest)
        return list(files)

    patch.setattr(store.objects, "missing", gone)
    return looks
