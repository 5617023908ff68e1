"""Every kind of adapter on several tasks: scores, costs, and which differ really.

    python benchmarks/compare_kinds.py --base MODEL --data FOLDER --work FOLDER --log FILE
        --tasks a,b,c [--kinds lori,lora,...] [--seeds 3] [--processes 7] [--gpus 2]
        [--budget-seconds 480]
    python benchmarks/compare_kinds.py --plan time ...
    python benchmarks/compare_kinds.py --table LOG [LOG ...]

What each process does is what `lori compare` does, in a workspace of its own. FOLDER holds a
folder a task with train.jsonl and eval.jsonl, of which the first --rows and --eval-rows count.
`--plan compare` searches a learning rate for every kind and task on training rows, then trains
every cell with the first seed before any with the second, so that a run that is cut off leaves
a balanced table; it goes on where the log ends. `--plan time` runs one process a GPU and takes
the time of a step and the peak memory of every kind alone. Every result is one JSON line in the
log, with every row's outcome; the table is assembled from as many logs as it took.
"""

from __future__ import annotations

import argparse
import base64
import heapq
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from heading import heading

from lori_manager.kind_comparison import ENTRIES
from lori_manager.metrics.crossed import crossed_mean
from lori_manager.metrics.multiple import holm
from lori_manager.metrics.quantiles import student_two_sided, student_two_sided_quantile
from lori_manager.rates import at_edge, best_rate
from lori_manager.reporting.kind_comparisons import (
    BEATS,
    LOSES,
    SEARCH,
    SETTLE,
    TIES,
    TRAIN,
    change_between,
    mean_score,
)

SETTINGS = ("rows", "eval_rows", "batch", "epochs", "steps", "rank", "rates", "factor", "share",
            "full", "max_length")  # fmt: skip


# ---- what a process does


class Worker:
    """A workspace of its own, and the steps of its comparisons."""

    def __init__(self, args: argparse.Namespace) -> None:
        from lori_manager.workspace import Workspace

        folder = Path(args.work) / f"process-{args.worker}"
        if not folder.exists():
            shutil.copytree(Path(args.work) / "prepared", folder)
        self.ws = Workspace.open(folder)
        self.args = args
        self.works: dict[str, Any] = {}

    def work(self, task: str):
        """The comparison on that task."""
        from lori_manager.kind_comparison import RateSearch, Work, plan_of
        from lori_manager.probing import halves

        if task not in self.works:
            ws, config = self.ws, self.ws.settings.config
            search = RateSearch(self.args.rates, self.args.factor, self.args.share, self.args.full)
            found = ws.store.task(task)
            comparison = ws.store.open_kind_comparison(found, plan_of(ws, found, config, search))
            parts = halves(ws, found, config)
            self.works[task] = Work(ws, found, config, comparison, parts), comparison.digest
        return self.works[task]

    def run(self, spec: dict) -> dict:
        """Do it; gives the spec with what was found."""
        begin = time.perf_counter()
        found = getattr(self, f"run_{spec['what']}")(spec)
        return spec | found | {"wall": round(time.perf_counter() - begin, 2)}

    def run_base(self, spec: dict) -> dict:
        return self._scored("base", spec["task"])

    def run_search(self, spec: dict) -> dict:
        """Try the rates of one kind."""
        work, digest = self.work(spec["task"])
        work.search(spec["kind"])
        steps = [s for s in self.ws.store.kind_steps(digest)
                 if s.entry == spec["kind"] and s.step != TRAIN]  # fmt: skip
        return {
            "tried": [[s.point, dict(s.facts)] for s in steps if s.step == SEARCH],
            "settled": [[s.point, dict(s.facts)] for s in steps if s.step == SETTLE],
        }

    def run_train(self, spec: dict) -> dict:
        """One full training at the rate that the search, perhaps of another process, found."""
        from lori_manager.records import KindStep

        work, digest = self.work(spec["task"])
        for sort, key in ((SEARCH, "tried"), (SETTLE, "settled")):
            for point, facts in spec[key]:
                step = KindStep(spec["kind"], sort, point, None, facts)
                self.ws.store.add_kind_step(digest, step)
        work.train(spec["kind"], spec["seed"])
        wanted = spec["kind"], "train", str(spec["seed"])
        steps = self.ws.store.kind_steps(digest)
        step = next(s for s in steps if (s.entry, s.step, s.point) == wanted)
        if step.adapter is None:
            return dict(step.facts) | {"diverged": True}
        adapter = self.ws.adapter(step.adapter)
        return dict(step.facts) | self._scored(step.adapter, spec["task"]) | {
            "parameters": adapter.facts["parameters"],
            "bytes": adapter.bytes,
            "digest": adapter.digest,
            "train_seconds": adapter.facts["seconds"],
            "optimizer_steps": adapter.facts["steps"],
        }  # fmt: skip

    def run_time(self, spec: dict) -> dict:
        """A short training, for its costs alone."""
        from lori_manager.kind_comparison import DENSE, settings, usual_rate
        from lori_manager.metering import device_name
        from lori_manager.probing import halves, probe, with_rate

        ws, kind = self.ws, spec["kind"]
        config = ws.settings.config
        task = ws.store.task(spec["task"])
        rate = usual_rate(config, kind) / 10
        config = with_rate(settings(config, kind), rate, kind == DENSE)
        parts = halves(ws, task, config)
        found = probe(ws, task, config, parts, steps=spec["steps"], dense=kind == DENSE)
        return {"step_seconds": found.step_seconds, "peak_bytes": found.peak_bytes,
                "parameters": found.parameters, "seconds": found.seconds,
                "device": device_name(ws.base_model(config).device)}  # fmt: skip

    def _scored(self, subject: str, task: str) -> dict:
        (score,) = self.ws.score([subject], [task])
        values, weights = self.ws.store.outcomes(score)
        return {"score": score.value, "outcomes": packed(values),
                "weights": None if weights is None else packed(weights)}  # fmt: skip


def packed(values: np.ndarray) -> str:
    """Numbers by row: bits in hexadecimal where all are 0 or 1, else float32 in base 64."""
    if np.isin(values, (0, 1)).all():
        return f"bits {len(values)} {np.packbits(values.astype(bool)).tobytes().hex()}"
    return f"float32 {base64.b64encode(values.astype('<f4').tobytes()).decode()}"


def unpacked(text: str) -> np.ndarray:
    """The inverse of `packed`, float64."""
    form, *parts = text.split()
    if form == "bits":
        bits = np.frombuffer(bytes.fromhex(parts[1]), np.uint8)
        return np.unpackbits(bits)[: int(parts[0])].astype(np.float64)
    return np.frombuffer(base64.b64decode(parts[0]), "<f4").astype(np.float64)


def prepare(args: argparse.Namespace) -> None:
    """The workspace that every process copies: the tasks' first rows, cut and frozen."""
    from lori_manager.workspace import Workspace

    folder = Path(args.work) / "prepared"
    if folder.exists():
        return
    building = folder.with_name("building")
    shutil.rmtree(building, ignore_errors=True)
    with Workspace.create(building, args.base) as ws:
        wanted = {"batch": args.batch, "epochs": args.epochs, "steps": args.steps,
                  "rank": args.rank, "alpha": 2.0 * args.rank, "max_length": args.max_length,
                  "score_batch": 128}  # fmt: skip
        lines = [f"{key} = {value!r}" for key, value in wanted.items()]
        (building / "lori.toml").write_text("[defaults]\n" + "\n".join(lines) + "\n")
        for task in args.tasks:
            paths = {}
            for split, most in (("train", args.rows), ("eval", args.eval_rows)):
                source = Path(args.data) / task / f"{split}.jsonl"
                with source.open(encoding="utf-8") as f:
                    kept = list(itertools.islice((line for line in f if line.strip()), most))
                paths[split] = building / "tasks" / task / f"{split}.jsonl"
                paths[split].parent.mkdir(parents=True, exist_ok=True)
                paths[split].write_text("".join(kept), encoding="utf-8")
            ws.add_task(task, train=str(paths["train"]), eval=str(paths["eval"]), probe_rows=0,
                        allow_overlap=True)  # fmt: skip
    building.rename(folder)


def work(args: argparse.Namespace) -> None:
    worker = Worker(args)
    print("{}", flush=True)  # ready
    for line in sys.stdin:
        spec = json.loads(line)
        try:
            found = worker.run(spec)
        except Exception as e:  # noqa: BLE001 - one spec's failure is told, the others run on
            traceback.print_exc()
            found = spec | {"failed": f"{type(e).__name__}: {e}"[:300]}
        print(json.dumps(found), flush=True)


# ---- handing out


class Plan:
    """What is to be done next, the balanced order kept; safe to use from many threads.

    A cell's trainings wait for its search. Priorities: bases and searches, then seed 0 of
    all cells, seed 1, ...
    """

    def __init__(self, args: argparse.Namespace, known: Sequence[dict]) -> None:
        self.args = args
        self.deadline = math.inf
        if args.budget_seconds:
            self.deadline = time.monotonic() + args.budget_seconds
        self._queue: list[tuple[int, int, dict]] = []
        self._count = itertools.count()
        self._pending = 0  # searches under way, whose trainings will come
        self._changed = threading.Condition()
        done = {key_of(r) for r in known if "failed" not in r}
        searched = {(r["task"], r["kind"]): r for r in known
                    if r["what"] == "search" and "tried" in r}  # fmt: skip
        for kind, task in itertools.product(args.kinds, args.tasks):
            if args.plan == "time":
                spec = {"what": "time", "task": task, "kind": kind, "steps": args.time_steps}
                if task == args.tasks[0] and key_of(spec) not in done:
                    self._add(0, spec)
                continue
            if kind == args.kinds[0]:
                self._add_unless(done, 0, {"what": "base", "task": task, "kind": "base"})
            if (task, kind) in searched:
                self._trainings(searched[task, kind], done)
            else:
                self._add(0, {"what": "search", "task": task, "kind": kind})
        self._done = done

    def _add_unless(self, done: set, priority: int, spec: dict) -> None:
        if key_of(spec) not in done:
            self._add(priority, spec)

    def _add(self, priority: int, spec: dict) -> None:
        heapq.heappush(self._queue, (priority, next(self._count), spec))
        self._pending += spec["what"] == "search"

    def _trainings(self, found: dict, done: set) -> None:
        for seed in range(self.args.seeds):
            spec = {"what": "train", "task": found["task"], "kind": found["kind"], "seed": seed,
                    "tried": found["tried"], "settled": found["settled"]}  # fmt: skip
            self._add_unless(done, 1 + seed, spec)

    def specs(self) -> Iterator[dict]:
        """One worker's specs, until there are no more or the time is over."""
        while True:
            with self._changed:
                while not self._queue and self._pending and time.monotonic() < self.deadline:
                    self._changed.wait(0.5)
                if not self._queue or time.monotonic() >= self.deadline:
                    return
                spec = heapq.heappop(self._queue)[2]
            yield spec

    def finished(self, found: dict) -> None:
        """Take note; what waits for it can begin."""
        with self._changed:
            if found["what"] == "search":
                self._pending -= 1
                if "tried" in found:
                    self._trainings(found, self._done)
            self._changed.notify_all()

    @property
    def left(self) -> int:
        """How many steps were not begun."""
        return len(self._queue)


def key_of(row: dict) -> tuple:
    return row["what"], row.get("task"), row.get("kind"), row.get("seed"), row.get("steps")


def run_all(args: argparse.Namespace) -> None:
    """Hand out all there is to do; rows are appended to the log as they come."""
    import torch

    settings = {name: getattr(args, name) for name in SETTINGS}
    known = [r for r in read(args.log) if r.get("settings") == settings]
    plan = Plan(args, known)
    prepare(args)
    gpus = args.gpus or torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = named.split(",") if named else [str(i) for i in range(gpus or 1)]
    count = len(cards) if args.plan == "time" else args.processes
    threads = max(1, (os.cpu_count() or 1) // count)
    lock = threading.Lock()

    def serve(number: int) -> None:
        process = subprocess.Popen(
            [sys.executable, __file__, "--worker", str(number), *sys.argv[1:]],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": cards[number % len(cards)],
                              "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"},
        )  # fmt: skip
        answer(process)
        for spec in plan.specs():
            process.stdin.write(json.dumps(spec) + "\n")
            process.stdin.flush()
            found = answer(process) or spec | {"failed": "its process ended"}
            if found["what"] == "train":
                del found["tried"], found["settled"]
            with lock, args.log.open("a") as f:
                f.write(json.dumps(found | {"settings": settings}) + "\n")
            print(brief(found), flush=True)
            plan.finished(found)
            if process.poll() is not None:
                return
        process.stdin.close()
        process.wait()

    began = time.monotonic()
    threads_of = [threading.Thread(target=serve, args=(i,)) for i in range(count)]
    for thread in threads_of:
        thread.start()
    for thread in threads_of:
        thread.join()
    print(f"{time.monotonic() - began:.0f} s, {plan.left} steps not begun")


def answer(process: subprocess.Popen) -> dict | None:
    """The next document that a process prints; None where it has ended."""
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    return None


def brief(found: dict) -> str:
    """One line of what was found."""
    told = [f"{key} {found[key]:.4g}" if isinstance(found[key], float) else f"{key} {found[key]}"
            for key in ("seed", "rate", "score", "step_seconds", "wall", "failed", "diverged")
            if found.get(key) is not None]  # fmt: skip
    return f"{found['what']} {found['task']} {found['kind']}: {', '.join(told)}"


def read(log: Path) -> list[dict]:
    """The rows of a log; none where there is no such file yet."""
    lines = log.read_text().splitlines() if log.is_file() else []
    return [json.loads(line) for line in lines if line]


# ---- the table


def table(results: Sequence[dict], kinds: Sequence[str]) -> None:
    """Print one table a task, one of the costs, and one of the means over tasks."""
    results = [r for r in results if "failed" not in r]
    trained = [r for r in results if r["what"] == "train" and "score" in r]
    tasks = list(dict.fromkeys(r["task"] for r in results if r["what"] != "time"))
    kinds = [k for k in kinds if any(r["kind"] == k for r in trained)]
    if not kinds:
        raise SystemExit("no training in these logs yet")
    outcomes: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    weights: dict[str, np.ndarray | None] = {}
    for r in trained:
        outcomes.setdefault((r["task"], r["kind"]), {})[r["seed"]] = unpacked(r["outcomes"])
        weights[r["task"]] = None if r["weights"] is None else unpacked(r["weights"])
    for task in tasks:
        base = [r["score"] for r in results if r["what"] == "base" and r["task"] == task]
        told = f", the base {base[0]:.3f}" if base else ""
        print(f"\n{task}{told}\n\n| kind | seeds | score [95%] | against {kinds[0]} [95%] | p | | "
              "rate | tried |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
        changes = {k: _change(outcomes, weights, task, kinds[0], k) for k in kinds[1:]}
        for line in _lines(changes, kinds):
            kind = line[0]
            own = outcomes.get((task, kind))
            if not own:
                print(f"| {kind} | 0 | | | | | | |")
                continue
            search = next((r for r in results if (r["what"], r["task"], r["kind"]) ==
                           ("search", task, kind)), {})  # fmt: skip
            tried, full = (
                {
                    float(p): math.inf if f["loss"] is None else f["loss"]
                    for p, f in search.get(key, [])
                }
                for key in ("tried", "settled")
            )
            edge = " (edge)" if at_edge(tried, full) else ""
            rate = f"{best_rate(full or tried):g}{edge}"
            grid = "; ".join(" ".join(f"{r:g}" for r in sorted(x)) for x in (tried, full))
            mean = mean_score(np.stack([own[s] for s in sorted(own)]), weights[task])
            told = "{:.3f} [{:.3f}, {:.3f}]".format(*mean)
            print(f"| {kind} | {len(own)} | {told} | {' | '.join(line[1:])} | {rate} | {grid} |")
    _over_tasks(outcomes, weights, tasks, kinds)
    _costs(results, trained, tasks, kinds)


def _change(outcomes, weights, task, first, kind):
    """Change, its ends, p, and error with degrees of freedom; None without common seeds."""
    a, b = outcomes.get((task, first), {}), outcomes.get((task, kind), {})
    common = sorted(a.keys() & b.keys())
    if not common:
        return None
    before, after = (np.stack([x[s] for s in common]) for x in (a, b))
    change, low, high, p = change_between(before, after, weights[task])
    if len(common) > 1:
        both = crossed_mean(after - before, weights[task])
        error, degrees = both.error, both.degrees
    else:
        d = (after - before)[0]
        error, degrees = float(d.std(ddof=1) / math.sqrt(d.size)), d.size - 1.0
    return {"change": change, "low": low, "high": high, "p": p, "error": error,
            "degrees": degrees, "seeds": len(common)}  # fmt: skip


def _lines(changes: dict[str, dict | None], kinds: Sequence[str]) -> Iterator[list[str]]:
    """Kind, change, corrected p and verdict of every kind, the first without."""
    told = [k for k in changes if changes[k] is not None]
    corrected = dict(zip(told, holm([changes[k]["p"] for k in told]).tolist(), strict=True))
    for kind in kinds:
        if kind not in corrected:
            yield [kind, "", "", ""]
            continue
        c, p = changes[kind], corrected[kind]
        verdict = TIES if p >= 0.05 else BEATS if c["change"] > 0 else LOSES
        yield [kind, f"{c['change']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]",
               "<1e-6" if p < 1e-6 else f"{p:.2g}", f"{verdict} {kinds[0]}"]  # fmt: skip


def _over_tasks(outcomes, weights, tasks, kinds) -> None:
    """Mean change over the tasks, which are independent; they are these tasks, not a sample."""
    means = {}
    for kind in kinds[1:]:
        each = [_change(outcomes, weights, task, kinds[0], kind) for task in tasks]
        if any(c is None for c in each):
            continue
        n = len(each)
        change = statistics.fmean(c["change"] for c in each)
        variances = [c["error"] ** 2 for c in each]
        error = math.sqrt(sum(variances)) / n
        if error == 0:
            means[kind] = {"change": change, "low": change, "high": change, "p": 1.0}
            continue
        parts = [v**2 / c["degrees"] for v, c in zip(variances, each, strict=True) if v > 0]
        degrees = min(2000, max(1, math.floor(sum(variances) ** 2 / sum(parts))))
        half = student_two_sided_quantile(0.95, degrees) * error
        p = student_two_sided(change / error, degrees)
        means[kind] = {"change": change, "low": change - half, "high": change + half, "p": p}
    print(f"\nmean over {len(tasks)} tasks\n\n| kind | score | against {kinds[0]} [95%] | p | |"
          "\n|---|---|---|---|---|")  # fmt: skip
    for line in _lines({k: means.get(k) for k in kinds[1:]}, kinds):
        scores = [statistics.fmean(float(x.mean()) for x in outcomes[t, line[0]].values())
                  for t in tasks if outcomes.get((t, line[0]))]  # fmt: skip
        score = f"{statistics.fmean(scores):.3f}" if len(scores) == len(tasks) else ""
        print(f"| {line[0]} | {score} | {' | '.join(line[1:])} |")


def _costs(results: Sequence[dict], trained: Sequence[dict], tasks, kinds) -> None:
    alone = {r["kind"]: r for r in results if r["what"] == "time"}
    device = next((r["device"] for r in (*alone.values(), *trained) if "device" in r), "")
    how = "alone on the device" if alone else "several processes on one device"
    print(f"\ncosts ({device}; step and memory {how})\n\n| kind | trained | stored MB | "
          f"times {kinds[0]}'s | step ms | peak GB | s a training with mask and scores, a search "
          "|\n|"
          + "---|" * 7)  # fmt: skip
    stored = {k: statistics.median(r["bytes"] for r in trained if r["kind"] == k) for k in kinds}
    for kind in kinds:
        own = [r for r in trained if r["kind"] == kind]
        of = [alone[kind]] if kind in alone else own
        steps = [r["step_seconds"] for r in of if r["step_seconds"] is not None]
        peaks = [r["peak_bytes"] for r in of if r["peak_bytes"] is not None]
        searches = [sum(f["seconds"] for _, f in r["tried"] + r.get("settled", [])) for r in results
                    if r["what"] == "search" and r["kind"] == kind]  # fmt: skip
        step = f"{statistics.median(steps) * 1e3:.1f}" if steps else ""
        peak = f"{max(peaks) / 1e9:.2f}" if peaks else ""
        seconds = statistics.median(r["wall"] for r in own)
        search = f"{statistics.median(searches):.0f}" if searches else ""
        parameters = statistics.median_high(r["parameters"] for r in own)
        print(f"| {kind} | {parameters:,} | {stored[kind] / 1e6:.2f} | "
              f"{stored[kind] / stored[kinds[0]]:.2f} | {step} | {peak} | "
              f"{seconds:.1f}, {search} |")  # fmt: skip


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--base")
    add("--data")
    add("--work")
    add("--log", type=Path)
    add("--plan", choices=("compare", "time"), default="compare")
    add("--tasks", type=names, default=[])
    add("--kinds", type=names, default=list(ENTRIES), help="the others are held against the first")
    add("--seeds", type=int, default=3)
    add("--rows", type=int, default=3000)
    add("--eval-rows", type=int, default=500)
    add("--batch", type=int, default=16)
    add("--epochs", type=float, default=2.0)
    add("--steps", type=int, default=0, help="0: --epochs counts")
    add("--rank", type=int, default=32)
    add("--max-length", type=int, default=512)
    add("--rates", type=int, default=4)
    add("--factor", type=float, default=3.0)
    add("--share", type=float, default=0.25)
    add("--full", type=int, default=3)
    add("--time-steps", type=int, default=40)
    add("--processes", type=int, default=1)
    add("--gpus", type=int, default=0, help="0: all there are")
    add("--budget-seconds", type=float)
    add("--table", type=Path, nargs="+")
    add("--worker", type=int)
    args = parser.parse_args()
    if args.worker is not None:
        work(args)
        return
    if args.table:
        table([r for log in args.table for r in read(log)], args.kinds)
        return
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    libraries = ("torch", "transformers", "peft")
    print(heading(f"0 to {args.seeds - 1}", device=device, libraries=libraries))
    run_all(args)
    table(read(args.log), args.kinds) if args.plan == "compare" else None


if __name__ == "__main__":
    main()
