"""Scores: what was measured of weights on a task revision, with one outcome per row.

A score's key is the digest of the weights and its setting: task revision, scorer and
version, precision, how rows became tokens, origin. So `safety@1` and `safety@2` of one
digest share a score and its outcomes, and each lists it under its own name. The scores of
a setting lie in pages; see `pages`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Connection, Row, select

from lori_manager.errors import DamagedObject, NotFound
from lori_manager.records import Finding, Score, Task
from lori_manager.refs import BASE
from lori_manager.store import adapters, bases, outcomes, removals, tasks, varints
from lori_manager.store import pages as paging
from lori_manager.store import tables as t
from lori_manager.store.pages import DamagedPage, Directory, Listed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    _Outcomes = tuple[NDArray[np.float32], NDArray[np.float32] | None]

MEASURED = "measured"  # the origin of what lori scored itself
SLOTS = 16  # bits of a score's id that number it within its page
AT_ONCE = 1000  # keys a query
_FEW = 20  # pages that are faster read without numpy
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MENDING = "score again, or restore the database from a copy"
WHERE = (t.score_pages.c.id, t.score_pages.c.setting, t.score_pages.c.number)
SETTING = (
    "task",
    "task_revision",
    "scorer",
    "scorer_version",
    "precision",
    "encoding",
    "origin",
)


def every(
    connection: Connection,
    *,
    subject: str | None = None,
    subjects: Collection[str] | None = None,
    task: str | None = None,
    revision: int | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> list[Score]:
    """Scores by creation; those of shared weights appear once for each adapter of them.

    Args:
        subject: a reference, which is looked up.
        subjects: names as records bear them; not looked up.
    """
    where: list[ColumnElement[bool]] = []
    if task is not None:
        tasks.one(connection, task, revision)
        where.append(t.settings.c.task == task)
    if revision is not None:
        where.append(t.settings.c.task_revision == revision)
    of_subject = None if subject is None else subject_of(connection, subject)
    settings = _settings(connection, *where)
    if not settings:
        return []
    only = None
    if of_subject is None:
        names = _names(connection)
    else:
        digest, ref = of_subject
        own_key = select(t.subjects.c.id).where(t.subjects.c.digest == digest)
        only = connection.execute(own_key).scalar_one_or_none() or 0
        names = {only: (digest, [ref])} if only else {}
    if subjects is not None:
        asked = frozenset(subjects)
        own = ((key, d, [ref for ref in refs if ref in asked]) for key, (d, refs) in names.items())
        names = {key: (d, refs) for key, d, refs in own if refs}
    stored = _directory_rows(connection, settings, all_settings=not where, subject=only)
    times = (-math.inf if since is None else micros(since),
             math.inf if until is None else micros(until))  # fmt: skip
    if only is not None and len(stored) <= _FEW:
        chosen = _of_one(stored, settings, only, times)
    else:
        every_name = subject is None and subjects is None
        chosen = _of_many(stored, settings, None if every_name else names, times)
    listed = _records(connection, settings, chosen, names)
    return sorted(listed, key=lambda score: (score.created_at, score.id))


_Chosen = Iterator[tuple[Row[*tuple[Any, ...]], Listed]]


def _of_one(
    stored: Sequence[Row[*tuple[Any, ...]]],
    settings: dict[int, Row[*tuple[Any, ...]]],
    subject: int,
    times: tuple[float, float],
) -> _Chosen:
    """A subject's scores on few pages, without numpy, which takes long to load."""
    for page in stored:
        if paging.opened(page.directory) is None:
            _read([page], settings)  # says what is damaged
        one = paging.look_up(page.directory, subject)
        if one is not None and times[0] <= one.entry.at < times[1]:
            yield page, one


def _of_many(
    stored: Sequence[Row[*tuple[Any, ...]]],
    settings: dict[int, Row[*tuple[Any, ...]]],
    subjects: Collection[int] | None,
    times: tuple[float, float],
) -> _Chosen:
    """The scores of these subjects, or of all, made then."""
    import numpy as np

    found = _read(stored, settings)
    wanted = (found.at >= times[0]) & (found.at < times[1])
    if subjects is not None:
        wanted &= np.isin(found.subject, list(subjects))
    for page, one in paging.listed(found, np.flatnonzero(wanted).tolist()):
        yield stored[page], one


def known(
    connection: Connection,
    *,
    digest: str,
    keys: Sequence[tuple[Task, str, str]],
    precision: str,
    encoding: str,
) -> list[Score | None]:
    """What lori itself measured under each (task, scorer, scorer's version).

    It bears the first name of the weights. A score whose outcomes are damaged counts as
    none, so that it is measured and added again, which heals it. One whose encoding was
    never noted fits any.
    """
    subject = connection.execute(
        select(t.subjects.c.id).where(t.subjects.c.digest == digest)
    ).scalar_one_or_none()
    settings = _settings(
        connection,
        t.settings.c.origin == MEASURED,
        t.settings.c.precision == precision,
        t.settings.c.encoding.in_({encoding, ""}),
    )
    asked = {
        (task.name, task.revision, scorer, str(version)): i
        for i, (task, scorer, version) in enumerate(keys)
    }
    fitting = {
        s.id: s
        for s in settings.values()
        if (s.task, s.task_revision, s.scorer, s.scorer_version) in asked
    }
    out: list[Score | None] = [None] * len(keys)
    if subject is None or not fitting:
        return out
    hits = {}
    for page in _directory_rows(connection, fitting, subject=subject):
        found = paging.look_up(page.directory, subject)
        if found is not None:
            hits[page.id] = found
    whole = [
        (page, hits[key])
        for key, page in page_rows(connection, set(hits)).items()
        if _intact(connection, page, hits[key])
    ]
    names = _names(connection, digest)
    listed = _records(connection, fitting, whole, names, first_name=True)
    for score in sorted(listed, key=lambda score: score.encoding == encoding):
        place = (score.task, score.task_revision, score.scorer, score.scorer_version)
        out[asked[place]] = score
    return out


def arrays(connection: Connection, scores: Sequence[Score]) -> list[_Outcomes]:
    """Outcomes and weights of each, (eval rows,) float32."""
    import numpy as np

    pages = page_rows(connection, {score.id >> SLOTS for score in scores})
    settings = _settings(connection, t.settings.c.id.in_({page.setting for page in pages.values()}))
    digests = {row.id: row.digest for row in connection.execute(select(t.subjects))}
    by_rows: dict[int, list[int]] = defaultdict(list)
    for i, score in enumerate(scores):
        page = pages.get(score.id >> SLOTS)
        setting = None if page is None else settings.get(page.setting)
        task = score.task, score.task_revision
        if setting is None or (setting.task, setting.task_revision) != task:
            raise _gone(score)
        by_rows[setting.rows].append(i)
    out: dict[int, _Outcomes] = {}
    weights: dict[int, NDArray[np.float32]] = {}
    for rows, positions in by_rows.items():
        own = sorted({scores[i].id >> SLOTS for i in positions})
        stored = [pages[key] for key in own]
        found = _read(stored, settings)
        bounds = np.searchsorted(found.page, np.arange(len(own) + 1)).tolist()
        spans = dict(zip(own, pairwise(bounds), strict=True))
        chosen = []
        for i in positions:
            key, slot = scores[i].id >> SLOTS, scores[i].id & ((1 << SLOTS) - 1)
            at = spans[key][0] + slot
            if at >= spans[key][1] or digests.get(int(found.subject[at])) != scores[i].digest:
                raise _gone(scores[i])
            chosen.append(at)
        told = paging.decode_bodies(
            found, chosen, [p.bodies for p in stored], [p.reference for p in stored], rows
        )
        for i, at, values in zip(positions, chosen, told, strict=True):
            if isinstance(values, str):
                raise _damaged(scores[i].subject, settings[pages[scores[i].id >> SLOTS].setting],
                               values)  # fmt: skip
            key = int(found.weights[at])
            if key and key not in weights:
                weights[key] = _row_weights(connection, key, rows, scores[i])
            out[i] = values, weights.get(key)
    return [out[i] for i in range(len(scores))]


def reuse(connection: Connection, task: str, revision: int) -> int:
    """How many different weights were ever scored on that revision."""
    import numpy as np

    tasks.one(connection, task, revision)
    settings = _settings(
        connection, t.settings.c.task == task, t.settings.c.task_revision == revision
    )
    found = _read(_directory_rows(connection, settings), settings)
    return len(np.unique(found.subject))


def page_keys(connection: Connection) -> list[int]:
    """The keys of all pages."""
    query = select(t.score_pages.c.id).order_by(t.score_pages.c.id)
    return list(connection.execute(query).scalars())


def faults(connection: Connection, keys: Sequence[int]) -> Iterator[Finding]:
    """What is damaged in these pages."""
    settings, names = _settings(connection), _names(connection)
    for page in page_rows(connection, set(keys)).values():
        setting = settings.get(page.setting)
        if setting is None:  # told as a row that points nowhere
            continue
        ref = f"{setting.task}#{setting.task_revision}"
        try:
            found = _read([page], settings)
        except DamagedObject as e:
            yield Finding("damaged", ref, str(e))
            continue
        chosen = range(len(found.page))
        told = paging.decode_bodies(found, chosen, [page.bodies], [page.reference], setting.rows)
        for i, values in enumerate(told):
            digest, called = names.get(int(found.subject[i]), ("", []))
            fault = values if isinstance(values, str) else None
            if fault is None and found.weights[i]:
                fault = weights_fault(connection, int(found.weights[i]), setting.rows)
            if not digest:
                message = f"a score on {ref} is of weights that are not known"
                yield Finding("damaged", ref, message)
            if fault is not None:
                for name in called:
                    yield Finding("damaged", name, str(_damaged(name, setting, fault)))


# reading


def _settings(
    connection: Connection, *where: ColumnElement[bool]
) -> dict[int, Row[*tuple[Any, ...]]]:
    """Key -> setting, with the number of its eval rows."""
    query = (
        select(t.settings, t.splits.c.rows)
        .join(
            t.splits,
            (t.splits.c.task == t.settings.c.task)
            & (t.splits.c.task_revision == t.settings.c.task_revision)
            & (t.splits.c.name == "eval"),
        )
        .where(*where)
        .order_by(t.settings.c.id)
    )
    return {row.id: row for row in connection.execute(query)}


def _names(connection: Connection, digest: str | None = None) -> dict[int, tuple[str, list[str]]]:
    """Subject's key -> digest of the weights, and their names by creation, hidden ones left out.

    Args:
        digest: of these weights alone.
    """
    query = (
        select(t.subjects.c.id, t.subjects.c.digest, t.adapters.c.line, t.adapters.c.version)
        .outerjoin(t.adapters, t.adapters.c.digest == t.subjects.c.digest)
        .order_by(t.adapters.c.id)
    )
    if digest is not None:
        query = query.where(t.subjects.c.digest == digest)
    names: dict[int, tuple[str, list[str]]] = {}
    gone = removals.hidden_now(connection)
    for key, of, line, version in connection.execute(query):
        own = names.setdefault(key, (of, []))[1]
        if (line, version) not in gone:
            own.append(BASE if line is None else f"{line}@{version}")
    return names


def page_rows(connection: Connection, keys: set[int]) -> dict[int, Row[*tuple[Any, ...]]]:
    """Key -> page, bodies included."""
    ordered = sorted(keys)
    return {
        row.id: row
        for start in range(0, len(ordered), AT_ONCE)
        for row in connection.execute(
            select(t.score_pages).where(t.score_pages.c.id.in_(ordered[start : start + AT_ONCE]))
        )
    }


def _directory_rows(
    connection: Connection,
    settings: dict[int, Row[*tuple[Any, ...]]],
    *,
    all_settings: bool = False,
    subject: int | None = None,
) -> list[Row[*tuple[Any, ...]]]:
    """The pages of settings without their bodies, by setting and number.

    Args:
        all_settings: all there are, so that they need not be named.
        subject: leave out whole pages where its key stands nowhere.
    """
    query = select(*WHERE, t.score_pages.c.directory).order_by(
        t.score_pages.c.setting, t.score_pages.c.number
    )
    if not all_settings:
        query = query.where(t.score_pages.c.setting.in_(list(settings)))
    trace = b"" if subject is None else varints.encode([subject])
    return [
        row
        for row in connection.execute(query)
        if trace in row.directory or paging.opened(row.directory) is None
    ]


def _read(
    stored: Sequence[Row[*tuple[Any, ...]]], settings: dict[int, Row[*tuple[Any, ...]]]
) -> Directory:
    try:
        return paging.read_directories([page.directory for page in stored])
    except DamagedPage as e:
        page = stored[e.page]
        setting = settings[page.setting]
        raise DamagedObject(
            f"the list of scores {page.number + 1} on {setting.task}#{setting.task_revision} is "
            f"damaged ({e}): {_MENDING}"
        ) from e


def _records(
    connection: Connection,
    settings: dict[int, Row[*tuple[Any, ...]]],
    chosen: Iterable[tuple[Row[*tuple[Any, ...]], Listed]],
    names: dict[int, tuple[str, list[str]]],
    *,
    first_name: bool = False,
) -> list[Score]:
    """Records of what pages list, each under all of its names or the first."""
    facts = {row.id: row.facts for row in connection.execute(select(t.score_facts))}
    out = []
    for page, one in chosen:
        setting = settings[page.setting]
        value, error, rows = one.figures(setting.rows)
        digest, called = names.get(one.entry.subject, ("", []))
        if not digest or one.entry.facts not in facts:
            raise DamagedObject(
                f"a score on {setting.task}#{setting.task_revision} points nowhere: "
                "run `lori verify`, then restore the database from a copy"
            )
        for name in called[:1] if first_name else called:
            out.append(
                Score(
                    subject=name,
                    digest=digest,
                    task=setting.task,
                    task_revision=setting.task_revision,
                    scorer=setting.scorer,
                    scorer_version=setting.scorer_version,
                    precision=setting.precision,
                    value=value,
                    error=error,
                    rows=rows,
                    origin=setting.origin,
                    facts=facts[one.entry.facts],
                    encoding=setting.encoding,
                    id=page.id << SLOTS | one.slot,
                    created_at=EPOCH + timedelta(microseconds=one.entry.at),
                )
            )
    return out


def _intact(connection: Connection, page: Row[*tuple[Any, ...]], one: Listed) -> bool:
    """Whether the checksums of all that a score's outcomes need hold."""
    if paging.opened(page.bodies[one.start : one.start + one.length]) is None:
        return False
    flips = one.form & ~outcomes.GAPS == outcomes.FLIPS
    if flips and paging.opened(page.reference) is None:
        return False
    key = one.entry.weights
    return not key or paging.opened(weights_content(connection, key)) is not None


def weights_content(connection: Connection, key: int) -> bytes | None:
    """The rows' weights as they are stored."""
    query = select(t.row_weights.c.content).where(t.row_weights.c.id == key)
    return connection.execute(query).scalar_one_or_none()


def weights_fault(connection: Connection, key: int, rows: int) -> str | None:
    """What is wrong with the rows' weights, if anything is."""
    content = paging.opened(weights_content(connection, key))
    if content is None:
        return "the weights of the rows were altered"
    try:
        outcomes.decode_floats(content, rows)
    except ValueError as e:
        return f"the weights of the rows: {e}"
    return None


def _row_weights(connection: Connection, key: int, rows: int, score: Score) -> NDArray[np.float32]:
    fault = weights_fault(connection, key, rows)
    content = paging.opened(weights_content(connection, key))
    if fault is not None or content is None:
        raise _damaged(score.subject, score, fault or "")
    return outcomes.decode_floats(content, rows)


def _damaged(subject: str, on: Row[*tuple[Any, ...]] | Score, reason: str) -> DamagedObject:
    where = f"{on.task}#{on.task_revision}"
    return DamagedObject(f"outcomes of {subject} on {where} are damaged ({reason}): {_MENDING}")


def _gone(score: Score) -> NotFound:
    return NotFound(f"there is no score {score.id}: score {score.subject} again")


def subject_of(connection: Connection, subject: str) -> tuple[str, str]:
    """The digest of the weights, and the name in full."""
    if subject == BASE:
        return bases.one(connection).fingerprint, BASE
    return adapters.digest_of(connection, adapters.reference(subject))


def micros(at: datetime) -> int:
    """Microseconds since 1970 began."""
    return (at - EPOCH) // timedelta(microseconds=1)
