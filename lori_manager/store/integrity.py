"""What `lori verify` finds: rows without files, altered files and blobs, files without rows."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator

from sqlalchemy import Connection, select

from lori_manager.errors import DamagedObject, LoriError
from lori_manager.records import Finding
from lori_manager.store import scores, tasks
from lori_manager.store import tables as t
from lori_manager.store.database import Database
from lori_manager.store.files import MissingObject, ObjectStore

_AT_ONCE = 50  # pages of scores a transaction, so that writers are not kept waiting


def needed(connection: Connection) -> dict[str, list[str]]:
    """Digest -> what needs that file: `safety@3`, `safety%1`, `safety#2 train`."""
    by_digest: dict[str, list[str]] = defaultdict(list)
    for row in connection.execute(select(t.splits).order_by(t.splits.c.id)):
        by_digest[row.digest].append(f"{row.task}#{row.task_revision} {row.name}")
    masks = select(t.masks.c.digest, t.masks.c.task, t.masks.c.version).order_by(t.masks.c.id)
    for row in connection.execute(masks):
        by_digest[row.digest].append(f"{row.task}%{row.version}")
    adapters = select(t.adapters.c.digest, t.adapters.c.line, t.adapters.c.version)
    for row in connection.execute(adapters.order_by(t.adapters.c.id)):
        by_digest[row.digest].append(f"{row.line}@{row.version}")
    return by_digest


def _of_images(connection: Connection) -> list[tuple[str, str]]:
    """(digest of the rows, `watercolour#1 train`) of all splits whose rows name images."""
    named = (t.splits.c.task == t.tasks.c.name) & (t.splits.c.task_revision == t.tasks.c.revision)
    chosen = select(t.splits, t.tasks.c.options).join(t.tasks, named).order_by(t.splits.c.id)
    return [
        (row.digest, f"{row.task}#{row.task_revision} {row.name}")
        for row in connection.execute(chosen)
        if "images" in row.options
    ]


def _all_needed(database: Database, objects: ObjectStore) -> dict[str, list[str]]:
    """As `needed`, with the images that rows name."""
    with database.read() as connection:
        by_digest, splits = needed(connection), _of_images(connection)
    for digest, subject in splits:
        with contextlib.suppress(LoriError):  # told where the rows' own file is checked
            for line in objects.get(digest).splitlines():
                by_digest[json.loads(line)["image"]].append(subject)
    return by_digest


def verify(database: Database, objects: ObjectStore) -> Iterator[Finding]:
    """Everything that is wrong, without changing anything and in short transactions."""
    parts = (_of_database(database), _of_blobs(database), _of_objects(database, objects))
    for part in parts:
        try:
            yield from part
        except DamagedObject as e:  # rows too broken to read; the other parts still can be
            yield Finding("damaged", "registry.db", str(e))


def _of_database(database: Database) -> Iterator[Finding]:
    with database.read() as connection:
        faults = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
        astray = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    for fault in faults:
        if fault != "ok":
            yield Finding("damaged", "registry.db", f"registry.db is damaged: {fault}")
    for table, row, target, _ in astray:
        message = f"row {row} of {table} points at a row of {target} that is not there"
        yield Finding("damaged", "registry.db", message)


def _of_blobs(database: Database) -> Iterator[Finding]:
    with database.read() as connection:
        tasks.revisions(connection)  # raises where a task has lost its rows
        pages = scores.page_keys(connection)
    for start in range(0, len(pages), _AT_ONCE):
        with database.read() as connection:
            faults = list(scores.faults(connection, pages[start : start + _AT_ONCE]))
        yield from faults


def _of_objects(database: Database, objects: ObjectStore) -> Iterator[Finding]:
    by_digest = _all_needed(database, objects)
    for digest, subjects in by_digest.items():
        try:
            objects.check(digest)
        except LoriError as e:
            kind = "missing" if isinstance(e, MissingObject) else "damaged"
            yield from (Finding(kind, subject, f"{subject}: {e}") for subject in subjects)
    found = list(objects.digests())
    by_digest = _all_needed(database, objects)  # again: rows may have come for the newest files
    for digest in found:
        if digest not in by_digest:
            yield Finding("orphan", digest, f"no row needs {objects.path(digest)}")
    for path in objects.leftovers():
        yield Finding("orphan", path.name, f"{path} was left by an interrupted write")
