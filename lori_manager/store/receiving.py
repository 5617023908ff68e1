"""Records that come from another store: what is new, what stands against them, adding them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, insert, select

from lori_manager.errors import Conflict, WrongBase
from lori_manager.records import Adapter, Mask, NewScore, Score, Task
from lori_manager.refs import parse_mask_ref
from lori_manager.store import adding, bases, masks, removals, scores, tasks
from lori_manager.store import tables as t
from lori_manager.store.files import MissingObject
from lori_manager.store.parcels import Named, Parcel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Outcomes = tuple[NDArray[Any], NDArray[Any] | None]

_SHOWN = 3  # of what stands against a parcel
_SCORE_KEY = ("digest", "task", "task_revision", "scorer", "scorer_version", "precision",
              "encoding", "origin")  # fmt: skip


@dataclass(frozen=True)
class News:
    """What of a parcel a store lacks.

    Attributes:
        masks: those to add, as they will be called here.
        mask_names: the parcel's name of each mask -> its name here.
        back: adapters that are here, removed, and are asked for or needed again.
        gone: names of those that are here, removed, and stay so.
    """

    lines: tuple[Named, ...] = ()
    tasks: tuple[Task, ...] = ()
    masks: tuple[Mask, ...] = ()
    mask_names: Mapping[str, str] = field(default_factory=dict)
    adapters: tuple[Adapter, ...] = ()
    back: tuple[Adapter, ...] = ()
    gone: frozenset[str] = frozenset()

    def only_new(self, parcel: Parcel) -> Parcel:
        """The parcel with those records alone whose files are wanted."""
        new = {mask.digest for mask in self.masks}
        return replace(
            parcel,
            tasks=self.tasks,
            masks=tuple(mask for mask in parcel.masks if mask.digest in new),
            adapters=(*self.adapters, *self.back),
        )


def compare(connection: Connection, parcel: Parcel) -> News:
    """What is new of a parcel.

    Raises:
        WrongBase: it is of another base.
        Conflict: the same line and version, or task and revision, is something else here.
    """
    base = bases.one(connection)
    if parcel.base.fingerprint != base.fingerprint:
        raise WrongBase(
            f"there the base has fingerprint {parcel.base.fingerprint[:12]} "
            f"({parcel.base.source}), here {base.fingerprint[:12]} ({base.source}): adapters only "
            "go between stores of one base"
        )
    against: list[str] = []
    found = News(
        lines=_new_lines(connection, parcel, against),
        tasks=_new_tasks(connection, parcel, against),
    )
    new_masks, mask_names = _new_masks(connection, parcel)
    new, back, gone = _new_adapters(connection, parcel, against)
    if against:
        more = f" (and {len(against) - _SHOWN} more)" if len(against) > _SHOWN else ""
        raise Conflict(f"{'; '.join(against[:_SHOWN])}{more}; nothing was taken")
    return replace(
        found, masks=new_masks, mask_names=mask_names, adapters=new, back=back, gone=gone
    )


def _new_lines(connection: Connection, parcel: Parcel, against: list[str]) -> tuple[Named, ...]:
    here = {row.name: row for row in connection.execute(select(t.lines))}
    for line in parcel.lines:
        row = here.get(line.name)
        if row is not None and row.of_task != line.of_task:
            what = "a task here and a line there" if row.of_task else "a line here and a task there"
            against.append(f"{line.name!r} is {what}: take it as `--as {line.name}=NAME`")
        elif row is not None and tuple(row.sequence) != line.sequence:
            against.append(
                f"the line {line.name!r} was taught other tasks there: take it as "
                f"`--as {line.name}=NAME`"
            )
    return tuple(line for line in parcel.lines if line.name not in here)


def _new_tasks(connection: Connection, parcel: Parcel, against: list[str]) -> tuple[Task, ...]:
    here = {task.ref: task for task in tasks.revisions(connection)}
    for task in parcel.tasks:
        known = here.get(task.ref)
        if known is not None and _content(known) != _content(task):
            against.append(
                f"{task.ref} has other rows or another scorer there: add its rows here as a task "
                "of another name"
            )
    return tuple(task for task in parcel.tasks if task.ref not in here)


def _content(task: Task) -> Any:
    splits = {name: (split.digest, split.rows) for name, split in task.splits.items()}
    return task.scorer, task.scorer_version, splits


def _new_masks(connection: Connection, parcel: Parcel) -> tuple[tuple[Mask, ...], dict[str, str]]:
    """A mask is known by task, content and A; only its number may differ from store to store."""
    here: dict[str, list[Mask]] = defaultdict(list)
    if parcel.masks:
        for mask in masks.every(connection, None):
            here[mask.task].append(mask)
    new, called = [], {}
    for mask in parcel.masks:
        same = [m for m in here[mask.task] if _kind(m) == _kind(mask)]
        known = next((m for m in same if m.version == mask.version), same[0] if same else None)
        if known is None:
            taken = {m.version for m in here[mask.task]}
            number = max(taken) + 1 if mask.version in taken else mask.version
            known = replace(mask, version=number)
            here[mask.task].append(known)
            new.append(known)
        called[mask.ref] = known.ref
    return tuple(new), called


def _kind(mask: Mask) -> tuple[int, str, str]:
    return mask.task_revision, mask.digest, mask.projection


def _new_adapters(
    connection: Connection, parcel: Parcel, against: list[str]
) -> tuple[tuple[Adapter, ...], tuple[Adapter, ...], frozenset[str]]:
    """Those that are not here; those that are here, removed, and come back, or stay removed."""
    here: dict[tuple[str, int], str] = {}
    for line in {a.line for a in parcel.adapters}:
        query = select(t.adapters.c.version, t.adapters.c.digest).where(t.adapters.c.line == line)
        here |= {(line, row.version): row.digest for row in connection.execute(query)}
    hidden = removals.hidden_now(connection)
    needed = set(parcel.asked)
    new, known = [], []
    for a in parcel.adapters:
        digest = here.get((a.line, a.version))
        if digest is None:
            new.append(a)
        elif digest != a.digest:
            against.append(
                f"{a.ref} is {digest[:12]} here and {a.digest[:12]} there: take it under another "
                f"name with `--as {a.line}=NAME`"
            )
        elif (a.line, a.version) in hidden and not a.hidden:
            known.append(a)
        if not a.hidden and (digest is None or a.ref in parcel.asked):
            needed |= {parent.ref for parent in a.parents}
    for a in reversed(known):  # children come later, so their parents are known by then
        if a.ref in needed:
            needed |= {parent.ref for parent in a.parents}
    back = tuple(a for a in known if a.ref in needed)
    return tuple(new), back, frozenset(a.ref for a in known if a.ref not in needed)


def add(
    connection: Connection,
    parcel: Parcel,
    outcomes: Sequence[Outcomes],
    said: str,
    files: Collection[str],
) -> News:
    """Add what is new; what is here stays as it is.

    Args:
        outcomes: of the parcel's scores.
        said: why versions come or go, for the record.
        files: digests of what was put for it and is there.
    Returns:
        What was new.
    Raises:
        MissingObject: a version was removed here after the files were put, and comes back.
    """
    news = compare(connection, parcel)
    lacking = {file.digest for file in news.only_new(parcel).files()}.difference(files)
    if lacking:
        raise MissingObject(f"object {min(lacking)} was not put")
    for line in news.lines:
        values = {"name": line.name, "of_task": line.of_task, "sequence": list(line.sequence)}
        connection.execute(insert(t.lines).values(**values, created_at=line.created_at))
    for task in news.tasks:
        tasks.insert_as(connection, task)
    for mask in news.masks:
        connection.execute(insert(t.masks).values(**_row(mask)))
    _add_runs(connection, parcel, news)
    for adapter in news.adapters:
        _add_adapter(connection, adapter, news.mask_names)
        if adapter.hidden:
            removals.note(connection, adapter.line, adapter.version, said, hidden=True)
    for adapter in news.back:
        removals.note(connection, adapter.line, adapter.version, said, hidden=False)
    _add_scores(connection, parcel.scores, outcomes)
    return news


def _add_runs(connection: Connection, parcel: Parcel, news: News) -> None:
    """Runs of new adapters, ended: what is unfinished goes on where it was begun."""
    wanted = {a.run for a in news.adapters}
    here = set(connection.execute(select(t.runs.c.id)).scalars()) if wanted - {None} else set()
    for run in parcel.runs:
        if run.id in wanted and run.id not in here:
            values = {"id": run.id, "plan": run.plan, "open_plan": None}
            connection.execute(insert(t.runs).values(**values, created_at=run.created_at))


def _add_adapter(connection: Connection, adapter: Adapter, mask_names: Mapping[str, str]) -> None:
    mask = None if adapter.mask is None else parse_mask_ref(mask_names[adapter.mask])
    row = _row(adapter, leave=("mask", "parents", "hidden"))
    row |= {"mask_task": mask and mask[0], "mask_version": mask and mask[1]}
    stage = (t.adapters.c.run == adapter.run, t.adapters.c.stage == adapter.stage)
    if (
        adapter.run is not None
        and connection.execute(select(t.adapters.c.id).where(*stage)).first()
    ):
        row |= {"run": None, "stage": None}  # it is here under another name
    made = connection.execute(insert(t.adapters).values(**row)).inserted_primary_key
    if made is None:
        raise TypeError("the database gave no key for a new adapter")
    for position, parent in enumerate(adapter.parents):
        line, _, version = parent.ref.rpartition("@")
        connection.execute(
            insert(t.parents).values(
                adapter=made[0],
                position=position,
                line=line,
                version=int(version),
                digest=parent.digest,
                weight=parent.weight,
            )
        )


def _row(record: Mask | Adapter, leave: Sequence[str] = ()) -> dict[str, Any]:
    """The record's fields, which are called as the columns are."""
    return {f.name: getattr(record, f.name) for f in fields(record) if f.name not in leave}


def _add_scores(connection: Connection, own: Sequence[Score], outcomes: Sequence[Outcomes]) -> None:
    names = [f.name for f in fields(NewScore)]
    new = [
        (NewScore(**{name: getattr(score, name) for name in names}), *both)
        for score, both in zip(own, outcomes, strict=True)
    ]
    times = [score.created_at for score in own]
    if new:
        adding.add(connection, new, times, keep=True)


def score_keys(connection: Connection) -> set[tuple[Any, ...]]:
    """What each score here is known by."""
    return {score_key(score) for score in scores.every(connection)}


def score_key(score: Score) -> tuple[Any, ...]:
    """What the score is known by in any store."""
    return tuple(getattr(score, name) for name in _SCORE_KEY)
