"""Where a store's objects lie when not in its own folder: one row, which holds no credentials."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, insert, select, update

from lori_manager.errors import Conflict
from lori_manager.store import tables as t
from lori_manager.store.cache import Cache
from lori_manager.store.files import ObjectStore
from lori_manager.store.objects import Objects
from lori_manager.store.s3 import S3Objects

OWN = "objects"  # the folder beside the registry
CACHE = "cache"


@dataclass(frozen=True)
class Place:
    """A bucket, and the name under which this store has claimed it."""

    url: str
    owner: str

    def open(self, root: Path) -> S3Objects:
        """What lies there, read through the cache in the store's folder; asks nobody yet."""
        return S3Objects(self.url, self.owner, Cache(root / CACHE))


def one(connection: Connection) -> Place | None:
    """The place; None where it is the store's own folder."""
    row = connection.execute(select(t.object_place)).one_or_none()
    return None if row is None else Place(row.url, row.owner)


def choose(connection: Connection, url: str) -> Place:
    """Note the place; another one only before there is a base, so before any object.

    Raises:
        Conflict: objects are kept elsewhere already.
    """
    known = one(connection)
    if known is not None and known.url == url:
        return known
    if connection.execute(select(t.base.c.id)).first() is not None:
        kept = "its own folder" if known is None else known.url
        raise Conflict(
            f"this store keeps its objects in {kept}: `lori clone` makes one that keeps them "
            "elsewhere"
        )
    if known is None:
        place = Place(url, uuid.uuid4().hex)
        connection.execute(insert(t.object_place).values(id=1, url=url, owner=place.owner))
        return place
    connection.execute(update(t.object_place).values(url=url))
    return Place(url, known.owner)


def objects(place: Place | None, root: Path) -> Objects:
    """What the store in `root` keeps its files in."""
    return ObjectStore(root / OWN) if place is None else place.open(root)
