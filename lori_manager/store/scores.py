"""Scores: what was measured of weights on a task revision, with one outcome per row.

A score's key is the digest of the weights. So `safety@1` and `safety@2` of one digest
share a score and its outcomes, and each lists it under its own name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Connection, Row, insert, select, update

from lori_manager.errors import Conflict, DamagedObject, NotFound
from lori_manager.records import NewScore, Score, Task
from lori_manager.refs import BASE
from lori_manager.store import adapters, bases, tasks
from lori_manager.store import outcomes as codec
from lori_manager.store import tables as t
from lori_manager.store.tables import now

if TYPE_CHECKING:
    import numpy as np

MEASURED = "measured"  # the origin of what lori scored itself
_BLOBS = ("encoding", "outcomes", "weights")
_COLUMNS = [column for column in t.scores.c if column.name not in _BLOBS]


def add(
    connection: Connection,
    new: NewScore,
    *,
    encoding: str,
    outcomes: bytes,
    weights: bytes | None,
    rows: int,
) -> Score:
    """Commit a score of `rows` encoded outcomes; one of the same key is returned as stored."""
    task = tasks.one(connection, new.task, new.task_revision)
    if rows != task.splits["eval"].rows:
        raise ValueError(
            f"{task.ref} has {task.splits['eval'].rows} eval rows, got {rows} outcomes"
        )
    digest, here = _subject(connection, new.subject)
    if digest != new.digest:
        raise ValueError(f"{new.subject} has digest {digest}, got {new.digest}")
    same = (
        t.scores.c.digest == new.digest,
        t.scores.c.task == new.task,
        t.scores.c.task_revision == new.task_revision,
        t.scores.c.scorer == new.scorer,
        t.scores.c.scorer_version == new.scorer_version,
        t.scores.c.precision == new.precision,
        t.scores.c.origin == new.origin,
    )
    found = _select(connection, *same, *here)
    if not found:
        connection.execute(
            insert(t.scores).values(
                digest=new.digest,
                task=new.task,
                task_revision=new.task_revision,
                scorer=new.scorer,
                scorer_version=new.scorer_version,
                precision=new.precision,
                origin=new.origin,
                value=new.value,
                error=new.error,
                rows=new.rows,
                facts=new.facts,
                created_at=now(),
                encoding=encoding,
                outcomes=outcomes,
                weights=weights,
            )
        )
    elif not _whole(connection, found[0]):
        connection.execute(
            update(t.scores)
            .where(t.scores.c.id == found[0].id)
            .values(encoding=encoding, outcomes=outcomes, weights=weights)
        )
    elif new.origin != MEASURED and _bytes(connection, found[0]) != (outcomes, weights):
        raise Conflict(
            f"other outcomes of {new.subject} on {task.ref} are stored under the origin "
            f"{new.origin!r}: name another origin"
        )
    return _select(connection, *same, *here)[0]


def _bytes(connection: Connection, score: Score) -> tuple[bytes, bytes | None]:
    query = select(t.scores.c.outcomes, t.scores.c.weights).where(t.scores.c.id == score.id)
    row = connection.execute(query).one()
    return row.outcomes, row.weights


def _whole(connection: Connection, score: Score) -> bool:
    try:
        arrays(connection, score)
    except DamagedObject:
        return False
    return True


def find(
    connection: Connection,
    *,
    digest: str,
    task: Task,
    scorer: str,
    scorer_version: int,
    precision: str,
) -> Score | None:
    """What lori itself measured under that key, under the first name of the weights.

    A score whose outcomes are damaged counts as none, so that it is measured and
    added again, which heals it.
    """
    found = _select(
        connection,
        t.scores.c.digest == digest,
        t.scores.c.task == task.name,
        t.scores.c.task_revision == task.revision,
        t.scores.c.scorer == scorer,
        t.scores.c.scorer_version == scorer_version,
        t.scores.c.precision == precision,
        t.scores.c.origin == MEASURED,
    )
    return found[0] if found and _whole(connection, found[0]) else None


def every(
    connection: Connection, *, subject: str | None, task: str | None, revision: int | None
) -> list[Score]:
    """Scores by creation; those of shared weights appear once for each adapter of them."""
    where: list[ColumnElement[bool]] = []
    if subject is not None:
        digest, here = _subject(connection, subject)
        where += [t.scores.c.digest == digest, *here]
    if task is not None:
        tasks.one(connection, task, revision)
        where.append(t.scores.c.task == task)
    if revision is not None:
        where.append(t.scores.c.task_revision == revision)
    return _select(connection, *where)


def arrays(connection: Connection, score: Score) -> tuple[np.ndarray, np.ndarray | None]:
    """Outcomes and weights, each (eval rows,) float32."""
    row = connection.execute(
        select(t.scores.c.encoding, t.scores.c.outcomes, t.scores.c.weights, t.splits.c.rows)
        .join(
            t.splits,
            (t.splits.c.task == t.scores.c.task)
            & (t.splits.c.task_revision == t.scores.c.task_revision)
            & (t.splits.c.name == "eval"),
        )
        .where(t.scores.c.id == score.id)
    ).one_or_none()
    if row is None:
        raise NotFound(f"there is no score {score.id}: score {score.subject} again")
    outcomes = codec.decode(row.encoding, row.outcomes, row.rows)
    if row.weights is None:
        return outcomes, None
    return outcomes, codec.decode(codec.FLOAT32, row.weights, row.rows)


def _subject(connection: Connection, subject: str) -> tuple[str, list[ColumnElement[bool]]]:
    """The digest of the weights, and what tells this name of theirs from others."""
    if subject == BASE:
        return bases.one(connection).fingerprint, []
    adapter = adapters.one(connection, adapters.reference(subject))
    here = [t.adapters.c.line == adapter.line, t.adapters.c.version == adapter.version]
    return adapter.digest, here


def _select(connection: Connection, *where: ColumnElement[bool]) -> list[Score]:
    query = (
        select(*_COLUMNS, t.adapters.c.line, t.adapters.c.version)
        .outerjoin(t.adapters, t.adapters.c.digest == t.scores.c.digest)
        .where(*where)
        .order_by(t.scores.c.id, t.adapters.c.id)
    )
    return [_score(row) for row in connection.execute(query)]


def _score(row: Row[*tuple[Any, ...]]) -> Score:
    return Score(
        subject=BASE if row.line is None else f"{row.line}@{row.version}",
        digest=row.digest,
        task=row.task,
        task_revision=row.task_revision,
        scorer=row.scorer,
        scorer_version=row.scorer_version,
        precision=row.precision,
        value=row.value,
        error=row.error,
        rows=row.rows,
        origin=row.origin,
        facts=row.facts,
        id=row.id,
        created_at=row.created_at,
    )
