"""How large a long history of evaluations is in registry.db, and how fast it is read.

    python benchmarks/history_size.py [--kind skill|coin] [--tasks 200] [--versions 500]
                                      [--rows 1000] [--seed 0] [--keep DIR]

Synthetic right/wrong outcomes of every version on every task, written in the order of
life: one version after the other, all tasks of each in one transaction. `skill`: a row is
right with probability sigmoid(s - d), d its difficulty, N(0, 2), and s the version's skill
on the task, which walks around 1 with steps N(0, 0.3) (the Rasch model, each version drawn
anew, so that neighbours have no more in common than skill). `coin`: every outcome is an
independent coin, which nothing can compress. No model is loaded.
"""

from __future__ import annotations

import argparse
import math
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
from lori_manager.records import Base, NewAdapter, NewScore, Split
from lori_manager.store.store import Store

FACTS = {"higher_is_better": True, "unit": "share"}
BASE = "0" * 64


def prepare(root: Path, tasks: int, versions: int, rows: int) -> tuple[int, int, int]:
    """A store with tasks and one line of adapters: the file's size empty, with tasks, with all."""
    path = root / "registry.db"
    with Store.create(root) as store:
        store.set_base(Base(BASE, "none", None, str(root), "llama", datetime.now(UTC)))
        sizes = [path.stat().st_size]
        for i in range(tasks):
            digest = store.objects.put(b"rows of task %d" % i)
            store.add_task(
                f"task-{i:03d}", scorer="exact_match", scorer_version="1", description="",
                splits={"eval": Split(digest, rows)}, options={},
            )  # fmt: skip
        sizes.append(path.stat().st_size)
        for i in range(versions):
            store.add_adapter(
                NewAdapter(
                    line="main", origin="trained", task=None, task_revision=None, mask=None,
                    parents=(), method="lori-s", rank=32, projection=None, base=BASE,
                ),
                b"adapter %d" % i,
            )  # fmt: skip
        sizes.append(path.stat().st_size)
    return sizes[0], sizes[1], sizes[2]


def histories(kind: str, tasks: int, rows: int, seed: int) -> Iterator[np.ndarray]:
    """For one version after the other its outcomes, bool (tasks, rows)."""
    random = np.random.default_rng(seed)
    difficulty = random.normal(0, 2, (tasks, rows))
    skill = random.normal(1, 1, (tasks, 1))
    while True:
        skill = 1 + 0.95 * (skill - 1) + random.normal(0, 0.3, (tasks, 1))
        right = 1 / (1 + np.exp(difficulty - skill)) if kind == "skill" else 0.5
        yield random.random((tasks, rows)) < right


def write(root: Path, kind: str, versions: int, seed: int) -> tuple[float, float]:
    """All scores; the seconds that storing took, and the entropy of the outcomes in bytes each."""
    spent, entropy = 0.0, []
    with Store.open(root) as store:
        tasks, adapters = store.tasks(), store.adapters("main")
        told = histories(kind, len(tasks), tasks[0].splits["eval"].rows, seed)
        for adapter, outcomes in zip(adapters[:versions], told, strict=False):
            batch = []
            for task, values in zip(tasks, outcomes.astype(np.float32), strict=True):
                value, error, rows = summarize(values)
                new = NewScore(
                    adapter.ref, adapter.digest, task.name, task.revision, task.scorer,
                    task.scorer_version, "bf16", value, error, rows, facts=FACTS,
                )  # fmt: skip
                batch.append((new, values, None))
                if 0 < value < 1:
                    entropy.append(-value * math.log2(value) - (1 - value) * math.log2(1 - value))
            start = time.perf_counter()
            store.add_scores(batch)
            spent += time.perf_counter() - start
    return spent, statistics.mean(entropy) / 8


def milliseconds(root: Path, names: list[str]) -> tuple[list[float], list[float]]:
    """To list one task's scores, and to load all of their outcomes."""
    listing, loading = [], []
    for name in names:
        with Store.open(root) as store:
            start = time.perf_counter()
            scores = store.scores(task=name)
            listed = time.perf_counter()
            store.outcomes_of(scores)
            loading.append(1e3 * (time.perf_counter() - listed))
            listing.append(1e3 * (listed - start))
    return listing, loading


def process(command: list[str], folder: Path, runs: int = 5) -> str:
    """Median and range of a whole process's wall time, after one to warm up."""
    taken = []
    for i in range(runs + 1):
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        if i:
            taken.append(time.perf_counter() - start)
    return f"{statistics.median(taken):.3f} s ({min(taken):.3f} - {max(taken):.3f})"


FIRST = """
from pathlib import Path
from lori_manager.store.store import Store
with Store.open(Path(".lori")) as store:
    for task, scores in store.scores_by_task():
        table = store.outcomes_of(scores)
        print(task.ref, len(scores), sum(float(values.mean()) for values, _ in table))
        break
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=["skill", "coin"], default="skill")
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--versions", type=int, default=500)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="leave the workspace in this new folder")
    args = parser.parse_args()

    print(heading(args.seed, libraries=("lori-manager", "numpy", "sqlalchemy")))
    with tempfile.TemporaryDirectory() as name:
        folder = args.keep or Path(name)
        folder.mkdir(exist_ok=True)
        root = folder / ".lori"
        empty, with_tasks, with_all = prepare(root, args.tasks, args.versions, args.rows)
        spent, entropy = write(root, args.kind, args.versions, args.seed)
        size = (root / "registry.db").stat().st_size
        scores = args.tasks * args.versions
        count = scores * args.rows
        print(
            f"{args.kind}: {args.tasks} tasks x {args.versions} versions x {args.rows} rows, "
            f"{count:,} outcomes; entropy of each score alone {entropy:.4f} byte an outcome\n"
        )
        print("| registry.db | bytes | byte an outcome |")
        print("|---|---|---|")
        for label, part in {
            "scores with all that belongs to them": size - with_all,
            "tasks": with_tasks - empty,
            "adapters": with_all - with_tasks,
            "all, less an empty registry": size - empty,
        }.items():
            print(f"| {label} | {part:,} | {part / count:.4f} |")
        print(f"\nwriting: {spent:.1f} s, {1e3 * spent / scores:.2f} ms a score")
        names = [f"task-{i:03d}" for i in range(0, args.tasks, max(1, args.tasks // 10))]
        for label, taken in zip(("listing", "loading"), milliseconds(root, names), strict=True):
            print(
                f"{label} a task's {args.versions} scores: median {statistics.median(taken):.1f} "
                f"ms, at most {max(taken):.1f} ms ({len(taken)} tasks)"
            )
        script = Path(sys.executable).with_name("lori")
        lori = [str(script)] if script.is_file() else [sys.executable, "-m", "lori_manager"]
        for label, command in {
            "python -c 'import sqlalchemy'": [sys.executable, "-c", "import sqlalchemy"],
            "python: open, first task listed and loaded": [sys.executable, "-c", FIRST],
            "lori lines": [*lori, "lines"],
            "lori show main@1": [*lori, "show", "main@1"],
        }.items():
            print(f"{label}: {process(command, folder)}")


if __name__ == "__main__":
    main()
