"""What travels between stores: records with all that they need, those needed first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from sqlalchemy import Connection, select

from lori_manager.errors import DamagedObject, InvalidInput
from lori_manager.records import SPLITS, Adapter, Alias, Base, Mask, Run, Score, Task
from lori_manager.refs import BASE, AdapterRef, check_name, parse_mask_ref
from lori_manager.store import adapters, aliases, bases, masks, runs, scores, tasks
from lori_manager.store import tables as t
from lori_manager.store.integrity import images_in

ROWS, IMAGE, MASK, ADAPTER = "rows", "image", "mask", "adapter"  # what a file may be


@dataclass(frozen=True)
class Named:
    """A line on its way: its versions travel by themselves."""

    name: str
    of_task: bool
    sequence: tuple[str, ...]
    created_at: datetime


@dataclass(frozen=True)
class File:
    """A file that a record needs: what it is to be, and of which record."""

    digest: str
    kind: str  # ROWS, IMAGE, MASK or ADAPTER
    record: Task | Mask | Adapter
    split: str = ""  # of rows and their images

    @property
    def subject(self) -> str:
        """`safety@3`, `safety%1`, `safety#2 train`."""
        return f"{self.record.ref} {self.split}".rstrip()


@dataclass(frozen=True)
class Parcel:
    """Records of one store; those that others need come first.

    Attributes:
        adapters: hidden ones come without their files, so that no number is given twice.
        asked: names of the adapters that were asked for; empty where all were.
    """

    base: Base
    lines: tuple[Named, ...] = ()
    tasks: tuple[Task, ...] = ()
    masks: tuple[Mask, ...] = ()
    runs: tuple[Run, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    scores: tuple[Score, ...] = ()
    aliases: tuple[Alias, ...] = ()
    asked: frozenset[str] = field(default_factory=frozenset)

    def files(self) -> Iterator[File]:
        """Every file that these records name; one may be needed by several. See `images`."""
        for task in self.tasks:
            for name, split in task.splits.items():
                yield File(split.digest, ROWS, task, name)
        for mask in self.masks:
            yield File(mask.digest, MASK, mask)
        for adapter in self.adapters:
            if not adapter.hidden:
                yield File(adapter.digest, ADAPTER, adapter)


def images(task: Task, rows: Callable[[str], bytes]) -> Iterator[File]:
    """The images that a task's rows name; none of most tasks.

    Args:
        rows: digest of a split -> its content.
    Raises:
        DamagedObject: those are no rows of images.
    """
    if task.images is not None:
        for name, split in task.splits.items():
            for digest in images_in(rows(split.digest)):
                yield File(digest, IMAGE, task, name)


def whole(connection: Connection) -> Parcel:
    """All that a store holds and that cannot be made again."""
    return _closed(
        connection,
        adapters.every(connection, None, hidden=True),
        masks.every(connection, None),
        tasks.revisions(connection),
        scores.every(connection),
        lines=connection.execute(select(t.lines.c.name).order_by(t.lines.c.id)).scalars().all(),
    )


def of_adapters(connection: Connection, refs: Sequence[AdapterRef]) -> Parcel:
    """Adapters with their parents, masks, tasks, and scores on these and on their own tasks."""
    asked = {a.ref: a for a in (adapters.one(connection, ref) for ref in refs)}
    found: dict[str, Adapter] = {}
    for adapter in asked.values():
        _with_parents(connection, adapter, found)
    needed = dict.fromkeys(a.mask for a in found.values() if a.mask is not None)
    own_masks = [masks.one(connection, *parse_mask_ref(ref)) for ref in needed]
    all_scores = scores.every(connection, subjects={*found, BASE})
    keys = [(a.task, a.task_revision) for a in found.values() if a.task is not None]
    keys += [(m.task, m.task_revision) for m in own_masks]
    keys += [(s.task, s.task_revision) for s in all_scores if s.subject in asked]
    on = dict.fromkeys(keys)
    parcel = _closed(
        connection,
        list(found.values()),
        own_masks,
        [tasks.one(connection, str(name), revision) for name, revision in on],
        [score for score in all_scores if (score.task, score.task_revision) in on],
    )
    return replace(parcel, asked=frozenset(asked))


def _with_parents(connection: Connection, adapter: Adapter, found: dict[str, Adapter]) -> None:
    """Add the adapter behind all that it was made from."""
    waiting = [adapter]
    while waiting:
        last = waiting[-1]
        missing = [p.ref for p in last.parents if p.ref not in found]
        if missing:
            refs = map(adapters.reference, reversed(missing))
            waiting += [adapters.one(connection, ref, hidden=True) for ref in refs]
        else:
            found.setdefault(last.ref, last)
            waiting.pop()


def _closed(
    connection: Connection,
    own_adapters: Sequence[Adapter],
    own_masks: Sequence[Mask],
    own_tasks: Sequence[Task],
    own_scores: Sequence[Score],
    lines: Iterable[str] = (),
) -> Parcel:
    names = dict.fromkeys([*lines, *(task.name for task in own_tasks)])
    names |= dict.fromkeys(a.line for a in own_adapters)
    versions = {(a.line, a.version) for a in own_adapters if not a.hidden}
    run_ids = dict.fromkeys(a.run for a in own_adapters if a.run is not None)
    rows = connection.execute(select(t.lines).order_by(t.lines.c.id)).all()
    return Parcel(
        base=bases.one(connection),
        lines=tuple(
            Named(row.name, row.of_task, tuple(row.sequence), row.created_at)
            for row in rows
            if row.name in names
        ),
        tasks=tuple(own_tasks),
        masks=tuple(own_masks),
        runs=tuple(runs.one(connection, key) for key in run_ids),
        adapters=tuple(own_adapters),
        scores=tuple({score.id: score for score in own_scores}.values()),
        aliases=tuple(
            a for a in aliases.every(connection, None) if (a.line, a.version) in versions
        ),
    )


def renamed(parcel: Parcel, names: Mapping[str, str]) -> Parcel:
    """The same with adapters' lines called otherwise; a task keeps its name, rows and masks.

    Args:
        names: line -> what its versions are to be called; numbers stay.
    Raises:
        InvalidInput: a name is unusable, or no such line has versions in the parcel.
    """
    if not names:
        return parcel
    has = {a.line for a in parcel.adapters}
    comes = has | {line.name for line in parcel.lines} | {task.name for task in parcel.tasks}
    for old, new in names.items():
        check_name(new, "line")
        if old not in has:
            there = ", ".join(sorted(has)) or "none"
            raise InvalidInput(f"`--as {old}={new}`: no line {old!r} comes; there are: {there}")
        if new in comes and new not in names:
            raise InvalidInput(f"`--as {old}={new}`: a line {new!r} comes, too; take another name")
    if len(set(names.values())) < len(names):
        raise InvalidInput("`--as` gives two lines one name: take two")

    def ref(text: str) -> str:
        line, at, rest = text.partition("@")
        return f"{names.get(line, line)}{at}{rest}"

    lines = {line.name: line for line in parcel.lines if line.name not in names or line.of_task}
    for line in parcel.lines:
        if line.name in names:
            new = names[line.name]
            lines[new] = replace(line, name=new, of_task=False)

    def called(a: Adapter) -> Adapter:
        a = replace(a, parents=tuple(replace(p, ref=ref(p.ref)) for p in a.parents))
        if a.line in names:  # a run went into the line that it was planned for
            a = replace(a, line=names[a.line], run=None, stage=None)
        return a

    return replace(
        parcel,
        lines=tuple(lines.values()),
        adapters=tuple(map(called, parcel.adapters)),
        scores=tuple(replace(s, subject=ref(s.subject)) for s in parcel.scores),
        aliases=tuple(replace(a, line=names.get(a.line, a.line)) for a in parcel.aliases),
        asked=frozenset(map(ref, parcel.asked)),
    )


def check(parcel: Parcel, shown: str) -> None:
    """Refuse a parcel in which something points nowhere, or a name or number cannot be.

    Raises:
        DamagedObject: says what of `shown`.
    """

    def insist(holds: bool, told: str) -> None:
        if not holds:
            raise DamagedObject(f"{shown}: {told}; nothing was taken from it")

    lines = {line.name for line in parcel.lines}
    own_tasks = {(task.name, task.revision) for task in parcel.tasks}
    own_masks = {mask.ref: mask for mask in parcel.masks}
    own_runs = {run.id for run in parcel.runs}
    for what, own, every in (
        ("line", lines, parcel.lines),
        ("task", own_tasks, parcel.tasks),
        ("mask", own_masks, parcel.masks),
        ("run", own_runs, parcel.runs),
    ):
        insist(len(own) == len(every), f"a {what} stands there twice")
    for task in parcel.tasks:
        insist(task.name in lines, f"{task.ref} has no line")
        insist({"eval"} <= set(task.splits) <= set(SPLITS), f"{task.ref} has no such rows")
        insist(task.revision > 0, f"{task.ref} is no task")
    for mask in parcel.masks:
        insist((mask.task, mask.task_revision) in own_tasks, f"the task of {mask.ref} is missing")
        insist(mask.version > 0 and 0 <= mask.kept <= mask.total, f"{mask.ref} is no mask")
    known: dict[str, Adapter] = {}
    for a in parcel.adapters:
        insist(a.line in lines and a.version > 0, f"{a.ref} has no line")
        insist(a.ref not in known, f"{a.ref} stands there twice")
        insist(a.base == parcel.base.fingerprint, f"{a.ref} is of another base")
        insist(a.task is None or (a.task, a.task_revision) in own_tasks,
               f"the task of {a.ref} is missing")  # fmt: skip
        insist((a.task is None) == (a.task_revision is None), f"{a.ref} has half a task")
        insist(a.mask is None or a.mask in own_masks, f"the mask of {a.ref} is missing")
        insist(a.run is None or (a.run in own_runs and a.stage is not None),
               f"the run of {a.ref} is missing")  # fmt: skip
        for parent in a.parents:
            there = parent.ref in known and known[parent.ref].digest == parent.digest
            insist(there, f"{parent.ref}, of which {a.ref} was made, is missing or comes later")
        known[a.ref] = a
    digests = {a.ref: a.digest for a in parcel.adapters if not a.hidden}
    digests[BASE] = parcel.base.fingerprint
    eval_rows = {(task.name, task.revision): task.splits["eval"].rows for task in parcel.tasks}
    for score in parcel.scores:
        fits = digests.get(score.subject) == score.digest
        insist(fits, f"a score is of {score.subject!r}, which is missing or of other weights")
        insist((score.task, score.task_revision) in own_tasks,
               f"a score is on {score.task}#{score.task_revision}, which is missing")  # fmt: skip
        most = eval_rows[score.task, score.task_revision]
        insist(0 <= score.rows <= most, f"a score is of {score.rows} rows, where there are {most}")
    for alias in parcel.aliases:
        insist(f"{alias.line}@{alias.version}" in digests, f"{alias.ref} points nowhere")
    insist(parcel.asked <= digests.keys(), "what is asked for is missing")
