"""Adapters, their parents, and what `line@selector` means."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Row,
    func,
    insert,
    select,
    tuple_,
)

from lori_manager.errors import Conflict, NotFound, WrongBase
from lori_manager.records import Adapter, NewAdapter, Parent
from lori_manager.refs import LATEST, AdapterRef, check_name, parse_mask_ref
from lori_manager.store import bases, masks, names, removals, runs, tasks
from lori_manager.store import tables as t
from lori_manager.store.tables import now


def reference(text: str) -> AdapterRef:
    """The ref as records hold it; a bare line is its latest. Words are looked up, not judged."""
    line, at, selector = text.rpartition("@")
    return AdapterRef(line, selector) if at else AdapterRef(text, LATEST)


def add(connection: Connection, new: NewAdapter, *, digest: str, size: int) -> Adapter:
    """Commit the next version of the line; a stage of a run that is stored is returned."""
    if new.run is not None:
        if new.stage is None:
            raise ValueError(f"an adapter of run {new.run} needs its stage")
        runs.one(connection, new.run)
        stored = of_run(connection, new.run, new.stage)
        if stored:
            return stored[0]
    _check(connection, new)
    if names.find(connection, new.line, lock=True) is None:
        names.add(connection, check_name(new.line, "line"))
    version = _last(connection, new.line) + 1
    if new.run is not None and new.sequence and version != (new.stage or 0) + 1:
        raise Conflict(
            f"line {new.line!r} has {version - 1} stage(s) and this is stage {new.stage}: another "
            "training adds to the same sequence; choose another --sequence name"
        )
    mask_task, mask_version = parse_mask_ref(new.mask) if new.mask else (None, None)
    key = connection.execute(
        insert(t.adapters).values(
            line=new.line,
            version=version,
            origin=new.origin,
            task=new.task,
            task_revision=new.task_revision,
            mask_task=mask_task,
            mask_version=mask_version,
            method=new.method,
            rank=new.rank,
            projection=new.projection,
            base=new.base,
            sequence=new.sequence,
            run=new.run,
            stage=new.stage,
            digest=digest,
            bytes=size,
            created_at=now(),
            config=new.config,
            versions=new.versions,
            facts=new.facts,
        )
    ).inserted_primary_key
    if key is None:
        raise TypeError("the database gave no key for a new adapter")
    for position, parent in enumerate(new.parents):
        found = one(connection, reference(parent.ref))
        if found.digest != parent.digest:
            raise ValueError(f"{found.ref} has digest {found.digest}, got {parent.digest}")
        connection.execute(
            insert(t.parents).values(
                adapter=key[0],
                position=position,
                line=found.line,
                version=found.version,
                digest=found.digest,
                weight=parent.weight,
            )
        )
    return of_version(connection, new.line, version)


def _check(connection: Connection, new: NewAdapter) -> None:
    if (new.task is None) != (new.task_revision is None):
        raise ValueError(
            f"expected task and revision or neither, got {new.task}, {new.task_revision}"
        )
    base = bases.one(connection)
    if new.base != base.fingerprint:
        raise WrongBase(
            f"the adapter was made for the base {new.base}, this workspace has {base.fingerprint}: "
            "use the workspace of that base"
        )
    if new.task is not None:
        tasks.one(connection, new.task, new.task_revision)
    if new.mask is not None:
        masks.one(connection, *parse_mask_ref(new.mask))


def one(connection: Connection, ref: AdapterRef, *, hidden: bool = False) -> Adapter:
    """The adapter that a version, `latest` or an alias means.

    Args:
        hidden: take a version that is hidden, too; `latest` never means one.
    Raises:
        NotFound: no such line, version or alias, or it is hidden; says what there is.
    """
    if ref.version is not None:
        return of_version(connection, ref.line, ref.version, hidden=hidden)
    names.require(connection, ref.line)
    if ref.selector == LATEST:
        newest = select(func.max(t.adapters.c.version)).where(t.adapters.c.line == ref.line)
        latest = connection.execute(newest.where(removals.visible())).scalar_one()
        if latest is None:
            why = "has only removed adapters" if _last(connection, ref.line) else "has no adapter"
            raise NotFound(f"line {ref.line!r} {why} yet: train or merge into it first")
        return of_version(connection, ref.line, latest)
    aliases = select(t.aliases.c.name, t.aliases.c.version).where(t.aliases.c.line == ref.line)
    marks = {row.name: row.version for row in connection.execute(aliases)}
    if ref.selector not in marks:
        raise names.not_found(f"alias of line {ref.line!r}", ref.selector, sorted(marks))
    return of_version(connection, ref.line, marks[ref.selector])


def digest_of(connection: Connection, ref: AdapterRef) -> tuple[str, str]:
    """The digest of the weights that `one` would find, and their name in full; faster."""
    if ref.version is not None:
        columns = t.adapters.c
        found = connection.execute(
            select(columns.digest).where(
                columns.line == ref.line, columns.version == ref.version, removals.visible()
            )
        ).scalar_one_or_none()
        if found is not None:
            return found, f"{ref.line}@{ref.version}"
    adapter = one(connection, ref)
    return adapter.digest, adapter.ref


def of_version(connection: Connection, line: str, version: int, *, hidden: bool = False) -> Adapter:
    """The adapter `line@version`; one that is hidden only where that is allowed."""
    if 1 <= version <= _last(connection, line):
        found = _select(connection, t.adapters.c.line == line, t.adapters.c.version == version)
        if found and found[0].hidden and not hidden:
            removal = removals.last(connection, line, version)
            if removal is not None:
                raise removals.gone(line, version, removal)
        if found:
            return found[0]
    names.require(connection, line)
    own = select(t.adapters.c.version).where(t.adapters.c.line == line)
    known = names.numbers(connection.execute(own).scalars())
    there = f"it has {known}" if known else "it has none yet"
    raise NotFound(f"line {line!r} has no version {version}: {there}")


def every(
    connection: Connection, line: str | None, *, hidden: bool = False, last: int | None = None
) -> list[Adapter]:
    """Adapters of one line or of all, by creation.

    Args:
        hidden: those too that are hidden.
        last: only so many of the newest.
    """
    where = [] if hidden else [removals.visible()]
    if line is not None:
        names.require(connection, line)
        where.append(t.adapters.c.line == line)
    return _select(connection, *where, last=last)


def newest_of(connection: Connection, newest: FromClause) -> list[Adapter]:
    """The adapters whose (line, version) that subquery gives."""
    key = tuple_(t.adapters.c.line, t.adapters.c.version)
    return _select(connection, key.in_(select(newest.c.line, newest.c.version)))


def of_run(connection: Connection, run: str, stage: int | None = None) -> list[Adapter]:
    """What a run stored, by stage; or at that stage alone."""
    found = _select(connection, t.adapters.c.run == run)
    if stage is not None:
        return [adapter for adapter in found if adapter.stage == stage]
    return sorted(found, key=lambda adapter: adapter.stage or 0)


def times(connection: Connection) -> list[list[datetime]]:
    """When each adapter was made, line by line in the order of their numbers."""
    columns = t.adapters.c.line, t.adapters.c.created_at
    found: dict[str, list[datetime]] = defaultdict(list)
    for line, made in connection.execute(select(*columns).order_by(t.adapters.c.version)):
        found[line].append(made)
    return list(found.values())


def children(connection: Connection, ref: AdapterRef) -> list[Adapter]:
    """The adapters that were continued or merged from that one."""
    parent = one(connection, ref)
    of_parent = select(t.parents.c.adapter).where(
        t.parents.c.line == parent.line, t.parents.c.version == parent.version
    )
    return _select(connection, t.adapters.c.id.in_(of_parent), removals.visible())


def _last(connection: Connection, line: str) -> int:
    """The highest number that the line ever gave, 0 for none: none is given twice."""
    newest = select(func.max(t.adapters.c.version)).where(t.adapters.c.line == line)
    return connection.execute(newest).scalar_one() or 0


def _select(
    connection: Connection, *where: ColumnElement[bool], last: int | None = None
) -> list[Adapter]:
    chosen = select(t.adapters.c.id).where(*where)
    if last is not None:
        chosen = chosen.order_by(t.adapters.c.id.desc()).limit(last)
    query = select(t.adapters)
    query = query.where(*where) if last is None else query.where(t.adapters.c.id.in_(chosen))
    rows = connection.execute(query.order_by(t.adapters.c.id)).all()
    gone = removals.hidden_now(connection) if rows else set()
    of_these = t.parents.c.adapter.in_(chosen)
    parents: dict[int, list[Parent]] = defaultdict(list)
    for row in connection.execute(
        select(t.parents).where(of_these).order_by(t.parents.c.adapter, t.parents.c.position)
    ):
        parents[row.adapter].append(
            Parent(ref=f"{row.line}@{row.version}", digest=row.digest, weight=row.weight)
        )
    return [_adapter(row, tuple(parents[row.id]), (row.line, row.version) in gone) for row in rows]


def _adapter(row: Row[Any], parents: tuple[Parent, ...], hidden: bool) -> Adapter:
    return Adapter(
        line=row.line,
        origin=row.origin,
        task=row.task,
        task_revision=row.task_revision,
        mask=None if row.mask_task is None else f"{row.mask_task}%{row.mask_version}",
        parents=parents,
        method=row.method,
        rank=row.rank,
        projection=row.projection,
        base=row.base,
        sequence=row.sequence,
        run=row.run,
        stage=row.stage,
        config=row.config,
        versions=row.versions,
        facts=row.facts,
        version=row.version,
        digest=row.digest,
        bytes=row.bytes,
        created_at=row.created_at,
        hidden=hidden,
    )
