"""LoRI on a random A against LoRI on the base's leading right singular vectors (`--init svd`).

    python benchmarks/init_svd.py --base MODEL --data FOLDER --work FOLDER --log FILE
        [--processes 4] [--budget-seconds 1500] [--seeds 3] [--tasks a,b,c] [--rank 32]
    python benchmarks/init_svd.py --table --log FILE

Both kinds of A get equal rows, steps and rank, and a learning rate of their own for each of
LoRI-D and LoRI-S and each task, searched on probe rows with a seed of its own. Data, runs and log
are those of `merge_quality.py`. A log is gone on with; the budget is for one call. Differences
are over the same rows, with the seeds' outcomes averaged row by row: intervals and p are about
other rows of the task, not about other seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from heading import heading
from merge_quality import GRID, brief, read

from lori_manager.comparing import difference_of

HERE = Path(__file__).resolve().parent
TASKS = ("clinc_domain", "snips", "sentiment_uci")
KINDS = ("lori-d", "lori-s")
INITS = ("random", "svd")
SEARCH = 1000  # the seed of the search
RATES = {kind: (GRID[kind][0] / 2, *GRID[kind], GRID[kind][-1] * 2) for kind in KINDS}


def kind_name(kind: str, init: str) -> str:
    """What the worker files an adapter under."""
    return kind if init == "random" else f"{kind}-svd"


def spec(task: str, kind: str, init: str, seed: int, rate: float, rank: int) -> dict:
    found = {"what": "train", "task": task, "kind": kind_name(kind, init), "init": init,
             "seed": seed, "rate": rate, "rank": rank}  # fmt: skip
    return found | ({"search": True} if seed == SEARCH else {})


def key(found: dict) -> tuple:
    return found["task"], found["kind"], found["seed"], found["rate"]


def run_all(specs: Sequence[dict], args: argparse.Namespace, deadline: float) -> None:
    """Run what the log has not, in several processes, until the deadline."""
    done = {key(r) for r in read(args.log) if "failed" not in r}
    todo = [s for s in specs if key(s) not in done]
    if not todo:
        return
    shares = [todo[i :: args.processes] for i in range(min(args.processes, len(todo)))]

    def work(share: Sequence[dict]) -> None:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "merge_quality.py"), "--worker", "--base", args.base,
             "--data", args.data, "--work", args.work],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ),
        )  # fmt: skip
        for one in share:
            if time.monotonic() > deadline:
                break
            process.stdin.write(json.dumps(one) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith("{"):
                    with args.log.open("a") as f:
                        f.write(line)
                    print(brief(json.loads(line)), flush=True)
                    break
            else:
                raise SystemExit(f"a process ended with {process.wait()} at {one}")
        process.stdin.close()
        process.wait()

    with ThreadPoolExecutor(len(shares)) as pool:
        list(pool.map(work, shares))


def best(results: Sequence[dict], task: str, kind: str) -> float | None:
    """The rate that was best on probe rows, the lower of equals."""
    scores = {
        r["rate"]: r["probe"]["score"]
        for r in results
        if r["seed"] == SEARCH and (r["task"], r["kind"]) == (task, kind) and "probe" in r
    }
    return min(scores, key=lambda rate: (-scores[rate], rate)) if scores else None


def outcomes(found: dict) -> np.ndarray:
    """One 0 or 1 a row."""
    held = found["eval"]
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(held["bits"]), np.uint8))
    return bits[: held["rows"]].astype(float)


def table(results: Sequence[dict]) -> None:
    """Print each kind of A on each task, and their difference."""
    tasks = sorted({r["task"] for r in results})
    print("\n| kind | task | random A (seeds) | rate | svd A (seeds) | rate "
          "| svd - random [95%] | p |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for kind, task in itertools.product(KINDS, tasks):
        by = {}
        for init in INITS:
            named = kind_name(kind, init)
            mine = {r["seed"]: r for r in results
                    if (r["task"], r["kind"]) == (task, named) and "eval" in r}  # fmt: skip
            by[init] = mine
        seeds = sorted(set(by["random"]) & set(by["svd"]))
        if not seeds:
            continue
        rows = {i: np.mean([outcomes(by[i][s]) for s in seeds], axis=0) for i in INITS}
        found = difference_of(rows["random"], rows["svd"])
        cells = []
        for init in INITS:
            each = [by[init][s]["eval"]["score"] for s in seeds]
            told = " ".join(f"{x:.3f}" for x in each)
            cells += [f"{statistics.fmean(each):.3f} ({told})", f"{by[init][seeds[0]]['rate']:g}"]
        print(f"| {kind} | {task} | " + " | ".join(cells) + f" | {found.change:+.3f} "
              f"[{found.low:+.3f}, {found.high:+.3f}] | {found.p:.2g} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--base")
    add("--data")
    add("--work")
    add("--log", type=Path, required=True)
    add("--tasks", default=",".join(TASKS))
    add("--processes", type=int, default=1)
    add("--rank", type=int, default=32)
    add("--seeds", type=int, default=3)
    add("--budget-seconds", type=float, default=float("inf"))
    add("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        print(heading(f"0 to {args.seeds - 1}", device=device, libraries=("torch", "transformers")))
        deadline = time.monotonic() + args.budget_seconds
        tasks = args.tasks.split(",")
        every = list(itertools.product(tasks, KINDS, INITS))
        searches = [spec(*one, SEARCH, rate, args.rank) for one in every for rate in RATES[one[1]]]
        run_all(searches, args, deadline)
        found = read(args.log)
        chosen = {one: best(found, one[0], kind_name(*one[1:])) for one in every}
        runs = [spec(*one, seed, rate, args.rank) for seed in range(args.seeds)
                for one, rate in chosen.items() if rate is not None]  # fmt: skip
        run_all(runs, args, deadline)
    table(read(args.log))


if __name__ == "__main__":
    main()
