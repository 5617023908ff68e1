"""What `lori verify` finds: rows without files, altered files and blobs, files without rows."""

from __future__ import annotations

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Result, Table, select, tuple_

from lori_manager.errors import DamagedObject, LoriError
from lori_manager.records import Finding
from lori_manager.store import removals, scores, tasks
from lori_manager.store import tables as t
from lori_manager.store.database import Database
from lori_manager.store.files import MissingObject, object_name
from lori_manager.store.objects import Objects

_THREADS = min(8, os.cpu_count() or 1)
_AT_ONCE = 50  # pages of scores a transaction, so that writers are not kept waiting


def needed(
    connection: Connection,
    *,
    hidden_since: datetime | None = None,
    digests: Collection[str] | None = None,
) -> dict[str, list[str]]:
    """Digest -> what needs that file: `safety@3`, `safety%1`, `safety#2 train`.

    Args:
        hidden_since: versions that were hidden at that time or later need theirs, too.
        digests: look for these alone.
    """

    def chosen(table: Table, *columns: str) -> Result[Any]:
        query = select(*(table.c[name] for name in ("digest", *columns))).order_by(table.c.id)
        if digests is not None:
            query = query.where(table.c.digest.in_(digests))
        if table is t.adapters and removals.any_hidden(connection):
            gone = removals.hidden(hidden_since)
            query = query.where(tuple_(table.c.line, table.c.version).not_in(gone))
        return connection.execute(query)

    by_digest: dict[str, list[str]] = defaultdict(list)
    for row in chosen(t.splits, "task", "task_revision", "name"):
        by_digest[row.digest].append(f"{row.task}#{row.task_revision} {row.name}")
    for row in chosen(t.masks, "task", "version"):
        by_digest[row.digest].append(f"{row.task}%{row.version}")
    for row in chosen(t.adapters, "line", "version"):
        by_digest[row.digest].append(f"{row.line}@{row.version}")
    return by_digest


def rows_of_images(connection: Connection) -> list[tuple[str, str]]:
    """(digest of the rows, `watercolour#1 train`) of all splits whose rows name images."""
    named = (t.splits.c.task == t.tasks.c.name) & (t.splits.c.task_revision == t.tasks.c.revision)
    chosen = select(t.splits, t.tasks.c.options).join(t.tasks, named).order_by(t.splits.c.id)
    return [
        (row.digest, f"{row.task}#{row.task_revision} {row.name}")
        for row in connection.execute(chosen)
        if "images" in row.options
    ]


class Images:
    """The images that rows name. Rows are frozen, so each file of them is read once."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._known: dict[str, tuple[str, ...]] = {}

    def of_rows(self, digest: str) -> tuple[str, ...]:
        """The digests of the images that the rows in that file name.

        Raises:
            DamagedObject, MissingObject, StorageFailed: the file cannot be read.
        """
        if digest not in self._known:
            self._known[digest] = images_in(self._objects.get(digest))
        return self._known[digest]

    def needed(self, rows: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
        """Digest -> what needs that image, of `rows_of_images`; raises as `of_rows`."""
        by_digest: dict[str, list[str]] = defaultdict(list)
        for digest, name in rows:
            for image in self.of_rows(digest):
                by_digest[image].append(name)
        return by_digest


def images_in(rows: bytes) -> tuple[str, ...]:
    """The digests of the images that rows name, each once.

    Raises:
        DamagedObject: those are no rows of images.
    """
    try:
        found = tuple(dict.fromkeys(json.loads(row)["image"] for row in rows.splitlines()))
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise DamagedObject("rows of images name none: restore them from a copy") from e
    for digest in found:
        object_name(str(digest))
    return found


def verify(database: Database, objects: Objects) -> Iterator[Finding]:
    """Everything that is wrong, without changing anything and in short transactions."""
    parts = (_of_database(database), _of_blobs(database), _of_objects(database, objects))
    for part in parts:
        try:
            yield from part
        except DamagedObject as e:  # rows too broken to read; the other parts still can be
            yield Finding("damaged", database.backend.subject, str(e))


def _of_database(database: Database) -> Iterator[Finding]:
    with database.read() as connection:
        faults = list(database.backend.faults(connection))
    for fault in faults:
        yield Finding("damaged", database.backend.subject, fault)


def _of_blobs(database: Database) -> Iterator[Finding]:
    with database.read() as connection:
        tasks.revisions(connection)  # raises where a task has lost its rows
        pages = scores.page_keys(connection)
    for start in range(0, len(pages), _AT_ONCE):
        with database.read() as connection:
            faults = list(scores.faults(connection, pages[start : start + _AT_ONCE]))
        yield from faults


def _fault(objects: Objects, digest: str) -> LoriError | None:
    """What is wrong with an object."""
    try:
        objects.check(digest)
    except LoriError as e:
        return e
    return None


def _of_objects(database: Database, objects: Objects) -> Iterator[Finding]:
    images = Images(objects)

    def all_needed() -> dict[str, list[str]]:
        with database.read() as connection:
            by_digest, rows = needed(connection), rows_of_images(connection)
        for of_split in rows:
            with contextlib.suppress(LoriError):  # told where the rows' own file is checked
                for digest, names in images.needed([of_split]).items():
                    by_digest[digest] += names
        return by_digest

    by_digest = all_needed()
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing and reading let go of Python's lock
        checks = pool.map(lambda digest: _fault(objects, digest), by_digest)
        for subjects, fault in zip(by_digest.values(), checks, strict=True):
            if fault is not None:
                kind = "missing" if isinstance(fault, MissingObject) else "damaged"
                yield from (Finding(kind, name, f"{name}: {fault}") for name in subjects)
    found = list(objects.digests())
    by_digest = all_needed()  # again: rows may have come for the newest files
    for digest in found:
        if digest not in by_digest:
            yield Finding(
                "orphan", digest, f"no row needs {objects.where(digest)}: `lori gc` frees it"
            )
    for place in objects.leftovers():
        name = place.rpartition("/")[2]
        yield Finding("orphan", name, f"{place} was left by an interrupted write")
