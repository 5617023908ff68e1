"""Whether the ground is sound that a workspace stands on: disk, clock, database, base, GPU stack.

What is stored is `verify`'s to check. Nothing is changed, and neither torch nor a model is loaded.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

from lori_manager import models
from lori_manager.errors import LoriError, StorageFailed
from lori_manager.store import databases
from lori_manager.store.database import HEAD, Database
from lori_manager.store.databases import REGISTRY
from lori_manager.store.mounts import file_system
from lori_manager.store.postgres import OLDEST, Postgres, ServerFacts
from lori_manager.store.sqlite import SAFE_WAL, WAL, SQLite
from lori_manager.store.store import Store
from lori_manager.store.tables import now

OK, NOTE, TROUBLE = "ok", "note", "trouble"
LEAST_SPACE = 100_000_000  # bytes free, below which a training can hardly store what it learns
LOW_SPACE = 5_000_000_000
SKEW = timedelta(minutes=1)  # that clocks of machines on one disk may differ by
GPU_LIBRARIES = ("triton", "bitsandbytes", "liger-kernel")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: "ok", "note" (it may matter) or "trouble" (mend it)."""

    name: str
    state: str
    told: str


def examine(root: Path) -> Iterator[Check]:
    """Everything about the store in the folder `root` (a workspace's `.lori`)."""
    yield from _database(root)
    yield from _disk(root)
    yield from _permissions(root)
    try:
        with Store.open(root) as store:
            for part in (_objects, _clock, _base, _runs):
                yield from _guarded(part, store)
    except LoriError as e:
        yield Check("store", TROUBLE, str(e))
    yield from _gpu()


def _guarded(part: Callable[[Store], Iterator[Check]], store: Store) -> Iterator[Check]:
    try:
        yield from part(store)
    except (LoriError, OSError) as e:
        yield Check(part.__name__.strip("_"), TROUBLE, str(e))


def _database(root: Path) -> Iterator[Check]:
    if not databases.begun(root):
        path = root / REGISTRY
        yield Check("database", TROUBLE, f"there is no {path}: restore it from a copy")
        return
    try:
        backend = databases.backend(root)
        mode = backend.journal() if isinstance(backend, SQLite) else None
        facts = backend.facts() if isinstance(backend, Postgres) else None
        database = Database(backend)
        revision = database.noted_revision()
        database.close()
    except LoriError as e:
        yield Check("database", TROUBLE, str(e))
    else:
        if revision == HEAD:
            yield Check("schema", OK, f"at {revision}")
        else:
            yield Check("schema", TROUBLE, f"at {revision}, this lori needs {HEAD}: run "
                        "`lori db upgrade`, or a newer lori")  # fmt: skip
        if mode is not None:
            yield _journal(mode)
        if facts is not None:
            yield from _server(facts)
    kind, local = file_system(root)
    if local or kind == "unknown":
        yield Check("file system", OK, kind)
    else:
        yield Check("file system", NOTE, f"{kind} is no local disk: locks may not hold between "
                    "machines there, so let one machine write")  # fmt: skip


def _server(facts: ServerFacts) -> Iterator[Check]:
    told = f"PostgreSQL {facts.number}, schema {facts.schema}"
    if facts.version < OLDEST:
        yield Check("server", TROUBLE, f"{told}: use {OLDEST} or newer")
    elif facts.standby:
        yield Check("server", TROUBLE, f"{told}, a standby: use the server that takes writes")
    else:
        yield Check("server", OK, told + ("" if facts.checksums else ", without data checksums"))
    if not facts.lasting:
        yield Check("durability", TROUBLE, "fsync or full_page_writes is off: a crash of the "
                    "server may lose or damage everything; turn both on")  # fmt: skip
    elif facts.synchronous_commit == "off":
        yield Check("durability", NOTE, "synchronous_commit is off; lori turns it on for its own "
                    "commits")  # fmt: skip
    else:
        yield Check("durability", OK, f"fsync and full_page_writes are on, synchronous_commit is "
                    f"{facts.synchronous_commit}")  # fmt: skip
    if facts.bare:
        yield Check("encryption", NOTE, "rows and login pass the network unencrypted: add "
                    "?sslmode=verify-full to the URL in database.json")  # fmt: skip
    apart = abs(facts.now - now())
    if apart > SKEW:
        yield Check("server clock", NOTE, f"{apart.total_seconds():.0f} s from this machine's: "
                    "times in the store are of the machines that write")  # fmt: skip


def _journal(mode: str) -> Check:
    version = sqlite3.sqlite_version
    bug = sqlite3.sqlite_version_info < SAFE_WAL
    if mode != WAL:
        harmless = ", whose bug in WAL mode does not matter here" if bug else ""
        return Check("journal", OK, f"rollback, SQLite {version}{harmless}")
    if bug:
        return Check("journal", TROUBLE, f"WAL, and SQLite {version} may damage the database in "
                     "that mode: run `lori db journal rollback`")  # fmt: skip
    return Check("journal", OK, f"WAL, SQLite {version}")


def _disk(root: Path) -> Iterator[Check]:
    usage = shutil.disk_usage(root)
    told = f"{usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.0f} GB"
    state = OK if usage.free >= LOW_SPACE else NOTE if usage.free >= LEAST_SPACE else TROUBLE
    yield Check("space", state, told + ("" if state == OK else ": free some, `lori gc` may help"))
    yield _locks(root)


def _locks(root: Path) -> Check:
    """Whether a lock that is held keeps another one out."""
    from filelock import FileLock, Timeout

    probe = root / ".doctor.lock"
    try:
        with FileLock(probe):
            try:
                FileLock(probe).acquire(timeout=0)
            except Timeout:
                return Check("locks", OK, "hold")
            return Check("locks", TROUBLE, "two processes may get the same lock here: move the "
                         "workspace to another file system")  # fmt: skip
    except OSError as e:
        return Check("locks", TROUBLE, f"{probe} cannot be locked: {e.strerror or e}")
    finally:
        probe.unlink(missing_ok=True)


def _permissions(root: Path) -> Iterator[Check]:
    folders = [root, *(root / name for name in ("objects", "runs", "locks"))]
    wrong = []
    for folder in folders:
        if not folder.is_dir():
            continue
        mode = stat.S_IMODE(folder.stat().st_mode)
        if mode & 0o077:
            wrong.append(f"others may enter {folder} (mode {mode:o}): run `chmod 700 {folder}`")
        elif not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            wrong.append(f"{folder} cannot be written by this user")
    path = root / REGISTRY
    if path.is_file() and not os.access(path, os.R_OK | os.W_OK):
        wrong.append(f"{path} cannot be written by this user")
    for told in wrong:
        yield Check("permissions", TROUBLE, told)
    if not wrong:
        yield Check("permissions", OK, "folders are this user's alone")


def _objects(store: Store) -> Iterator[Check]:
    """Whether the place for objects can be reached and is this store's."""
    store.objects.confirm()
    yield Check("objects", OK, store.objects.url)


def _clock(store: Store) -> Iterator[Check]:
    """Times in the store against the clock, and against their own order."""
    times = store.times()
    newest = max((made for line in times for made in line), default=None)
    if newest is not None and newest - now() > SKEW:
        yield Check("clock", TROUBLE, f"a version is of {newest:%Y-%m-%d %H:%M} UTC, which is yet "
                    "to come: set this machine's clock")  # fmt: skip
        return
    later = _in_the_future([store.root / REGISTRY, *store.runs.glob("*")])
    if later is not None:
        yield Check("clock", NOTE, f"{later} was changed in what is the future by this machine's "
                    "clock: clocks differ, or one was set back")  # fmt: skip
        return
    back = sum(b < a for line in times for a, b in pairwise(line))
    if back:
        yield Check("clock", NOTE, f"it went back {back} time(s) between versions: times may "
                    "mislead, version numbers do not")  # fmt: skip
    else:
        yield Check("clock", OK, f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}")


def _in_the_future(paths: list[Path]) -> Path | None:
    limit = time.time() + SKEW.total_seconds()
    return next((path for path in paths if path.exists() and path.stat().st_mtime > limit), None)


def _base(store: Store) -> Iterator[Check]:
    base = store.base()
    folder = Path(base.path)
    if not folder.is_dir():
        yield Check("base", TROUBLE, f"{folder} is gone: say where the weights are with "
                    "`lori base --move PATH`")  # fmt: skip
        return
    try:
        mark = models.fingerprint(folder, store.root / "fingerprint.json")
    except StorageFailed:  # the cache cannot be written, which is told elsewhere
        mark = models.fingerprint(folder)
    if mark == base.fingerprint:
        yield Check("base", OK, f"{base.source}, {mark[:12]}")
    else:
        yield Check("base", TROUBLE, f"{folder} holds weights {mark[:12]}, expected "
                    f"{base.fingerprint[:12]}: restore these")  # fmt: skip


def _runs(store: Store) -> Iterator[Check]:
    found = store.open_runs()
    if found:
        told = ", ".join(
            f"{' '.join(run.plan.get('tasks', []))} ({run.id[:8]})" for run in found[:5]
        )
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        yield Check(
            "trainings",
            NOTE,
            f"unfinished: {told}{more}; the same command "
            "goes on, in the folder where it began; `lori db abandon` gives one up",
        )
    else:
        yield Check("trainings", OK, "none is unfinished")


def _gpu() -> Iterator[Check]:
    """The stack as installed, without importing it."""
    cuda = _torch_cuda()
    gpus = sorted(str(device) for device in Path("/dev").glob("nvidia[0-9]*"))
    driver = _driver()
    installed = [f"torch {_version('torch')} ({f'CUDA {cuda}' if cuda else 'without CUDA'})"]
    installed += [f"{name} {_version(name)}" for name in GPU_LIBRARIES]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    yield Check("libraries", OK, ", ".join(installed))
    if gpus and not cuda:
        yield Check("gpu", NOTE, f"{len(gpus)} GPU(s) and a torch without CUDA: install torch's "
                    "CUDA build to use them")  # fmt: skip
    elif gpus and driver is None:
        yield Check("gpu", NOTE, f"{len(gpus)} GPU(s) and no driver loaded")
    elif gpus:
        limit = f", CUDA_VISIBLE_DEVICES={seen}" if seen is not None else ""
        yield Check("gpu", OK, f"{len(gpus)}, driver {driver}{limit}")
    else:
        yield Check("gpu", OK, "none: the CPU is used")


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


def _torch_cuda() -> str | None:
    """The CUDA that torch was built for, read from its sources."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.origin:
        return None
    try:
        text = Path(found.origin).with_name("version.py").read_text("utf-8")
    except OSError:
        return None
    told = re.search(r"^cuda\b[^=\n]*=\s*['\"]([0-9.]+)['\"]", text, re.MULTILINE)
    return told and told[1]


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text("utf-8")
    except OSError:
        return None
    told = re.search(r"\b([0-9]{3}\.[0-9.]+)\b", text)
    return told[1] if told else "of unknown version"
