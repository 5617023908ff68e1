"""Which database a store's folder goes with: the file in it, or a server's, by a URL kept there."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path

from lori_manager.errors import Conflict, NotFound
from lori_manager.store.backend import Backend
from lori_manager.store.files import read_texts, storing, write_atomic
from lori_manager.store.postgres import Postgres
from lori_manager.store.sqlite import SQLite

REGISTRY = "registry.db"
SERVER = "database.json"
UNFINISHED_SERVER = ".database.json.new"  # until the schema is made


@dataclass(frozen=True)
class Served:
    """A server's database, and the name under which this folder has claimed it."""

    backend: Postgres
    folder: str


def begun(root: Path) -> bool:
    """Whether a store was made in that folder."""
    return (root / REGISTRY).is_file() or (root / SERVER).is_file()


def backend(root: Path, password: str | None = None) -> Backend:
    """The database of the store in that folder.

    Raises:
        NotFound: there is no store.
    """
    if (root / SERVER).is_file():
        return served(root, password).backend
    if not (root / REGISTRY).is_file():
        raise NotFound(f"there is no {root / REGISTRY}: run `lori init`")
    return SQLite(root / REGISTRY)


def served(root: Path, password: str | None = None) -> Served:
    """What `SERVER` says. Raises DamagedObject."""
    return _read(root / SERVER, password)


def claim(root: Path, backend: Postgres) -> Served:
    """Begin to note a server's database; the same one again keeps its name.

    Raises:
        Conflict: the folder has a store, or one on another server was begun in it.
    """
    if begun(root):
        raise Conflict(f"{root} holds a store already: use it, or choose another folder")
    path = root / UNFINISHED_SERVER
    if path.is_file():
        known = _read(path, backend.password)
        if known.backend == backend:
            return known
    folder = uuid.uuid4().hex
    content = json.dumps({"url": backend.shown, "folder": folder}, indent=1)
    write_atomic(path, content.encode())
    return Served(backend, folder)


def settle(root: Path) -> None:
    """The schema is made: from now on the folder is a store."""
    with storing(root):
        content = (root / UNFINISHED_SERVER).read_bytes()
    write_atomic(root / SERVER, content)
    with storing(root):
        (root / UNFINISHED_SERVER).unlink()


def place(root: Path) -> str:
    """The folder, for people on other machines."""
    import socket

    return f"{socket.gethostname()}:{root.absolute()}"


def _read(path: Path, password: str | None) -> Served:
    advice = (
        'write it anew, {"url": "postgresql://...", "folder": "..."} (the folder\'s name is in the '
        "database's table `home`)"
    )
    url, folder = read_texts(path, "url", "folder", advice=advice)
    backend = Postgres.at(url)
    return Served(Postgres(backend.url, password or backend.password), folder)
