"""What merged adapters keep of what their members knew, on real tasks and a real model.

    python benchmarks/merge_quality.py --base MODEL --data FOLDER --work FOLDER --log FILE
        --plan search|train|joint|merge [--processes 4] [--seeds 3] [--tasks a,b,c]
    python benchmarks/merge_quality.py --table LOG [LOG ...]

Every result is one JSON line in the log with the outcome of every row; tables are assembled
from as many logs as it took. `search` finds each kind's learning rate on probe rows, `train`
trains one adapter a task, kind and seed with the rates of RATES, `joint` one on all tasks,
`merge` merges them by the methods of MERGES; `--specs FILE` runs any other list of specs, a JSON
object a line. FOLDER holds a folder a task with train.jsonl and eval.jsonl; the first 3000
rows train, the last 256 are probe rows, and what is chosen is chosen on those; the first 500
rows of eval.jsonl are scored. Processes share the GPUs in turn.

Retention is the mean over tasks of (merged - chance) / (own - chance), at most 1 each; chance
is the better of random guessing and the commonest answer, what is below it counts as 0, and a
task whose own adapter is not 10 points above it is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from heading import heading

from lori_manager.metrics.continual import average_accuracy, forgetting, learning_accuracy

TASKS = ("wikisql", "snips", "clinc150", "sentiment_uci", "sms_spam", "clinc_domain")
KINDS = ("lora", "lori-s", "lori-d")
GRID = {
    "lora": (2e-4, 5e-4, 1e-3, 2e-3),
    "lori-s": (2e-3, 5e-3, 1e-2, 2e-2),
    "lori-d": (1e-3, 2e-3, 5e-3),
}

# Of a spec: `rows` probe rows of each task, `answered` by its adapter, or with their own labels
# for methods that read those; `pieces` of general text; the rest are the method's options.
MERGES: tuple[tuple[str, dict], ...] = (
    ("soups", {"rows": 256, "steps": 120, "rate": 1e-3, "labels": 0.5}),
    ("soups", {"rows": 256, "steps": 120, "rate": 1e-2, "labels": 0.5}),
    *(("regmean", {"rows": 256, "answered": True, "shrink": s}) for s in (1.0, 0.9, 0.6, 0.1)),
    *(("layerwise", {"rows": 256, "answered": True, "shrink": s}) for s in (1.0, 0.9)),
)


def best_rates(results: Iterable[dict]) -> dict[tuple[str, str], float]:
    """(kind, task) -> the rate that `search` found best on probe rows, the lower of equals.

    For the task "joint" it is the median of the tasks' own.
    """
    found: dict[tuple[str, str], dict[float, float]] = {}
    for r in results:
        if r.get("search") and "probe" in r:
            found.setdefault((r["kind"], r["task"]), {})[r["rate"]] = r["probe"]["score"]
    best = {of: min(by, key=lambda rate: (-by[rate], rate)) for of, by in found.items()}
    for kind in KINDS:
        mine = [rate for (one, _), rate in best.items() if one == kind]
        if mine:
            best[kind, "joint"] = statistics.median_low(mine)
    return best


def search(tasks: Sequence[str], seeds: int, rates: dict) -> Iterator[dict]:
    for task, kind in itertools.product(tasks, KINDS):
        for rate in GRID[kind]:
            yield {"what": "train", "task": task, "kind": kind, "seed": 1000, "rate": rate,
                   "search": True}  # fmt: skip


def train(tasks: Sequence[str], seeds: int, rates: dict) -> Iterator[dict]:
    yield {"what": "base", "tasks": list(tasks)}
    for task, kind, seed in itertools.product(tasks, KINDS, range(seeds)):
        yield {"what": "train", "task": task, "kind": kind, "seed": seed, "rate": rates[kind, task]}


def joint(tasks: Sequence[str], seeds: int, rates: dict) -> Iterator[dict]:
    for kind, seed, rank in itertools.product(KINDS, range(seeds), (32, 32 * len(tasks))):
        yield {"what": "joint", "tasks": list(tasks), "kind": kind, "seed": seed, "rank": rank,
               "rate": rates[kind, "joint"]}  # fmt: skip


def merge(tasks: Sequence[str], seeds: int, rates: dict) -> Iterator[dict]:
    for (method, options), kind, seed in itertools.product(MERGES, KINDS[:2], range(seeds)):
        yield {"what": "merge", "tasks": list(tasks), "kind": kind, "seed": seed, "method": method,
               "options": options}  # fmt: skip


PLANS = {"search": search, "train": train, "joint": joint, "merge": merge}


# ---- running


def run_all(specs: Iterable[dict], args: argparse.Namespace) -> list[dict]:
    """Run every spec in one of the processes; rows are appended to the log as they come."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count() or 1)]
    workers: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
    started = []
    for number in range(args.processes):
        process = subprocess.Popen(
            [sys.executable, __file__, "--worker", "--base", args.base, "--data", args.data,
             "--work", args.work, "--template", args.template],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": cards[number % len(cards)]},
        )  # fmt: skip
        workers.put(process)
        started.append(process)

    def run(spec: dict) -> dict:
        process = workers.get()
        try:
            process.stdin.write(json.dumps(spec) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith("{"):
                    found = json.loads(line)
                    with args.log.open("a") as f:
                        f.write(line)
                    print(brief(found), flush=True)
                    return found
            raise SystemExit(f"a process ended with {process.wait()} at {spec}")
        finally:
            workers.put(process)

    with ThreadPoolExecutor(args.processes) as pool:
        results = list(pool.map(run, specs))
    for process in started:
        process.stdin.close()
    return results


def brief(found: dict) -> str:
    """One line of what was found."""
    kept = {k: v for k, v in found.items() if k not in ("tasks", "scores", "what", "seconds")}
    parts = [found["what"]]
    for key, value in kept.items():
        if isinstance(value, dict) and "score" in value:
            value = f"{value['score']:.3f}"
        parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    for task, got in found.get("scores", {}).items():
        parts.append(f"{task} {got['score']:.3f}")
    return ", ".join(parts) + f" ({found.get('seconds', 0):.1f} s)"


def work(args: argparse.Namespace) -> None:
    import traceback

    from quality_worker import Worker

    worker = Worker(Path(args.base), Path(args.data), Path(args.work), args.template)
    for line in sys.stdin:
        spec = json.loads(line)
        try:
            found = worker.run(spec)
        except Exception as e:  # noqa: BLE001 - one spec's failure is told, the others run on
            traceback.print_exc()
            found = spec | {"failed": f"{type(e).__name__}: {e}"[:300]}
        print(json.dumps(found), flush=True)


# ---- tables


def read(log: Path) -> list[dict]:
    """The rows of a log; none where there is no such file yet."""
    lines = log.read_text().splitlines() if log.is_file() else []
    return [json.loads(line) for line in lines if line]


def chances(data: Path, tasks: Sequence[str]) -> dict[str, float]:
    """The better of random guessing and the commonest answer, on the rows that are scored."""
    out = {}
    for task in tasks:
        lines = (data / task / "eval.jsonl").read_text(encoding="utf-8").splitlines()[:500]
        answers = Counter(json.loads(line)["completion"] for line in lines)
        out[task] = max(max(answers.values()) / len(lines), 1 / len(answers))
    return out


def own_scores(results: Sequence[dict]) -> dict[tuple[str, str, int], float]:
    """(kind, task, seed) -> what the task's own adapter scores."""
    return {
        (r["kind"], r["task"], r["seed"]): r["eval"]["score"]
        for r in results
        if r["what"] == "train" and "eval" in r
    }


def retentions(found: dict, own: dict, chance: dict[str, float]) -> dict[str, float]:
    """Task -> normalised score of one result, from 0 up, tasks at chance left out; not capped."""
    out = {}
    for task, got in found["scores"].items():
        mine = own[found["kind"], task, found["seed"]]
        if mine - chance[task] >= 0.1:
            out[task] = max(got["score"] - chance[task], 0.0) / (mine - chance[task])
    return out


def label(found: dict) -> str:
    """What was done, in one cell."""
    told = dict(found.get("options", {}))
    if found["what"] != "merge":
        kept = ("fresh", "rank", "rate", "labels", "steps", "replay", "passes", "prose", "protect",
                "projection", "energy", "consolidate")  # fmt: skip
        told |= {key: found[key] for key in kept if key in found}
    name = found.get("method", "")
    name = name if found["what"] == "merge" else f"{found['what']} {name}".strip()
    return f"{name} {json.dumps(told) if told else ''}".strip().replace('"', "")


def table(results: Sequence[dict], chance: dict[str, float]) -> None:
    """Print what there is of own adapters, joint training and merges."""
    own = own_scores(results)
    tasks = sorted({task for _, task, _ in own}, key=lambda t: (t not in TASKS, t))
    print("\n| own adapter | " + " | ".join(tasks) + " | s a task |")
    print("|---|" + "---|" * (len(tasks) + 1))
    print("| chance | " + " | ".join(f"{chance[t]:.3f}" for t in tasks) + " | |")
    for kind in sorted({kind for kind, _, _ in own}):
        mine = [r for r in results if r["what"] == "train" and r["kind"] == kind and "eval" in r]
        cells = []
        for task in tasks:
            scores = [r["eval"]["score"] for r in mine if r["task"] == task]
            cells.append(f"{statistics.fmean(scores):.3f}" if scores else "")
        seconds = statistics.median(r["seconds"] for r in mine)
        print(f"| {kind} | " + " | ".join(cells) + f" | {seconds:.1f} |")
    groups: dict[tuple[str, str, str], list[dict]] = {}
    sequences([r for r in results if "matrix" in r])
    for r in results:
        known = all((r.get("kind"), task, r.get("seed")) in own for task in r.get("scores", {}))
        if "scores" in r and "kind" in r and "matrix" not in r and known:
            names = ",".join(r.get("tasks") or r["order"])
            groups.setdefault((r["kind"], label(r), names), []).append(r)
    head = ("kind", "method", "tasks", "mean score", "retention (seeds)", "least task",
            "perplexity", "rank", "MB", "s")  # fmt: skip
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for (kind, name, names), mine in sorted(groups.items()):
        each = [retentions(r, own, chance) for r in mine]
        capped = [statistics.fmean(min(v, 1.0) for v in one.values()) for one in each]
        least = [min(one, key=one.__getitem__) for one in each]
        low = statistics.fmean(one[t] for one, t in zip(each, least, strict=True))
        score = statistics.fmean(s["score"] for r in mine for s in r["scores"].values())
        perplexity = statistics.fmean(r.get("perplexity", float("nan")) for r in mine)
        cells = (
            *(kind, name, len(names.split(",")), f"{score:.3f}"),
            f"{statistics.fmean(capped):.3f} ({' '.join(f'{c:.3f}' for c in capped)})",
            f"{low:.2f} {Counter(least).most_common(1)[0][0]}",
            *(f"{perplexity:.2f}", mine[0].get("rank", "")),
            *(f"{mine[0].get('bytes', 0) / 1e6:.1f}",),
            f"{statistics.median(r['seconds'] for r in mine):.1f}",
        )
        print(f"| {' | '.join(map(str, cells))} |")


def sequences(results: Sequence[dict]) -> None:
    """Print accuracy and forgetting of sequences: means over orders and seeds, and each.

    A task that is still to be taught was not scored; it counts as 0, the base's exact match.
    """
    groups: dict[tuple[str, str], list[dict]] = {}
    for r in results:
        groups.setdefault((r["kind"], label(r)), []).append(r)
    if groups:
        head = (
            "kind",
            "sequence",
            "runs",
            "ACC",
            "LA",
            "F",
            "F of each",
            "perplexity",
            "rank",
            "s",
        )
        print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for (kind, name), mine in sorted(groups.items()):
        figures = []
        for r in mine:
            order = r["order"]
            R = np.array([[row.get(task, 0.0) for task in order] for row in r["matrix"]])
            figures.append([f.value for f in (average_accuracy(R), learning_accuracy(R),
                                              forgetting(R))])  # fmt: skip
        means = [f"{statistics.fmean(column):.3f}" for column in zip(*figures, strict=True)]
        each = " ".join(f"{f:.3f}" for _, _, f in figures)
        perplexity = f"{statistics.median(r['perplexity'] for r in mine):.1f}"
        seconds = f"{statistics.median(r['seconds'] for r in mine):.0f}"
        cells = (kind, name, len(mine), *means, each, perplexity, mine[0]["rank"], seconds)
        print(f"| {' | '.join(map(str, cells))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--base")
    add("--data")
    add("--work")
    add("--log", type=Path)
    add("--plan", choices=sorted(PLANS))
    add("--specs", type=Path)
    add("--tasks", default=",".join(TASKS))
    add("--template", choices=("own", "neutral"), default="own")
    add("--processes", type=int, default=1)
    add("--seeds", type=int, default=3)
    add("--table", type=Path, nargs="+")
    add("--worker", action="store_true")
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    tasks = args.tasks.split(",")
    if args.table:
        results = [r for log in args.table for r in read(log)]
        named = {t for r in results for t in [r.get("task"), *r.get("scores", {})] if t}
        table(results, chances(Path(args.data), sorted(named)))
        return
    if args.specs:
        specs = [json.loads(line) for line in args.specs.read_text().splitlines() if line.strip()]
    else:
        specs = list(PLANS[args.plan](tasks, args.seeds, best_rates(read(args.log))))
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(heading(f"0 to {args.seeds - 1}", device=device, libraries=("torch", "transformers")))
    run_all(specs, args)


if __name__ == "__main__":
    main()
