"""Scores that come in: found again, mended, or put on the newest page of their setting."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Row, Table, bindparam, delete, func, insert, select, update

from lori_manager.errors import Conflict
from lori_manager.records import JSON, NewScore, Score
from lori_manager.store import outcomes, tasks, varints
from lori_manager.store import pages as paging
from lori_manager.store import tables as t
from lori_manager.store.pages import Entry, Page
from lori_manager.store.scores import (
    AT_ONCE,
    EPOCH,
    MEASURED,
    SETTING,
    SLOTS,
    WHERE,
    micros,
    page_rows,
    subject_of,
    weights_content,
    weights_fault,
)
from lori_manager.store.tables import canonical, now

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    New = tuple[NewScore, NDArray[Any], NDArray[Any] | None]

# From 128 on a key takes two bytes in a page, which hardly stand there by chance: so the
# pages without a subject are told from the others at a glance.
_NEXT_SUBJECT = select(func.coalesce(func.max(t.subjects.c.id), 127) + 1).scalar_subquery()

logger = logging.getLogger(__name__)


def add(
    connection: Connection,
    new: Sequence[New],
    at: Sequence[datetime] | None = None,
    *,
    keep: bool = False,
) -> list[Score]:
    """Commit scores with their outcomes and weights; one of a known key is as it is stored.

    Args:
        at: when each was made; now, where None.
        keep: where other outcomes are stored under a name that they were given elsewhere, leave
            those, too, without a word.
    """
    return _Writer(connection, keep).add(new, at or [now()] * len(new))


@dataclass
class _Pages:
    """The pages of one setting while scores are added."""

    setting: int
    rows: int
    stored: list[Row[*tuple[Any, ...]]] = field(default_factory=list)  # without bodies
    loaded: dict[int, Page] = field(default_factory=dict)  # by number
    added: dict[int, tuple[Page, int]] = field(default_factory=dict)  # subject -> place

    def take(self, row: Row[*tuple[Any, ...]]) -> Page:
        """Let a stored page be changed; given with its bodies."""
        page = Page.read(row.number, self.rows, row.id, row.directory, row.reference, row.bodies)
        self.loaded[row.number] = page
        return page

    def find(self, connection: Connection, subject: int) -> tuple[Page, int] | None:
        """Where a subject's score is."""
        if subject in self.added:
            return self.added[subject]
        trace = varints.encode([subject])
        likely = [row for row in self.stored if trace in row.directory]
        if likely:
            found = paging.read_directories([row.directory for row in likely])
            for i in (found.subject == subject).nonzero()[0]:
                row = likely[int(found.page[i])]
                page = self.loaded.get(row.number)
                if page is None:
                    page = self.take(page_rows(connection, {row.id})[row.id])
                return page, int(found.slot[i])
        return None

    def append(self, entry: Entry, values: NDArray[Any]) -> None:
        """Put a score on the newest page, or begin the next."""
        page = self.loaded[max(self.loaded)] if self.loaded else None
        slot = None if page is None else page.add(entry, values)
        if page is None or slot is None:
            number = 0 if page is None else page.number + 1
            consensus = None if page is None else page.consensus()
            page = Page.begin(number, self.rows, consensus, values)
            slot = page.add(entry, values)
            self.loaded[number] = page
        if slot is None:
            raise ValueError("a new page refused its first score")
        self.added[entry.subject] = page, slot


class _Writer:
    """Adds scores within one transaction, in few queries; each page is written once."""

    def __init__(self, connection: Connection, keep: bool) -> None:
        self._connection = connection
        self._keep = keep
        self._rows: dict[tuple[str, int], int] = {}
        self._subjects: dict[str, tuple[str, str]] = {}
        self._keys: dict[tuple[str, ...], int] = {}
        self._settings: dict[tuple[Any, ...], int] = {}
        self._pages: dict[int, _Pages] = {}

    def add(self, new: Sequence[New], at: Sequence[datetime]) -> list[Score]:
        """The scores as they are stored in the end."""
        checked = [self._checked(*one) for one in new]
        self._load({setting: len(values) for _, _, setting, values, _ in checked})
        scores, places = [], []
        for (score, subject, setting, values, weights), moment in zip(checked, at, strict=True):
            score = replace(score, created_at=moment)
            entry = self._entry(score, subject, values, weights)
            pages = self._pages[setting]
            place = pages.find(self._connection, subject)
            if place is None:
                pages.append(entry, values)
                place = pages.added[subject]
            else:
                score = self._stored(score, place, entry, values)
            scores.append(score)
            places.append(place)
        self._finish()
        return [
            replace(score, id=(page.id or 0) << SLOTS | slot)
            for score, (page, slot) in zip(scores, places, strict=True)
        ]

    def _checked(
        self, new: NewScore, values: NDArray[Any], weights: NDArray[Any] | None
    ) -> tuple[Score, int, int, NDArray[np.float32], NDArray[Any] | None]:
        """The score to be, the keys of its subject and setting, outcomes and weights."""
        import numpy as np

        values = np.asarray(values).astype(np.float32)
        if values.ndim != 1:
            raise ValueError(f"outcomes must have shape (rows,), got {values.shape}")
        if weights is not None and weights.shape != values.shape:
            raise ValueError(f"expected weights of shape {values.shape}, got {weights.shape}")
        rows = self._eval_rows(new)
        if len(values) != rows:
            raise ValueError(
                f"{new.task}#{new.task_revision} has {rows} eval rows, got {len(values)} outcomes"
            )
        if new.subject not in self._subjects:
            self._subjects[new.subject] = subject_of(self._connection, new.subject)
        digest, ref = self._subjects[new.subject]
        if digest != new.digest:
            raise ValueError(f"{new.subject} has digest {digest}, got {new.digest}")
        score = Score(**vars(new) | {"subject": ref, "scorer_version": str(new.scorer_version)})
        key = self._key(t.subjects, also={"id": _NEXT_SUBJECT}, digest=digest)
        return score, key, self._setting(score), values, weights

    def _eval_rows(self, new: NewScore) -> int:
        if not self._rows:
            query = select(t.splits).where(t.splits.c.name == "eval")
            self._rows = {
                (row.task, row.task_revision): row.rows for row in self._connection.execute(query)
            }
        key = new.task, new.task_revision
        if key not in self._rows:  # says what there is
            self._rows[key] = tasks.one(self._connection, *key).splits["eval"].rows
        return self._rows[key]

    def _load(self, settings: dict[int, int]) -> None:
        """The pages of settings (key -> eval rows): all directories, and the newest in full."""
        self._pages = {key: _Pages(key, rows) for key, rows in settings.items()}
        ordered = sorted(settings)
        newest = {}
        for start in range(0, len(ordered), AT_ONCE):
            query = (
                select(*WHERE, t.score_pages.c.directory)
                .where(t.score_pages.c.setting.in_(ordered[start : start + AT_ONCE]))
                .order_by(t.score_pages.c.setting, t.score_pages.c.number)
            )
            for row in self._connection.execute(query).all():
                if paging.opened(row.directory) is None:
                    logger.warning("a list of scores cannot be read any more and is given up")
                    gone = t.score_pages.c.id == row.id
                    self._connection.execute(delete(t.score_pages).where(gone))
                else:
                    self._pages[row.setting].stored.append(row)
                    newest[row.setting] = row.id
        for row in page_rows(self._connection, set(newest.values())).values():
            self._pages[row.setting].take(row)

    def _finish(self) -> None:
        """Write the pages that changed."""
        changed = []
        for pages in self._pages.values():
            for page in pages.loaded.values():
                parts = {
                    "directory": page.directory,
                    "reference": page.reference,
                    "bodies": page.bodies,
                }
                if page.changed and page.id is not None:
                    changed.append({"key": page.id, **parts})
                elif page.changed:
                    made = self._connection.execute(
                        insert(t.score_pages),
                        {"setting": pages.setting, "number": page.number, **parts},
                    ).inserted_primary_key
                    page.id = None if made is None else made[0]
        if changed:
            self._connection.execute(
                update(t.score_pages).where(t.score_pages.c.id == bindparam("key")), changed
            )

    def _stored(
        self, score: Score, place: tuple[Page, int], entry: Entry, values: NDArray[Any]
    ) -> Score:
        """A score that is there; mended where it is damaged."""
        import numpy as np

        page, slot = place
        found = paging.read_directories([page.directory])
        (told,) = paging.decode_bodies(found, [slot], [page.bodies], [page.reference], page.rows)
        ((_, stored),) = paging.listed(found, [slot])
        at = EPOCH + timedelta(microseconds=stored.entry.at)
        score = replace(score, created_at=at)
        key = stored.entry.weights
        if isinstance(told, str) or (key and weights_fault(self._connection, key, page.rows)):
            page.mend(slot, entry, values)
            return score
        same = np.array_equal(told, values, equal_nan=True) and key == entry.weights
        if score.origin != MEASURED and not same and not self._keep:
            raise Conflict(
                f"other outcomes of {score.subject} on {score.task}#{score.task_revision} are "
                f"stored under the origin {score.origin!r}: name another origin"
            )
        value, error, rows = stored.figures(page.rows)
        facts = self._connection.execute(
            select(t.score_facts.c.facts).where(t.score_facts.c.id == stored.entry.facts)
        ).scalar_one()
        return replace(score, value=value, error=error, rows=rows, facts=facts)

    def _entry(
        self, score: Score, subject: int, values: NDArray[Any], weights: NDArray[Any] | None
    ) -> Entry:
        mark = hashlib.sha256(canonical(score.facts).encode()).hexdigest()
        facts = self._key(t.score_facts, digest=mark, also={"facts": score.facts})
        key = 0 if weights is None else self._weights(weights)
        value, error = float(score.value), float(score.error)
        right, figures = paging.figures_of(values, value, error, score.rows)
        return Entry(subject, micros(score.created_at), facts, key, right, figures)

    def _weights(self, weights: NDArray[Any]) -> int:
        content = outcomes.encode_floats(weights)
        digest = hashlib.sha256(content).hexdigest()
        fresh = ("row_weights", digest) not in self._keys
        key = self._key(t.row_weights, digest=digest, also={"content": paging.sealed(content)})
        if fresh and paging.opened(weights_content(self._connection, key)) is None:
            self._connection.execute(
                update(t.row_weights)
                .where(t.row_weights.c.id == key)
                .values(content=paging.sealed(content))
            )
        return key

    def _key(self, table: Table, also: JSON | None = None, **values: Any) -> int:
        """The key of the row with these values, which is added where there is none."""
        cached = table.name, *(str(v) if isinstance(v, (str, int)) else canonical(v)
                               for v in values.values())  # fmt: skip
        if cached not in self._keys:
            same = [table.c[name] == value for name, value in values.items()]
            key = self._connection.execute(select(table.c.id).where(*same)).scalar_one_or_none()
            if key is None:
                made = self._connection.execute(
                    insert(table).values(**values, **(also or {}))
                ).inserted_primary_key
                if made is None:
                    raise TypeError(f"the database gave no key for a row of {table.name}")
                key = made[0]
            self._keys[cached] = key
        return self._keys[cached]

    def _setting(self, score: Score) -> int:
        if not self._settings:  # a whole history has hundreds: one query instead of as many
            for row in self._connection.execute(select(t.settings)):
                self._settings[tuple(row._mapping[name] for name in SETTING)] = row.id
        values = {name: getattr(score, name) for name in SETTING}
        key = tuple(values.values())
        if key not in self._settings:
            self._settings[key] = self._key(t.settings, **values)
        return self._settings[key]
