"""Directories that are whole or not there, as in staging, written over several runs."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lori_manager.adapters.staging import check_target, publish, sync
from lori_manager.errors import Conflict, LoriError, StorageFailed
from lori_manager.store.files import write_atomic

_KEPT = ".lori-export"
_RECORD = "record.json"
_FILES = "files"


class Kept:
    """Files of which the finished ones outlive an interruption.

    Attributes:
        folder: where the files are written.
    """

    def __init__(self, root: Path, plan: str) -> None:
        self.folder = root / _FILES
        self._root = root
        self._plan = plan
        self._recording = threading.Lock()
        known = _record(root)
        self._finished: list[str] = known["finished"] if known.get("plan") == plan else []
        if not self._finished:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)

    @property
    def worth(self) -> bool:
        """Whether anything is finished."""
        return bool(self._finished)

    def finished(self, name: str) -> bool:
        """Whether a file was finished under this plan; its content is not looked at."""
        return name in self._finished and (self.folder / name).is_file()

    def finish(self, name: str) -> None:
        """Record a file that is whole and flushed to the disk; from any thread.

        Raises:
            StorageFailed: the record cannot be written.
        """
        sync(self.folder)
        with self._recording:
            self._finished = [*self._finished, name]
            self._write()

    def publish(self, directory: Path, last: str, existing: bool) -> None:
        """Put all files in place, `last` last."""
        if existing:
            # Interrupted now, it leaves files there that the next run must know for its own.
            self._write(sorted(file.name for file in self.folder.iterdir()))
        publish(self.folder, directory, last, existing)

    def _write(self, published: list[str] | None = None) -> None:
        record = {"plan": self._plan, "finished": self._finished, "published": published or []}
        write_atomic(self._root / _RECORD, json.dumps(record).encode())


@contextmanager
def resumed_directory(directory: Path, last: str, plan: str) -> Iterator[Kept]:
    """Like `staged_directory`, but what was finished before an interruption is still there.

    Until they become `directory`, the files lie in `.lori-export-NAME` beside a new one or
    in `.lori-export` inside an empty one. An interruption or a failing disk leaves them there
    once one is finished.

    Args:
        directory: new or empty, but for what an interrupted run left.
        last: the file without which no reader takes the directory for complete.
        plan: digest of all that the files depend on; files of another plan are removed.
    Raises:
        Conflict: `directory` is a file, or not empty, or another process is writing it.
        StorageFailed: the directory cannot be written.
    """
    target = directory.absolute()
    existing = target.is_dir()
    root = target / _KEPT if existing else target.parent / f"{_KEPT}-{target.name}"
    own = {root.name, *_record(root).get("published", [])} - {last}
    check_target(directory, allowed=own)
    lock = FileLock(root / "lock")
    kept = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        try:
            if existing:
                _take_back(root, target)
            kept = Kept(root, plan)
            yield kept
            kept.publish(target, last, existing)
        except BaseException as error:
            hopeless = isinstance(error, LoriError) and not isinstance(error, StorageFailed)
            if kept is None or not kept.worth or hopeless:
                shutil.rmtree(root, ignore_errors=True)
            raise
        shutil.rmtree(root, ignore_errors=True)
    except Timeout as error:
        raise Conflict(f"{directory} is being written by another process: wait for it") from error
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise Conflict(f"{directory} was written by another process meanwhile") from error
        done = f"; what is finished stays in {root}" if kept is not None and kept.worth else ""
        raise StorageFailed(
            f"cannot write {directory}: {error.strerror or error}; free space and run it again, "
            f"or choose another directory{done}"
        ) from error
    finally:
        lock.release()


def _record(root: Path) -> dict[str, Any]:
    """What an earlier run noted: `plan`, `finished` and `published`; empty where none did."""
    try:
        known = json.loads((root / _RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    shaped = (
        isinstance(known, dict)
        and isinstance(known.get("finished"), list)
        and isinstance(known.get("published"), list)
    )
    return known if shaped else {}


def _take_back(root: Path, directory: Path) -> None:
    """Undo a publication that was interrupted."""
    for name in _record(root).get("published", []):
        if (directory / name).exists():
            (directory / name).replace(root / _FILES / name)
