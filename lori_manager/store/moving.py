"""Moving records and files from one store to another, or out of a bundle.

Files come first, each checked against its digest and by what it is to be; then the rows that
need them, in one transaction for some dozens of versions: each version appears with its parents,
mask, task and scores or not at all. Whatever interrupts, the same call goes on: what is there is
found by its digest and left alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lori_manager.errors import Conflict, DamagedObject, NotFound
from lori_manager.records import Alias, Mask, Score
from lori_manager.refs import AdapterRef
from lori_manager.store.parcels import File, Parcel, images
from lori_manager.store.receiving import News, score_key

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lori_manager.store.store import Store

TASKS, MASKS, ADAPTERS, SCORES = 10, 50, 50, 500  # records a transaction
_AT_ONCE = 4  # files on their way, each in memory
_Any = TypeVar("_Any")
Check = Callable[[File, bytes], None]


class Source(Protocol):
    """Where records and files come from: a store, or a bundle."""

    @property
    def shown(self) -> str:
        """What messages call it."""
        ...

    def parcel(self, refs: Sequence[AdapterRef] | None) -> Parcel:
        """These adapters with all that they need; everything where None."""
        ...

    def outcomes(
        self, scores: Sequence[Score]
    ) -> Sequence[tuple[NDArray[Any], NDArray[Any] | None]]:
        """Outcomes and weights of its scores, (eval rows,) each."""
        ...

    def content(self, digest: str) -> bytes:
        """A file, checked against the digest. Raises DamagedObject."""
        ...


@dataclass(frozen=True)
class StoreSource:
    """A store as what is moved from."""

    store: Store
    shown: str

    def parcel(self, refs: Sequence[AdapterRef] | None) -> Parcel:
        """As of one moment."""
        return self.store.parcel(refs)

    def outcomes(
        self, scores: Sequence[Score]
    ) -> Sequence[tuple[NDArray[Any], NDArray[Any] | None]]:
        """Out of the database."""
        return self.store.outcomes_of(scores)

    def content(self, digest: str) -> bytes:
        """Out of the store's objects."""
        try:
            return self.store.objects.get(digest)
        except DamagedObject as e:
            raise type(e)(f"{self.shown}: {e}") from e


@dataclass(frozen=True)
class Moved:
    """What a move brought.

    Attributes:
        adapters: names of the versions that are new, as they are called in the target.
        known: how many were there already.
        back: versions that had been removed in the target and are back.
        removed: versions that come as removed ones: their numbers alone.
        tasks, masks: new ones.
        renumbered: masks whose number was taken: their name there -> here.
        scores: how many are new. files, bytes: that were copied.
        aliases: that were set.
        left: aliases that mean another version in the target, and were left so.
    """

    adapters: tuple[str, ...] = ()
    known: int = 0
    back: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    renumbered: tuple[tuple[str, str], ...] = ()
    scores: int = 0
    files: int = 0
    bytes: int = 0
    aliases: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


def move(
    source: Source,
    parcel: Parcel,
    target: Store,
    *,
    check: Check,
    aliases: bool = False,
    told: Callable[[str], None] = lambda _: None,
) -> Moved:
    """Bring what is new of a parcel into a store.

    Args:
        source: of the parcel.
        check: refuses a file's content that is not what it is to be; raises LoriError.
        aliases: set aliases that are new; none is moved that means another version.
        told: called with a line after each transaction.
    Raises:
        WrongBase: of another base. Conflict: the same name is something else in the target.
        DamagedObject: a file is not what its digest says, or not what it is to be.
        StorageFailed: a disk, the network or a server refused; the same call goes on.
    """
    news = target.news(parcel)
    keys = target.score_keys()
    fresh = [
        score
        for score in parcel.scores
        if score.subject not in news.gone and score_key(score) not in keys
    ]
    porter = _Porter(source, target, check)
    done = 0
    total = len(news.tasks) + len(news.masks) + len(news.adapters) + len(news.back) + len(fresh)
    new_masks: dict[str, str] = {}
    for part in _parts(parcel, news, fresh):
        added = porter.bring(part)
        new_masks |= {mask.digest: mask.ref for mask in added.masks}
        done += len(part.tasks) + len(added.masks) + len(part.adapters) + len(part.scores)
        told(f"{min(done, total)} of {total} records, {porter.bytes / 1e6:.0f} MB")
    set_now, left = _set_aliases(source, parcel, target) if aliases else ((), ())
    names = target.news(parcel).mask_names
    return Moved(
        adapters=tuple(a.ref for a in news.adapters if not a.hidden),
        known=sum(not a.hidden for a in parcel.adapters)
        - sum(not a.hidden for a in (*news.adapters, *news.back)),
        back=tuple(a.ref for a in news.back),
        removed=tuple(a.ref for a in news.adapters if a.hidden),
        tasks=tuple(task.ref for task in news.tasks),
        masks=tuple(new_masks.values()),
        renumbered=tuple((mask.ref, names[mask.ref]) for mask in parcel.masks
                         if names[mask.ref] != mask.ref),
        scores=len(fresh),
        files=porter.files,
        bytes=porter.bytes,
        aliases=set_now,
        left=left,
    )  # fmt: skip


class _Porter:
    """Carries files, then has their rows committed."""

    def __init__(self, source: Source, target: Store, check: Check) -> None:
        self._source, self._target, self._check = source, target, check
        self.files = self.bytes = 0

    def bring(self, part: Parcel) -> News:
        """One part: its files, then its rows."""
        outcomes = self._source.outcomes(part.scores)
        return self._target.take(part, outcomes, f"from {self._source.shown}", self._put)

    def _put(self, wanted: Parcel) -> list[str]:
        """Have the files of these records in the target; their digests."""
        files = self._carry_all(wanted.files())
        rows = self._target.objects.get  # of images, which are known once these are there
        for task in wanted.tasks:
            files += self._carry_all(images(task, rows))
        return [file.digest for file in files]

    def _carry_all(self, wanted: Iterable[File]) -> list[File]:
        files = list({(file.digest, file.kind): file for file in wanted}.values())
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for size in pool.map(self._carry, files):
                self.files += size is not None
                self.bytes += size or 0
        return files

    def _carry(self, file: File) -> int | None:
        """Have the file in the target; its bytes where it was copied."""
        objects = self._target.objects
        there = objects.keep(file.digest)
        content = objects.get(file.digest) if there else self._source.content(file.digest)
        self._check(file, content)
        if there:
            return None
        stored = objects.put(content)
        if stored != file.digest:
            raise DamagedObject(
                f"{self._source.shown}: the file of {file.subject} is not what its digest says"
            )
        return len(content)


def _parts(parcel: Parcel, news: News, scores: Sequence[Score]) -> Iterator[Parcel]:
    """What each transaction is to add: first what others need, and no more than is new."""
    empty = Parcel(base=parcel.base)
    lines = {line.name: line for line in parcel.lines}
    masks = {mask.ref: mask for mask in parcel.masks}
    runs = {run.id: run for run in parcel.runs}
    of: dict[str, list[Score]] = {}
    for score in scores:
        of.setdefault(score.subject, []).append(score)
    used = set()
    for tasks in _chunks(news.tasks, TASKS):
        used |= {task.name for task in tasks}
        own = dict.fromkeys(task.name for task in tasks)
        yield replace(empty, tasks=tasks, lines=tuple(lines[name] for name in own))
    added = {_content(mask) for mask in news.masks}
    for new in _chunks([m for m in parcel.masks if _content(m) in added], MASKS):
        yield replace(empty, masks=new)
    wanted = {a.ref for a in (*news.adapters, *news.back)}
    for adapters in _chunks([a for a in parcel.adapters if a.ref in wanted], ADAPTERS):
        used |= {a.line for a in adapters}
        yield replace(
            empty,
            lines=tuple(lines[name] for name in dict.fromkeys(a.line for a in adapters)),
            masks=tuple(masks[m] for m in dict.fromkeys(a.mask for a in adapters) if m is not None),
            runs=tuple(runs[r] for r in dict.fromkeys(a.run for a in adapters) if r is not None),
            adapters=adapters,
            scores=tuple(score for a in adapters for score in of.pop(a.ref, ())),
            asked=parcel.asked | {a.ref for a in news.back},
        )
    for rest in _chunks([score for own in of.values() for score in own], SCORES):
        yield replace(empty, scores=rest)
    left = tuple(line for line in news.lines if line.name not in used)
    if left:
        yield replace(empty, lines=left)


def _content(mask: Mask) -> tuple[str, int, str, str]:
    return mask.task, mask.task_revision, mask.digest, mask.projection


def _chunks(records: Iterable[_Any], size: int) -> Iterator[tuple[_Any, ...]]:
    iterator = iter(records)
    while chunk := tuple(itertools.islice(iterator, size)):
        yield chunk


def _set_aliases(
    source: Source, parcel: Parcel, target: Store
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    here = {alias.ref: alias for alias in target.aliases()}
    set_now, left = [], []
    for alias in parcel.aliases:
        known = here.get(alias.ref)
        if known is not None and known.version == alias.version:
            continue
        if known is not None or not _set(source, alias, target):
            left.append(alias.ref)
        else:
            set_now.append(alias.ref)
    return tuple(set_now), tuple(left)


def _set(source: Source, alias: Alias, target: Store) -> bool:
    """Whether the alias could be set: nobody was faster, and its version is to be seen."""
    reason = f"from {source.shown}"
    try:
        target.set_alias(alias.line, alias.name, alias.version, action="moved", reason=reason,
                         expected=None)  # fmt: skip
    except (Conflict, NotFound):
        return False
    return True
