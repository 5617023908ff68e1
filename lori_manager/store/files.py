"""Files that are whole or not there: content-addressed objects and atomic writes.

The order is always: temporary file in the target's folder, write, fsync, rename,
fsync the folder. Whoever wants a row for a file commits it after that.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Collection, Iterable, Iterator
from datetime import timedelta
from pathlib import Path

from lori_manager.errors import DamagedObject, StorageFailed

_DIGEST = re.compile(r"[0-9a-f]{64}")
TEMPORARY = ".tmp-"  # begins the names of what is being written
PRIVATE, OPEN = 0o600, 0o666  # modes, less what the umask takes
_CHUNK = 1 << 20


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into a StorageFailed that says what to do."""
    try:
        yield
    except OSError as e:
        raise StorageFailed(_refusal(path, e)) from e


def _refusal(path: Path, e: OSError) -> str:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left for {path}: free some (what was stored before is untouched), retry"
    if e.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{path} cannot be written ({e.strerror}): check permissions and the mount, retry"
    return f"{path} cannot be written or read: {e.strerror or e}; check the disk, retry"


def sync_folder(folder: Path) -> None:
    """Make the folder's entries survive a power cut. Raises OSError."""
    if os.name == "nt":
        return  # there, folders cannot be opened, and renames are journalled
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def private_folder(folder: Path) -> None:
    """Make `folder`, readable by its owner alone, if it is not there. Raises OSError."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return
    sync_folder(folder.parent)


def lasting_folder(folder: Path) -> None:
    """Make `folder` and those above it, so that they survive a power cut. Raises OSError."""
    missing = [folder]
    while not missing[-1].is_dir():
        missing.append(missing[-1].parent)
    for above, below in zip(missing[::-1], missing[-2::-1], strict=False):
        below.mkdir(exist_ok=True)
        sync_folder(above)


def write_atomic(path: Path, content: bytes, *, private: bool = True) -> None:
    """Write a file that after any interruption is the old one or the new one, whole.

    The folder must exist. On return the file survives a power cut.
    Args:
        private: for its owner alone; no is for what the user asked for, a report or a plot,
            which is as open as the user's other files.
    Raises:
        StorageFailed: full, read-only or failing disk.
    """
    with storing(path):
        _write(path, (content,), PRIVATE if private else OPEN)


def read_texts(path: Path, *names: str, advice: str) -> tuple[str, ...]:
    """The texts under these names in a small JSON file, in the order of the names.

    Args:
        advice: what to do about a damaged file, for the message.
    Raises:
        DamagedObject: it is no JSON object that has a text under each name.
        StorageFailed: the disk fails to read.
    """
    with storing(path):
        content = path.read_bytes()
    try:
        told = json.loads(content)
        texts = tuple(told[name] for name in names)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("not text")
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise DamagedObject(f"{path} is damaged: {advice}") from e
    return texts


def write_synced(path: Path, chunks: Iterable[bytes], mode: int = PRIVATE) -> None:
    """Write a new file whose content survives a power cut; its name does once the folder is
    synced. Raises OSError.
    """
    path.touch(mode, exist_ok=False)
    with path.open("wb") as f:
        for chunk in chunks:
            f.write(chunk)
        f.flush()
        os.fsync(f.fileno())


def _write(path: Path, chunks: Iterable[bytes], mode: int = PRIVATE) -> None:
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        write_synced(temporary, chunks, mode)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def object_name(digest: str) -> str:
    """`ab/cdef...`: how the object of that digest is called among others.

    Raises:
        DamagedObject: no SHA-256 in lower-case hex, as an altered row may hold.
    """
    if not _DIGEST.fullmatch(digest):
        raise DamagedObject(f"{digest[:80]!r} is no SHA-256: run `lori verify`")
    return f"{digest[:2]}/{digest[2:]}"


class MissingObject(DamagedObject):
    """An object whose file is gone."""


class ObjectStore:
    """Immutable files named by the SHA-256 of their content, at `root/ab/cdef...`.

    A damaged object is found when it is read and healed when its content is put again.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, digest: str) -> Path:
        """Where the object of that digest lies, or would.

        Raises:
            DamagedObject: no SHA-256 in lower-case hex, as an altered row may hold.
        """
        return self.root / object_name(digest)

    def exists(self, digest: str) -> bool:
        """Whether a file is there; `get` alone knows whether it is whole."""
        return self.path(digest).is_file()

    def missing(self, digests: Collection[str]) -> list[str]:
        """Those of them that are not there."""
        return [digest for digest in digests if not self.exists(digest)]

    def size(self, digest: str) -> int:
        """Bytes of the stored file.

        Raises:
            MissingObject: it is not there.
        """
        with self._reading(digest) as path:
            return path.stat().st_size

    def put(self, content: bytes) -> str:
        """Store `content` and return its digest; durable on return.

        An object that is already there is read and, if damaged, replaced.
        Raises:
            StorageFailed: full, read-only or failing disk.
        """
        digest = hashlib.sha256(content).hexdigest()
        self._put(digest, len(content), (content,))
        return digest

    def put_file(self, source: Path) -> str:
        """Store a copy of the file `source`, in bounded memory; else like `put`."""
        with storing(source), source.open("rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
            size = f.tell()
            f.seek(0)
            again = hashlib.sha256()

            def chunks() -> Iterator[bytes]:
                while chunk := f.read(_CHUNK):
                    again.update(chunk)
                    yield chunk
                if again.hexdigest() != digest:
                    raise StorageFailed(f"{source} changed while it was read: run it again")

            self._put(digest, size, chunks())
        return digest

    def _put(self, digest: str, size: int, chunks: Iterable[bytes]) -> None:
        path = self.path(digest)
        with storing(path):
            private_folder(path.parent)
            if not self._kept(path, digest, size):
                _write(path, chunks)
            sync_folder(self.root)

    def keep(self, digest: str) -> bool:
        """Whether it is there, whole; if so, it is durable on return and its age begins anew.

        Raises:
            StorageFailed: the disk fails.
        """
        path = self.path(digest)
        with storing(path):
            kept = self._kept(path, digest)
            if kept:
                sync_folder(self.root)
        return kept

    @staticmethod
    def _kept(path: Path, digest: str, size: int | None = None) -> bool:
        try:
            whole = size in (None, path.stat().st_size) and _digest_of(path) == digest
        except FileNotFoundError:
            return False
        if whole:
            # its writer may not have come to this step, and the caller commits a row next
            sync_folder(path.parent)
            with contextlib.suppress(FileNotFoundError):  # gc: the caller will look again
                os.utime(path)  # its time of grace begins anew
        return whole

    def get(self, digest: str) -> bytes:
        """The content, checked against the digest.

        Raises:
            DamagedObject: cut short or altered; MissingObject: gone.
            StorageFailed: the disk fails to read.
        """
        with self._reading(digest) as path:
            content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise DamagedObject(_altered(digest, path))
        return content

    def check(self, digest: str) -> None:
        """Read the object in bounded memory; raises like `get`."""
        with self._reading(digest) as path:
            found = _digest_of(path)
        if found != digest:
            raise DamagedObject(_altered(digest, path))

    @contextlib.contextmanager
    def _reading(self, digest: str) -> Iterator[Path]:
        path = self.path(digest)
        try:
            with storing(path):
                yield path
        except StorageFailed as e:
            if isinstance(e.__cause__, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
                raise MissingObject(
                    f"object {digest} is missing ({path}): restore it from a copy, or make it again"
                ) from e
            raise

    def where(self, digest: str) -> str:
        """The path, as text."""
        return str(self.path(digest))

    def age(self, digest: str) -> timedelta | None:
        """Time since it was put last, by the file's own clock; None where it is not there."""
        try:
            with storing(path := self.path(digest)):
                return timedelta(seconds=time.time() - path.stat().st_mtime)
        except StorageFailed as e:
            if isinstance(e.__cause__, FileNotFoundError):
                return None
            raise

    def remove(self, digest: str) -> None:
        """Free the object. A power cut may bring the file back."""
        with storing(path := self.path(digest)):
            path.unlink(missing_ok=True)

    def digests(self) -> Iterator[str]:
        """The digests of all files, in order; foreign and temporary files are passed over."""
        for path in self._files():
            digest = path.parent.name + path.name
            if _DIGEST.fullmatch(digest):
                yield digest

    def leftovers(self) -> Iterator[str]:
        """Temporary files of writers that are at work now or were killed."""
        return (str(path) for path in self._files() if path.name.startswith(TEMPORARY))

    @property
    def url(self) -> str:
        """The folder."""
        return str(self.root)

    def confirm(self) -> None:
        """A workspace's own folder is nobody else's."""

    def _files(self) -> Iterator[Path]:
        with storing(self.root):
            for folder in sorted(self.root.glob("[0-9a-f][0-9a-f]")):
                yield from sorted(folder.iterdir())


def _digest_of(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _altered(digest: str, path: Path) -> str:
    return (
        f"object {digest} is cut short or altered ({path}): restore it from a copy, "
        "or remove it and make it again"
    )
