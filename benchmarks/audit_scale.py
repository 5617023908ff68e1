"""How long `lori audit` takes on a long history, and how soon its first task is there.

    python benchmarks/audit_scale.py [--tasks 200] [--versions 500] [--rows 1000] [--runs 5]
        [--keep DIR]

The store is filled without a model. Every task has its own adapter; the line `main` merges
them one after another and goes on; all its versions are scored on all tasks, right or wrong
on every row. A version changes some 2% of the rows of the one before it, one way as often as the
other but for one step in a hundred, which loses 5 points. Timed are whole processes,
from their start to the first output of a task, and to their end.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from heading import heading

from lori_manager.metrics.summary import summarize
from lori_manager.records import Base, NewAdapter, NewScore, Parent, Split
from lori_manager.store.store import Store

GOAL = 1.0  # seconds to the first output
FLIPPED, DROP, DROPS = 0.02, 0.05, 0.01


def fill(folder: Path, tasks: int, versions: int, rows: int, seed: int) -> None:
    """A workspace with that history."""
    mark = "0" * 64
    with Store.create(folder / ".lori") as store:
        store.set_base(Base(mark, "none", None, str(folder), "llama", datetime.now(UTC)))
        split = Split(store.objects.put(b"{}\n" * rows), rows)
        names = [f"task-{i:03d}" for i in range(tasks)]
        for name in names:
            store.add_task(
                name, scorer="exact_match", scorer_version="1", description="",
                splits={"eval": split}, options={},
            )  # fmt: skip

        def adapter(line: str, task: str | None, parents: list[Parent]) -> Parent:
            new = NewAdapter(
                line=line, origin="trained" if task else "merged", task=task,
                task_revision=1 if task else None, mask=None, parents=parents, method="none",
                rank=8, projection=None, base=mark,
            )  # fmt: skip
            made = store.add_adapter(new, f"{line} {len(parents)} {parents}".encode())
            return Parent(made.ref, made.digest, 1.0)

        own = [adapter(name, name, []) for name in names]
        line = [adapter("main", None, [own[0]])]
        for v in range(1, versions):
            line.append(adapter("main", None, [line[-1], own[v % tasks]]))
        store.set_alias("main", "production", max(1, versions - 50))
        for i, name in enumerate(names):
            random = np.random.default_rng([seed, i])
            subjects = [Parent("base", mark), own[i], *line]
            scored = zip(subjects, history(random, versions, rows), strict=True)
            store.add_scores([(score(name, who, x), x, None) for who, x in scored])


def history(random: np.random.Generator, versions: int, rows: int) -> Iterator[np.ndarray]:
    """Outcomes (rows,) of the base, the own adapter and each version."""
    yield (random.random(rows) < 0.3).astype(np.float32)
    x = random.random(rows) < 0.8
    yield x.astype(np.float32)
    for _ in range(versions):
        right, wrong = np.flatnonzero(x), np.flatnonzero(~x)
        gained = int(random.poisson(rows * FLIPPED / 2))
        lost = int(random.poisson(rows * FLIPPED / 2))
        lost += round(rows * DROP) if random.random() < DROPS else 0
        x = x.copy()
        x[random.choice(wrong, min(gained, wrong.size), replace=False)] = True
        x[random.choice(right, min(lost, right.size), replace=False)] = False
        yield x.astype(np.float32)


def score(task: str, subject: Parent, outcomes: np.ndarray) -> NewScore:
    value, error, rows = summarize(outcomes)
    return NewScore(
        subject.ref, subject.digest, task, 1, "exact_match", "1", "fp32", value, error, rows
    )


def timed(command: list[str], folder: Path, *, first_alone: bool) -> tuple[float, float, int]:
    """Seconds to the first line that names a task, processor seconds in all, bytes printed."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE)
    if process.stdout is None:
        raise SystemExit("no pipe to read the command's output from")
    first, size = float("nan"), 0
    for line in process.stdout:
        size += len(line)
        if first != first and b"task-" in line:
            first = time.perf_counter() - start
            if first_alone:
                process.kill()
                break
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if not first_alone and process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return first, usage.ru_utime + usage.ru_stime, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--versions", type=int, default=500)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5, help="of each command, to first output")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the history, used again if there")
    args = parser.parse_args()

    print(heading(args.seed, libraries=("lori-manager", "numpy", "sqlalchemy")))
    with tempfile.TemporaryDirectory() as name:
        folder = args.keep or Path(name)
        if not (folder / ".lori").exists():
            folder.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            fill(folder, args.tasks, args.versions, args.rows, args.seed)
            print(f"filled in {time.perf_counter() - start:.0f} s")
        size = (folder / ".lori" / "registry.db").stat().st_size
        scores = args.tasks * (args.versions + 2)
        print(
            f"{args.tasks} tasks x {args.versions} versions x {args.rows} rows: {scores} scores, "
            f"registry.db {size / 1e6:.1f} MB, {size / (scores * args.rows):.3f} byte an outcome\n"
        )
        lori = [sys.executable, "-m", "lori_manager"]
        print("| command | first output s, median (least - most) | its processor s | all s | kB |")
        print("|---|---|---|---|---|")
        for words in (
            ["audit"],
            ["audit", f"main@{args.versions}"],
            ["audit", "--task", "task-007"],
            ["audit", "--all", "--task", "task-007"],
            ["audit", "--format", "csv"],
            ["audit", "--json"],
        ):
            runs = [timed([*lori, *words], folder, first_alone=True) for _ in range(args.runs)]
            firsts, spent = ([run[i] for run in runs] for i in (0, 1))
            _, every, printed = timed([*lori, *words], folder, first_alone=False)
            print(
                f"| `lori {' '.join(words)}` | {statistics.median(firsts):.2f} "
                f"({min(firsts):.2f} - {max(firsts):.2f}) | {statistics.median(spent):.2f} | "
                f"{every:.1f} | {printed / 1e3:,.0f} |"
            )
        print(f"\ngoal: first output of `lori audit` in {GOAL:g} s; all s: processor's, to the end")
    print(f"\nload of the machine at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
