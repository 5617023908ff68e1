"""A local copy of objects that lie elsewhere: bounded, and believed only where its digest fits."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import time
from pathlib import Path

from lori_manager.store.files import TEMPORARY, private_folder

LIMIT = 20_000_000_000  # bytes
LIMIT_VARIABLE = "LORI_CACHE_BYTES"
_SLACK = 20  # a twentieth of the limit may be put before the folder is looked through again
_ABANDONED = 3600.0  # seconds after which a temporary file has no writer any more

logger = logging.getLogger(__name__)


class Cache:
    """Files named by the SHA-256 of their content; what was not read for longest goes first.

    Nothing depends on it: a disk that refuses is told in the log alone, and any file may be
    removed at any time.

    Args:
        folder: its own; made when first needed.
        limit: bytes of all files; that of `LORI_CACHE_BYTES`, else 20 GB, where None.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = folder
        told = os.environ.get(LIMIT_VARIABLE, "")
        self.limit = limit if limit is not None else int(told) if told.isdecimal() else LIMIT
        self._put = self.limit  # bytes since the folder was looked through; at once, at first

    def get(self, digest: str) -> bytes | None:
        """The content, checked against the digest; None where it is not there or altered."""
        path = self.folder / digest
        try:
            content = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(content).hexdigest() != digest:
            logger.info("a cached copy of %s was altered: it is fetched again", digest)
            self.drop(digest)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return content

    def put(self, digest: str, content: bytes) -> None:
        """Keep the content, which the caller has checked, and make room for it."""
        if len(content) > self.limit:
            return
        temporary = self.folder / f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            private_folder(self.folder)
            temporary.write_bytes(content)
            temporary.replace(self.folder / digest)
            self._put += len(content)
            if self._put * _SLACK >= self.limit:
                self._prune()
                self._put = 0
        except OSError as e:
            logger.info("%s cannot be kept in the cache: %s", digest, e)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def drop(self, digest: str) -> None:
        """Forget it."""
        with contextlib.suppress(OSError):
            (self.folder / digest).unlink(missing_ok=True)

    def _prune(self) -> None:
        found, now = [], time.time()
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # another process prunes, too
                state = entry.stat()
                if entry.name.startswith(TEMPORARY):
                    if now - state.st_mtime > _ABANDONED:
                        Path(entry.path).unlink(missing_ok=True)
                    continue
                found.append((state.st_mtime_ns, state.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit:
                return
            Path(path).unlink(missing_ok=True)
            total -= size
