"""Tasks: a scorer and frozen rows, revision by revision."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, func, insert, select, tuple_

from lori_manager.errors import Conflict, DamagedObject, NotFound
from lori_manager.records import JSON, Split, Task
from lori_manager.refs import check_name
from lori_manager.store import names
from lori_manager.store import tables as t
from lori_manager.store.tables import now

KEY_BYTES = 16  # of the SHA-256 that names a row, as `tasks.rows` has it


def add(
    connection: Connection,
    name: str,
    *,
    scorer: str,
    scorer_version: str,
    description: str,
    splits: Mapping[str, Split],
    options: JSON,
) -> Task:
    """Add the task, or a revision of it where rows or scorer differ from the latest."""
    check_name(name, "task")
    if "eval" not in splits:
        raise ValueError(f"a task needs an eval split, got {', '.join(splits) or 'none'}")
    line = names.find(connection, name, lock=True)
    if line is not None and not line.of_task:
        raise Conflict(f"{name!r} is the name of a line: choose another name for the task")
    revision = 1
    if line is None:
        names.add(connection, name, of_task=True)
    else:
        latest = one(connection, name, None)
        if (latest.scorer, latest.scorer_version, _digests(latest.splits)) == (
            scorer,
            scorer_version,
            _digests(splits),
        ):
            return latest
        revision = latest.revision + 1
    new = Task(name, revision, scorer, scorer_version, description, splits, options, now())
    insert_as(connection, new)
    return one(connection, name, revision)


def insert_as(connection: Connection, task: Task) -> None:
    """Add that revision as it is; its line is there."""
    connection.execute(
        insert(t.tasks).values(
            name=task.name,
            revision=task.revision,
            scorer=task.scorer,
            scorer_version=task.scorer_version,
            description=task.description,
            options=task.options,
            created_at=task.created_at,
        )
    )
    for split_name, split in task.splits.items():
        connection.execute(
            insert(t.splits).values(
                task=task.name,
                task_revision=task.revision,
                name=split_name,
                digest=split.digest,
                rows=split.rows,
                tokens=split.tokens,
                longest=split.longest,
                truncated=split.truncated,
            )
        )


def _digests(splits: Mapping[str, Split]) -> dict[str, str]:
    return {name: split.digest for name, split in splits.items()}


def one(connection: Connection, name: str, revision: int | None) -> Task:
    """That revision of the task, or the latest.

    Raises:
        NotFound: with the known tasks or revisions.
    """
    latest = connection.execute(
        select(func.max(t.tasks.c.revision)).where(t.tasks.c.name == name)
    ).scalar_one()
    if latest is None:
        raise names.not_found("task", name, [task.name for task in every(connection)])
    wanted = latest if revision is None else revision
    found = []
    if 1 <= wanted <= latest:
        found = _select(connection, t.tasks.c.name == name, t.tasks.c.revision == wanted)
    if not found:
        own = select(t.tasks.c.revision).where(t.tasks.c.name == name)
        known = names.numbers(connection.execute(own).scalars().all())
        raise NotFound(f"task {name!r} has no revision {wanted}: it has {known}")
    return found[0]


def every(connection: Connection) -> list[Task]:
    """The latest revision of each task, by the creation of the tasks."""
    newest = select(t.tasks.c.name, func.max(t.tasks.c.revision)).group_by(t.tasks.c.name)
    found = _select(connection, tuple_(t.tasks.c.name, t.tasks.c.revision).in_(newest))
    order = connection.execute(select(t.lines.c.name).order_by(t.lines.c.id)).scalars()
    position = {name: i for i, name in enumerate(order)}
    return sorted(found, key=lambda task: position[task.name])


def revisions(connection: Connection, name: str | None = None) -> list[Task]:
    """All revisions of a task, or of all tasks, oldest first."""
    if name is None:
        return _select(connection)
    one(connection, name, None)
    return _select(connection, t.tasks.c.name == name)


def row_keys(task: Task, content: bytes) -> list[bytes]:
    """The hashes of eval rows, in their order: of each line of the stored JSONL.

    Raises:
        DamagedObject: other rows than the task has.
    """
    lines = content.split(b"\n")[:-1]
    if len(lines) != task.splits["eval"].rows:
        raise DamagedObject(
            f"{task.ref} has {task.splits['eval'].rows} eval rows, its file {len(lines)}: "
            "restore the file from a copy"
        )
    return [hashlib.sha256(line).digest()[:KEY_BYTES] for line in lines]


def _select(connection: Connection, *where: ColumnElement[bool]) -> list[Task]:
    rows = connection.execute(select(t.tasks).where(*where).order_by(t.tasks.c.id)).all()
    of_these = tuple_(t.splits.c.task, t.splits.c.task_revision).in_(
        select(t.tasks.c.name, t.tasks.c.revision).where(*where)
    )
    splits: dict[tuple[str, int], dict[str, Split]] = defaultdict(dict)
    for row in connection.execute(select(t.splits).where(of_these).order_by(t.splits.c.id)):
        splits[row.task, row.task_revision][row.name] = Split(
            digest=row.digest,
            rows=row.rows,
            tokens=row.tokens,
            longest=row.longest,
            truncated=row.truncated,
        )
    return [_task(row, splits[row.name, row.revision]) for row in rows]


def _task(row: Row[Any], splits: dict[str, Split]) -> Task:
    if "eval" not in splits:
        raise DamagedObject(f"task {row.name}#{row.revision} has lost its rows: run `lori verify`")
    return Task(
        name=row.name,
        revision=row.revision,
        scorer=row.scorer,
        scorer_version=row.scorer_version,
        description=row.description,
        splits=splits,
        options=row.options,
        created_at=row.created_at,
    )
