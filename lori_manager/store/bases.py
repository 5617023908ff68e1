"""The one base model of a store: its row in, its record out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from sqlalchemy import Connection, insert, select, update

from lori_manager.errors import Conflict, NotFound
from lori_manager.records import Base
from lori_manager.store import tables as t
from lori_manager.store.files import read_texts, write_atomic

NOTE = "base.json"  # in a folder that shares its rows with others: where it has the base


def one(connection: Connection) -> Base:
    """The base.

    Raises:
        NotFound: none is set yet.
    """
    row = connection.execute(select(t.base)).one_or_none()
    if row is None:
        raise NotFound("this workspace has no base model yet: run `lori init DIR --base MODEL`")
    return Base(
        fingerprint=row.fingerprint,
        source=row.source,
        revision=row.revision,
        path=row.path,
        model_type=row.model_type,
        created_at=row.created_at,
        code=row.code,
    )


def add(connection: Connection, base: Base) -> Base:
    """Set the base; the same weights again change nothing."""
    row = connection.execute(select(t.base.c.fingerprint)).one_or_none()
    if row is None:
        connection.execute(
            insert(t.base).values(
                id=1,
                fingerprint=base.fingerprint,
                source=base.source,
                revision=base.revision,
                path=base.path,
                model_type=base.model_type,
                created_at=base.created_at,
                code=base.code,
            )
        )
    elif row.fingerprint != base.fingerprint:
        raise Conflict(
            f"this workspace's base has fingerprint {row.fingerprint}, got {base.fingerprint}: "
            "make another workspace for another base"
        )
    return one(connection)


def here(root: Path, base: Base) -> Base:
    """The base with the path that the folder has noted for itself, if it has.

    Raises:
        DamagedObject: the note cannot be read.
    """
    path = root / NOTE
    if not path.is_file():
        return base
    advice = "remove it, then `lori base --move DIR`"
    where, source = read_texts(path, "path", "source", advice=advice)
    return replace(base, path=where, source=source)


def noted(root: Path) -> bool:
    """Whether this folder has noted where it has the base."""
    return (root / NOTE).is_file()


def note(root: Path, *, path: str, source: str) -> None:
    """Note where this folder has the base's weights."""
    write_atomic(root / NOTE, json.dumps({"path": path, "source": source}, indent=1).encode())


def move(connection: Connection, *, path: str, source: str) -> Base:
    """Note where the same weights lie now."""
    one(connection)
    connection.execute(update(t.base).values(path=path, source=source))
    return one(connection)
