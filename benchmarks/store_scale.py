"""How a registry of many versions answers, what a commit costs, and how fast `verify` reads.

    python benchmarks/store_scale.py [--versions 100000] [--lines 200] [--tasks 100] [--rows 100]
                                     [--runs 7] [--megabytes 800] [--seed 0] [--folder DIR]

The registry is synthetic: every version has a row like a trained one, is continued from the one
before on its line, and has one score with an outcome for each of `rows` eval rows (right with
probability .7). Commands are whole processes, in turns with `import sqlalchemy`. A commit is
`Store.add_adapter` of 100 kB; beside it the bare sequence of the same fsyncs is timed. `verify`
reads adapters of 8 MB each, and sha256sum the same files; both from the page cache.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from heading import heading
from sqlalchemy import insert

from lori_manager.metrics.summary import summarize
from lori_manager.records import Base, NewAdapter, NewScore, Split
from lori_manager.store import adding
from lori_manager.store import tables as t
from lori_manager.store.files import write_atomic
from lori_manager.store.store import Store

MARK = "0" * 64
CONFIG = {"rank": 32, "alpha": 64.0, "seed": 0, "targets": ["q_proj", "v_proj"], "batch": 32}
FACTS = {"rows": 1000, "steps": 100, "tokens": 100000, "seconds": 60.0, "last_loss": 0.5}
GOAL = 0.5


def new(line: str) -> NewAdapter:
    return NewAdapter(
        line=line, origin="trained", task=None, task_revision=None, mask=None, parents=(),
        method="lori-s", rank=32, projection="a" * 64, base=MARK, config=CONFIG,
        versions={"torch": "2.13.0"}, facts=FACTS,
    )  # fmt: skip


def begin(folder: Path) -> Store:
    store = Store.create(folder / ".lori")
    store.set_base(Base(MARK, "none", None, str(folder), "llama", datetime.now(UTC)))
    return store


def fill(store: Store, versions: int, lines: int, tasks: int, rows: int, seed: int) -> None:
    """Rows straight into the tables, since a hundred thousand commits would take an hour."""
    for i in range(tasks):
        digest = store.objects.put(b"rows of task %d" % i)
        store.add_task(
            f"task-{i:03d}", scorer="exact_match", scorer_version="1", description="",
            splits={"eval": Split(digest, rows)}, options={},
        )  # fmt: skip
    for i in range(lines):
        store.add_line(f"line-{i:03d}")
    digests = [random.Random(f"{seed} {i}").randbytes(32).hex() for i in range(versions)]
    made, parents = [], []
    for i, digest in enumerate(digests):
        row = {k: v for k, v in vars(new(f"line-{i % lines:03d}")).items() if k != "parents"}
        del row["mask"]
        row |= {"mask_task": None, "mask_version": None, "version": i // lines + 1,
                "digest": digest, "bytes": 1_000_000, "created_at": datetime.now(UTC)}  # fmt: skip
        made.append(row | {"id": i + 1})
        if i >= lines:
            parents.append({"adapter": i + 1, "position": 0, "line": row["line"],
                            "version": i // lines, "digest": digests[i - lines]})  # fmt: skip
    with store._db.write() as connection:
        for start in range(0, versions, 10_000):
            connection.execute(insert(t.adapters), made[start : start + 10_000])
        for start in range(0, len(parents), 10_000):
            connection.execute(insert(t.parents), parents[start : start + 10_000])
    chance = np.random.default_rng(seed)
    known = store.tasks()
    for start in range(0, versions, 10_000):
        batch = []
        with store._db.write() as connection:
            writer = adding._Writer(connection, keep=False)
            numbers = range(start, min(start + 10_000, versions))
            subjects = [{"id": 128 + i, "digest": digests[i]} for i in numbers]
            connection.execute(insert(t.subjects), subjects)
            for i in numbers:  # what the writer would ask for one by one
                ref = f"line-{i % lines:03d}@{i // lines + 1}"
                writer._subjects[ref] = digests[i], ref
                writer._keys["subjects", digests[i]] = 128 + i
                task = known[i % tasks]
                right = (chance.random(rows) < 0.7).astype(np.float32)
                value, error, count = summarize(right)
                batch.append((
                    NewScore(ref, digests[i], task.name, 1, task.scorer, "1", "fp32", value,
                             error, count, facts={"unit": "share"}),
                    right, None,
                ))  # fmt: skip
            writer.add(batch, [datetime.now(UTC)] * len(batch))


def seconds(command: list[str], folder: Path) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)  # fmt: skip
    return time.perf_counter() - start


def commands(folder: Path, lines: int, runs: int) -> None:
    lori = [sys.executable, "-m", "lori_manager"]
    asked = {
        "import sqlalchemy": [sys.executable, "-c", "import sqlalchemy"],
        "lori log": [*lori, "log"],
        "lori log line-007": [*lori, "log", "line-007"],
        f"lori show line-{lines // 2:03d}@3": [*lori, "show", f"line-{lines // 2:03d}@3"],
        "lori tasks": [*lori, "tasks"],
        "lori lines": [*lori, "lines"],
    }
    taken: dict[str, list[float]] = {label: [] for label in asked}
    worked: dict[str, list[float]] = {label: [] for label in asked}
    for i in range(runs + 1):
        for label, command in asked.items():
            before = _worked()
            spent = seconds(command, folder)
            if i:  # the first round fills caches
                taken[label].append(spent)
                worked[label].append(_worked() - before)
    alchemy = statistics.median(taken["import sqlalchemy"])
    print("\n| process | median s | least - most | over sqlalchemy | on the CPU s | goal s |")
    print("|---|---|---|---|---|---|")
    for label, times in taken.items():
        m = statistics.median(times)
        goal = "-" if label in ("import sqlalchemy", "lori lines") else GOAL
        print(f"| `{label}` | {m:.3f} | {min(times):.3f} - {max(times):.3f} | {m / alchemy:.2f} | "
              f"{statistics.median(worked[label]):.3f} | {goal} |")  # fmt: skip


def _worked() -> float:
    """Seconds that ended child processes had a core."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def commits(store: Store, folder: Path, count: int) -> None:
    """Versions one by one, and as many files written, synced and renamed without any row."""
    whole, bare = [], []
    for i in range(count):
        blob = os.urandom(100_000)
        start = time.perf_counter()
        store.add_adapter(new(f"line-{i % 7:03d}"), blob)
        whole.append(1e3 * (time.perf_counter() - start))
        start = time.perf_counter()
        _syncs(folder, blob)
        bare.append(1e3 * (time.perf_counter() - start))
    over = [a - b for a, b in zip(whole, bare, strict=True)]
    print(f"\ncommit of a version: median {statistics.median(whole):.1f} ms, its fsyncs alone "
          f"{statistics.median(bare):.1f} ms, over these {statistics.median(over):.1f} ms "
          f"({count} commits; goal 50 ms)")  # fmt: skip


def _syncs(folder: Path, blob: bytes) -> None:
    """The fsyncs of one commit and their data: the object and its folders, SQLite's journal, its
    header, the database, and the folder twice."""
    write_atomic(folder / "probe", blob)
    probe = folder / "journal"
    for size in (40_000, 12, 40_000):
        with probe.open("wb") as f:
            f.write(bytes(size))
            f.flush()
            os.fsync(f.fileno())
    descriptor = os.open(folder, os.O_RDONLY)
    for _ in range(4):
        os.fsync(descriptor)
    os.close(descriptor)


def verifying(folder: Path, megabytes: int, runs: int) -> None:
    """`lori verify` against sha256sum on the same adapters."""
    import torch

    from lori_manager.engine.codec import encode_adapter
    from lori_manager.engine.projection import ProjectionSpec
    from lori_manager.engine.weights import AdapterWeights, Block

    random = torch.Generator().manual_seed(0)
    files = []
    with begin(folder) as store:
        for i in range(max(1, megabytes // 8)):
            B = {f"layers.{k}.q_proj": torch.randn(4096, 32, generator=random).bfloat16()
                 for k in range(32)}  # fmt: skip
            spec = ProjectionSpec(i, "main", 32, dict.fromkeys(B, 4096))
            block = Block(B, 2.0, spec)
            adapter = store.add_adapter(new("main"), encode_adapter(AdapterWeights((block,))))
            files.append(store.objects.where(adapter.digest))
    size = sum(Path(file).stat().st_size for file in files) / 1e6
    race: dict[str, Callable[[], float]] = {
        "sha256sum": lambda: seconds(["sha256sum", *files], folder),
        "lori verify": lambda: seconds([sys.executable, "-m", "lori_manager", "verify"], folder),
    }
    taken: dict[str, list[float]] = {label: [] for label in race}
    for i in range(runs + 1):
        for label, run in race.items():
            spent = run()
            if i:
                taken[label].append(spent)
    speed = {label: size / statistics.median(times) for label, times in taken.items()}
    print(f"\n{len(files)} adapters, {size:.0f} MB")
    for label, times in taken.items():
        print(f"{label}: {statistics.median(times):.2f} s ({min(times):.2f} - {max(times):.2f}), "
              f"{speed[label]:.0f} MB/s")  # fmt: skip
    print(f"verify has {100 * speed['lori verify'] / speed['sha256sum']:.0f}% of sha256sum's speed "
          "(goal 60%)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=100_000)
    parser.add_argument("--lines", type=int, default=200)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=800, help="for verify; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where; a temporary folder by default")
    args = parser.parse_args()

    print(heading(args.seed, libraries=("lori-manager", "numpy", "sqlalchemy")))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        many, files = folder / "many", folder / "files"
        many.mkdir()
        files.mkdir()
        if args.versions:
            start = time.perf_counter()
            with begin(many) as store:
                fill(store, args.versions, args.lines, args.tasks, args.rows, args.seed)
                size = (many / ".lori" / "registry.db").stat().st_size
                print(f"{args.versions:,} versions on {args.lines} lines, {args.tasks} tasks, "
                      f"{args.versions * args.rows:,} outcomes; registry.db {size / 1e6:.0f} MB, "
                      f"made in {time.perf_counter() - start:.0f} s")  # fmt: skip
                commands(many, args.lines, args.runs)
                commits(store, many, 50)
        if args.megabytes:
            verifying(files, args.megabytes, args.runs)


if __name__ == "__main__":
    main()
