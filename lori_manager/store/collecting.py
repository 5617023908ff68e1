"""gc: frees what no row needs, and keeps what any row does.

Each file is judged and removed within a writing transaction. Writers look for their file within
theirs, before they commit the row that names it, and put it again where it went: so no row is
ever left without its file, whoever runs when. The grace period spares what somebody is about to
commit, and lets a removal be taken back.
"""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from sqlalchemy import Connection, select

from lori_manager.records import Freed
from lori_manager.store import integrity, runs
from lori_manager.store import tables as t
from lori_manager.store.database import Database
from lori_manager.store.files import TEMPORARY, storing
from lori_manager.store.objects import Objects
from lori_manager.store.tables import now

GRACE = timedelta(hours=24)
WRITING = timedelta(hours=1)  # a temporary file that is younger may be some writer's
_AT_ONCE = 100  # files a transaction, so that writers are not kept waiting


def collect(
    database: Database, objects: Objects, root: Path, *, grace: timedelta, dry_run: bool
) -> Iterator[Freed]:
    """Free what is older than `grace` and needed by nobody; tells each after it is done.

    Args:
        root: the folder of the workspace's own files.
        grace: since a file was written, a version hidden, or a run's folder last changed.
        dry_run: tell only.
    Raises:
        DamagedObject, MissingObject: rows that name images cannot be read, so that it is not
            known which images are needed. Nothing was freed.
    """
    yield from _objects(database, objects, grace, dry_run)
    yield from _runs(database, root / "runs", grace, dry_run)
    yield from _temporaries(root, max(grace, WRITING), dry_run)


def _objects(
    database: Database, objects: Objects, grace: timedelta, dry_run: bool
) -> Iterator[Freed]:
    before = now() - grace
    images = integrity.Images(objects)
    with database.read() as connection:
        needed = integrity.needed(connection, hidden_since=before)
        rows = integrity.rows_of_images(connection)
    kept = needed.keys() | images.needed(rows)
    old = [d for d in objects.digests() if d not in kept and _older(objects.age(d), grace)]
    for start in range(0, len(old), _AT_ONCE):
        batch, done = old[start : start + _AT_ONCE], []
        with database.read() if dry_run else database.write() as connection:
            needed = integrity.needed(connection, hidden_since=before, digests=batch)
            kept = needed.keys() | images.needed(integrity.rows_of_images(connection))
            names = _names(connection, batch)
            for digest in batch:
                if digest in kept or not _older(objects.age(digest), grace):
                    continue
                kind, subject = "orphan", digest
                if digest in names:
                    kind, subject = "removed", ", ".join(names[digest])
                place = objects.where(digest)
                done.append(Freed(kind, subject, objects.size(digest), place))
                if not dry_run:
                    # a server that has ended this transaction has let its lock go
                    connection.exec_driver_sql("SELECT 1")
                    objects.remove(digest)
        yield from done


def _names(connection: Connection, digests: Sequence[str]) -> dict[str, list[str]]:
    """Digest -> the adapters that it is of."""
    names = defaultdict(list)
    query = select(t.adapters.c.digest, t.adapters.c.line, t.adapters.c.version)
    for row in connection.execute(query.where(t.adapters.c.digest.in_(digests))):
        names[row.digest].append(f"{row.line}@{row.version}")
    return names


def _older(age: timedelta | None, grace: timedelta) -> bool:
    return age is not None and age >= grace


def _runs(database: Database, folder: Path, grace: timedelta, dry_run: bool) -> Iterator[Freed]:
    """Folders of runs that have ended. A run's row is there before its folder."""
    with storing(folder):
        found = sorted(path for path in folder.iterdir() if path.is_dir())
    with database.read() as connection:
        going = {run.id for run in runs.unfinished(connection)}
    for path in found:
        if path.name in going:
            continue
        with storing(path):
            inside = [path, *path.rglob("*")]
            if not _older(_age(inside), grace):
                continue
            size = sum(file.stat().st_size for file in inside if file.is_file())
        if not dry_run:
            shutil.rmtree(path, ignore_errors=True)
        yield Freed("run", path.name, size, str(path))


def _temporaries(root: Path, grace: timedelta, dry_run: bool) -> Iterator[Freed]:
    """What killed writers left."""
    patterns = (f"{TEMPORARY}*", f"objects/*/{TEMPORARY}*", ".registry.*.new*")
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            with storing(path):
                try:
                    if not path.is_file() or not _older(_age([path]), grace):
                        continue
                    size = path.stat().st_size
                except FileNotFoundError:  # its writer has given it its name meanwhile
                    continue
                if not dry_run:
                    path.unlink(missing_ok=True)
            yield Freed("temporary", path.name, size, str(path))


def _age(paths: Sequence[Path]) -> timedelta:
    """Time since the last change of any of them."""
    return timedelta(seconds=time.time() - max(path.stat().st_mtime for path in paths))
