"""What weights answered to single rows of a task: kept, so that no row is run twice.

Answers can be made again, so a damaged one counts as none and is replaced when it is added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import ColumnElement, Connection, delete, insert, select

from lori_manager.records import Task
from lori_manager.store import tables as t
from lori_manager.store import tasks
from lori_manager.store.packed import pack, unpack


def find(
    connection: Connection,
    *,
    digest: str,
    task: Task,
    scorer_version: str,
    precision: str,
    encoding: str,
    rows: Sequence[int],
) -> dict[int, str]:
    """Row -> answer, of those rows that are known."""
    found: dict[int, str] = {}
    where = _of(digest, task, scorer_version, precision, encoding)
    for row in sorted(set(rows)):
        query = select(t.answers.c.answer).where(*where, t.answers.c.row == row)
        stored = connection.execute(query).scalar_one_or_none()
        content = None if stored is None else unpack(stored)
        if content is not None:
            found[row] = content.decode()
    return found


def add(
    connection: Connection,
    *,
    digest: str,
    task: Task,
    scorer_version: str,
    precision: str,
    encoding: str,
    answers: Mapping[int, str],
) -> None:
    """Keep answers by row; they take the place of those known before."""
    tasks.one(connection, task.name, task.revision)
    where = _of(digest, task, scorer_version, precision, encoding)
    for row, answer in answers.items():
        connection.execute(delete(t.answers).where(*where, t.answers.c.row == row))
        connection.execute(
            insert(t.answers).values(
                digest=digest,
                task=task.name,
                task_revision=task.revision,
                scorer=task.scorer,
                scorer_version=scorer_version,
                precision=precision,
                encoding=encoding,
                row=row,
                answer=pack(answer.encode()),
            )
        )


def _of(
    digest: str, task: Task, scorer_version: str, precision: str, encoding: str
) -> tuple[ColumnElement[bool], ...]:
    return (
        t.answers.c.digest == digest,
        t.answers.c.task == task.name,
        t.answers.c.task_revision == task.revision,
        t.answers.c.scorer == task.scorer,
        t.answers.c.scorer_version == scorer_version,
        t.answers.c.precision == precision,
        t.answers.c.encoding == encoding,
    )


def answered(connection: Connection) -> set[tuple[str, int]]:
    """The task revisions of which any answer is known."""
    query = select(t.answers.c.task, t.answers.c.task_revision).distinct()
    return {(row.task, row.task_revision) for row in connection.execute(query)}
