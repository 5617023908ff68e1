"""Where files lie: what every place for them must be able to do."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Protocol


class Objects(Protocol):
    """Immutable content named by its SHA-256. `ObjectStore` is one, in a folder; `S3Objects`."""

    @property
    def url(self) -> str:
        """The whole place, for people; never with a secret."""
        ...

    def confirm(self) -> None:
        """Refuse a place that is not this store's alone, before anything there is freed.

        Raises:
            Conflict: it is another store's.
        """
        ...

    def put(self, content: bytes) -> str:
        """Store `content` and return its digest; durable on return.

        What is there already is read and, if damaged, replaced; its age begins anew.
        Raises:
            StorageFailed: refused.
        """
        ...

    def put_file(self, source: Path) -> str:
        """Store a copy of a file; else like `put`."""
        ...

    def keep(self, digest: str) -> bool:
        """Whether it is there, whole; if so, it is durable on return and its age begins anew."""
        ...

    def get(self, digest: str) -> bytes:
        """The content, checked against the digest.

        Raises:
            DamagedObject: cut short or altered; MissingObject: gone.
            StorageFailed: it cannot be read.
        """
        ...

    def check(self, digest: str) -> None:
        """Read the object in bounded memory; raises like `get`."""
        ...

    def exists(self, digest: str) -> bool:
        """Whether it is there; `get` alone knows whether it is whole."""
        ...

    def missing(self, digests: Collection[str]) -> list[str]:
        """Those of them that are not there, in as short a time as the place allows."""
        ...

    def size(self, digest: str) -> int:
        """Bytes stored. Raises MissingObject."""
        ...

    def where(self, digest: str) -> str:
        """The place, for people."""
        ...

    def digests(self) -> Iterator[str]:
        """The digests of all objects, in order."""
        ...

    def leftovers(self) -> Iterator[str]:
        """The places of what writers have begun, who are at work now or were killed."""
        ...

    def age(self, digest: str) -> timedelta | None:
        """Time since it was put last; None where it is not there."""
        ...

    def remove(self, digest: str) -> None:
        """Free it; nothing happens where it is not there."""
        ...
