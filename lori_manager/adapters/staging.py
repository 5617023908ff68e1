"""Directories that are whole or not there: written aside, flushed, put in place."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lori_manager.errors import Conflict, StorageFailed


@contextmanager
def staged_directory(directory: Path, last: str, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write files into that becomes `directory` when all went well.

    A new directory is renamed into place whole. An existing one is filled file by
    file, since it may be a mount point; `last`, the file without which no reader
    takes the directory for complete, is removed first and put in last.

    Raises:
        Conflict: `directory` is a file, or not empty and `overwrite` is False.
        StorageFailed: the directory cannot be written.
    """
    existing = check_target(directory, overwrite)
    # Beside a new directory, to become it; inside an existing one, which may be a mount point.
    staged = (directory if existing else directory.absolute().parent) / (
        f".lori-export-{secrets.token_hex(6)}"
    )
    try:
        staged.mkdir(parents=True)
        yield staged
        publish(staged, directory, last, existing)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise Conflict(f"{directory} was written by another process meanwhile") from error
        reason = getattr(error, "strerror", None) or error
        raise StorageFailed(
            f"cannot write {directory}: {reason}; free space or choose another directory"
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def check_target(directory: Path, overwrite: bool = False, allowed: Collection[str] = ()) -> bool:
    """Whether the directory exists already; Conflict where it must not be written.

    Args:
        directory: where files are to be put.
        overwrite: whether it may hold anything.
        allowed: names that it may hold in any case.
    """
    try:
        if not directory.is_dir():
            if directory.exists():
                raise Conflict(f"{directory} is a file: choose another directory")
            return False
        if not overwrite and any(entry.name not in allowed for entry in directory.iterdir()):
            raise Conflict(f"{directory} is not empty: choose another directory or empty it")
    except OSError as error:
        raise StorageFailed(f"cannot write {directory}: {error.strerror or error}") from error
    return True


def publish(staged: Path, directory: Path, last: str, existing: bool) -> None:
    """Flush all that is in `staged` and make it `directory`, or fill that in place."""
    files = sorted(staged.iterdir(), key=lambda file: (file.name == last, file.name))
    for file in staged.rglob("*"):
        if file.is_file():
            # safetensors makes its files readable by their owner alone, which a server is not.
            file.chmod((staged / last).stat().st_mode & 0o777)
        sync(file)
    if not existing:
        sync(staged)
        staged.rename(directory)
        sync(directory.absolute().parent)
        return
    (directory / last).unlink(missing_ok=True)
    sync(directory)
    for file in files:
        file.replace(directory / file.name)
    sync(directory)


def sync(path: Path) -> None:
    """Flush a file or, where the system can, a directory to the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
