"""Where adapters go, at equal parameters: PLoP's choice, its opposite, attention, MLP, all layers.

    python benchmarks/placement_quality.py --base MODEL --data FOLDER --work FOLDER --log FILE
        [--processes 4] [--tasks a,b,c] [--kinds lori,lora] [--seeds 3] [--budget-seconds 480]
    python benchmarks/placement_quality.py --table LOG [LOG ...]

Every training is one JSON line in the log with the outcome of every row; what a log holds is not
run again, and tables are assembled from as many logs as it took. First each task's layers are
scored (64 prompts); then each kind, placement and task has its learning rate searched on probe
rows with one seed, the same rates for every placement; then it is trained with the seeds, seed by
seed, so that what a budget cuts off is the last seeds. After the budget no training is begun.

Equal parameters: all linear layers at --rank set the number. The others have the rank that comes
nearest; of LoRI, whose mask is what trains, the rank is the next larger and the sparsity such that
the mask keeps the very same number. alpha is twice the rank everywhere.

FOLDER holds a folder a task with train.jsonl and eval.jsonl; the first 3000 rows train, the last
256 are probe rows, the first 500 rows of eval.jsonl are scored by greedy exact match. Processes
share the GPUs in turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from heading import heading

from lori_manager.metrics.quantiles import student_quantile

TASKS = ("clinc150", "wikisql", "sentiment_uci")
PLACEMENTS = ("plop", "attention", "mlp", "opposite", "all")
KINDS = ("lori",)
RATES = {"lori": (5e-3, 1e-2, 2e-2, 4e-2), "lora": (5e-4, 1e-3, 2e-3, 4e-3)}
SPARSITY = 0.9  # of LoRI over all layers; 0 is the dense one
SEARCH_SEED = 1000
TOP = 3


# ---- what is run


def place_specs(tasks: Sequence[str]) -> list[dict]:
    return [{"what": "place", "task": task, "seed": 0} for task in tasks]


def search_specs(args: argparse.Namespace) -> list[dict]:
    return [
        spec | {"rate": rate, "seed": SEARCH_SEED, "search": True}
        for spec in _each(args)
        for rate in RATES[spec["kind"]]
    ]


def final_specs(args: argparse.Namespace, results: Iterable[dict]) -> list[dict]:
    """A training for each seed, at the rate that the search found; seed by seed."""
    best = best_rates(results)
    found = []
    for seed, spec in itertools.product(range(args.seeds), _each(args)):
        key = spec["kind"], spec["placement"], spec["task"]
        if key in best:
            found.append(spec | {"rate": best[key], "seed": seed})
    return found


def _each(args: argparse.Namespace) -> list[dict]:
    every = itertools.product(args.kinds, args.placements, args.tasks)
    return [
        {"what": "train", "kind": kind, "placement": placement, "task": task, "rank": args.rank,
         "epochs": args.epochs, "batch": args.batch}
        for kind, placement, task in every
    ]  # fmt: skip


def best_rates(
    results: Iterable[dict], keys: Sequence[str] = ("kind", "placement", "task")
) -> dict[tuple[str, ...], float]:
    """What the keys say -> the rate that did best on probe rows, the lower of equals."""
    found: dict[tuple[str, ...], dict[float, float]] = {}
    for r in results:
        if r.get("search") and "probe" in r:
            key = tuple(r[name] for name in keys)
            found.setdefault(key, {})[r["rate"]] = r["probe"]["score"]
    return {of: min(by, key=lambda rate: (-by[rate], rate)) for of, by in found.items()}


# ---- running


class Workers:
    """Processes of a script that each run one spec after another, on the GPUs in turn."""

    def __init__(self, args: argparse.Namespace, script: str = __file__) -> None:
        import torch

        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = torch.cuda.device_count() or 1
        cards = named.split(",") if named else [str(i) for i in range(count)]
        self.log, self.until = args.log, time.monotonic() + args.budget_seconds
        self.lock = threading.Lock()
        self.processes = [
            subprocess.Popen(
                [sys.executable, script, "--worker", "--base", args.base, "--data", args.data,
                 "--work", str(args.work)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": cards[number % len(cards)]},
            )
            for number in range(args.processes)
        ]  # fmt: skip

    def run(self, specs: Sequence[dict]) -> None:
        """Run what the log does not hold, as far as the budget reaches."""
        known = [r for r in read(self.log) if "failed" not in r]
        todo = [s for s in specs if not any(s.items() <= r.items() for r in map(_flat, known))]
        left = iter(todo)
        threads = [threading.Thread(target=self._work, args=(p, left)) for p in self.processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        missing = sum(1 for _ in left)
        if missing:
            print(f"{missing} of {len(todo)} not begun within the budget", flush=True)

    def _work(self, process: subprocess.Popen, left: Iterable[dict]) -> None:
        while process.poll() is None and time.monotonic() < self.until:
            with self.lock:
                spec = next(left, None)
            if spec is None:
                return
            try:
                process.stdin.write(json.dumps(spec) + "\n")
                process.stdin.flush()
                line = next((x for x in process.stdout if x.startswith("{")), "")
            except BrokenPipeError:
                line = ""
            if not line:
                line = json.dumps(spec | {"failed": f"its process ended with {process.wait()}"})
            with self.lock:
                with self.log.open("a") as f:
                    f.write(line.rstrip() + "\n")
                print(brief(json.loads(line)), flush=True)

    def close(self) -> None:
        """Let the processes end."""
        for process in self.processes:
            if process.poll() is None:
                process.stdin.close()


def _flat(result: dict) -> dict:
    """The plain values of a result, to find a spec in."""
    return {k: v for k, v in result.items() if not isinstance(v, dict | list)}


def brief(found: dict) -> str:
    """One line of what was found."""
    parts = [found["what"]]
    for key, value in found.items():
        if isinstance(value, dict) and "score" in value:
            parts.append(f"{key} {value['score']:.3f}")
        elif isinstance(value, float):
            parts.append(f"{key} {value:.4g}")
        elif key != "what" and not isinstance(value, dict | list):
            parts.append(f"{key} {value}")
    return ", ".join(parts)


# ---- one process


def work(args: argparse.Namespace) -> None:
    import traceback

    from quality_worker import Worker

    worker = Worker(Path(args.base), Path(args.data), Path(args.work), "own")
    placements: dict[str, object] = {}
    for line in sys.stdin:
        spec = json.loads(line)
        try:
            if spec["task"] not in placements:
                placements[spec["task"]] = placement_of(worker, spec["task"])
            found = placements[spec["task"]]
            run = place_one if spec["what"] == "place" else train_one
            told = spec | run(worker, spec, found)
        except Exception as e:  # noqa: BLE001 - one spec's failure is told, the others run on
            traceback.print_exc()
            told = spec | {"failed": f"{type(e).__name__}: {e}"[:300]}
        print(json.dumps(told), flush=True)


def placement_of(worker, task: str):
    """The scores of the base's layers on 64 prompts of a task, drawn with seed 0."""
    from lori_manager.consolidation import prompts_of
    from lori_manager.feature_norms import feature_norms
    from lori_manager.placement import Placement
    from lori_manager.tasks.batches import permutation

    rows = worker.task(task)["train"].encoded
    rows = prompts_of([rows[i] for i in permutation(len(rows), 0, "placement")[:64]])
    base = worker.base
    begin = time.monotonic()
    scores = feature_norms(base, rows, 16)
    placement = Placement(task, 1, scores, base.linear_shapes, len(rows),
                          sum(len(row.ids) for row in rows), 0, base.precision)  # fmt: skip
    return placement, time.monotonic() - begin


def place_one(worker, spec: dict, found) -> dict:
    placement, seconds = found
    return {
        "types": {one.name: round(one.score, 4) for one in placement.types},
        "tokens": placement.tokens,
        "seconds": round(seconds, 2),
    }


def types_for(placement, name: str) -> tuple:
    """The types of layers of a placement.

    Attention is what lies in a module whose name says so; the MLP is the rest.
    """
    if name == "plop":
        return placement.types[:TOP]
    if name == "opposite":
        return placement.types[-TOP:]
    attention = [
        t for t in placement.types if "attn" in t.modules[0] or "attention" in t.modules[0]
    ]
    if name == "attention":
        return tuple(attention)
    return tuple(t for t in placement.types if name == "all" or t not in attention)


def equal_size(kind: str, types, every, rank: int) -> tuple[int, float, int]:
    """(rank, sparsity, parameters) that come nearest to all layers at that rank."""
    if kind == "lori":
        wanted = round((1 - SPARSITY) * sum(t.parameters(rank) for t in every))
        row = sum(t.parameters(1) for t in types)
        own = max(1, math.ceil((wanted - 0.5) / (1 - SPARSITY) / row))
        return own, 1 - wanted / (own * row), wanted
    wanted = sum(t.lora_parameters(rank) for t in every)
    row = sum(t.lora_parameters(1) for t in types)
    own = max(1, round(wanted / row))
    return own, 0.0, own * row


def train_one(worker, spec: dict, found) -> dict:
    """One adapter: on its own probe rows in a search, on eval rows otherwise."""
    from quality_worker import CALIBRATION_STEPS, outcomes

    from lori_manager.adapters.applying import applied
    from lori_manager.config import Config
    from lori_manager.scoring import score_rows
    from lori_manager.tasks.scorers import scorers

    placement, _ = found
    types = types_for(placement, spec["placement"])
    rank, sparsity, parameters = equal_size(spec["kind"], types, placement.types, spec["rank"])
    parts = worker.task(spec["task"])
    rows = parts["train"].encoded
    config = Config(
        kind=spec["kind"], targets=tuple(t.name for t in types), rank=rank, alpha=2.0 * rank,
        sparsity=sparsity, seed=spec["seed"], batch=spec["batch"],
        calibration_steps=CALIBRATION_STEPS,
        learning_rate=spec["rate"],
        steps=max(1, math.ceil(len(rows) * spec["epochs"] / spec["batch"])),
    )  # fmt: skip
    if spec["kind"] == "lori":
        weights, seconds = worker.learn("lori-s", rows, config, spec["rate"], spec["task"])
        trained = sum(int(m.sum()) for block in weights.blocks for m in block.mask.values())
    else:
        weights, seconds, trained = learn(worker.base, rows, config)
    if spec["kind"] in ("lori", "lora") and trained != parameters:
        raise RuntimeError(f"{trained} parameters were trained, {parameters} were to be")
    part = "probe" if spec.get("search") else "eval"
    held = parts[part]
    with applied(worker.base, weights):
        hits, _ = score_rows(worker.base, held.rows, held.encoded, scorers.get("exact_match"), 128)
    return {
        part: outcomes(hits),
        "targets": list(config.targets),
        "own_rank": rank,
        "sparsity": round(sparsity, 6),
        "parameters": trained,
        "steps": config.steps,
        "seconds": round(seconds, 2),
    }


def learn(base, rows, config):
    """An adapter of any kind but LoRI: weights, seconds, trained parameters."""
    import torch

    from lori_manager.adapters.kind import module_of
    from lori_manager.kinds import resolved
    from lori_manager.training import fit

    config = resolved(config)
    begin = time.monotonic()
    with module_of(config.kind).training(base, config, steps=config.steps) as training:
        result = fit(base, training.parameters, rows, config, steps=config.steps,
                     peak=config.learning_rate, training=training)  # fmt: skip
        weights = training.weights(torch.bfloat16)
    return weights, time.monotonic() - begin, result.parameters


# ---- tables


def read(log: Path) -> list[dict]:
    """The rows of a log; none where there is no such file yet."""
    lines = log.read_text().splitlines() if log.is_file() else []
    return [json.loads(line) for line in lines if line]


def interval(values: Sequence[float], sign: str = "") -> str:
    """`0.853 +- 0.012`: mean and half a 95% interval by Student's distribution."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:{sign}.3f}"
    half = student_quantile(0.975, len(values) - 1) * statistics.stdev(values)
    return f"{mean:{sign}.3f} +- {half / math.sqrt(len(values)):.3f}"


def table(results: Sequence[dict]) -> None:
    """Print the scores of layers, then each kind's placements over tasks and seeds."""
    places = {r["task"]: r for r in results if r["what"] == "place" and "types" in r}
    for task, r in places.items():
        scores = ", ".join(f"{n} {s:.2f}" for n, s in sorted(r["types"].items(), key=_by_score))
        print(f"{task}: {scores} ({r['tokens']} tokens, {r['seconds']} s)")
    final = [r for r in results if r["what"] == "train" and "eval" in r]
    tasks = sorted({r["task"] for r in final})
    for kind in sorted({r["kind"] for r in final}):
        mine = [r for r in final if r["kind"] == kind]
        print(f"\n{kind}: exact match, mean over seeds and 95% interval; in [] the rates\n")
        head = ["placement", "layers", "rank", "parameters", *tasks, "mean", "plop minus it", "s"]
        print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
        for name in (p for p in PLACEMENTS if any(r["placement"] == p for r in mine)):
            print(f"| {' | '.join(_line(name, mine, tasks))} |")
    failed = [r for r in results if "failed" in r]
    if failed:
        print(f"\n{len(failed)} failed, the first: {failed[0]['failed']}")


def _by_score(item: tuple[str, float]) -> float:
    return item[1]


def _line(name: str, mine: Sequence[dict], tasks: Sequence[str]) -> list[str]:
    own = {(r["task"], r["seed"]): r for r in mine if r["placement"] == name}
    some = list(own.values())
    cells = [name]
    for key in ("targets", "own_rank", "parameters"):
        told = {", ".join(sorted(r[key])) if key == "targets" else f"{r[key]:,}" for r in some}
        cells.append(" or ".join(sorted(told)))
    for task in tasks:
        scores = [r["eval"]["score"] for (of, _), r in sorted(own.items()) if of == task]
        rates = {f"{r['rate']:g}" for (of, _), r in own.items() if of == task}
        cells.append(f"{interval(scores)} [{', '.join(sorted(rates))}]" if scores else "")
    cells.append(interval(_means(own, tasks)) if _means(own, tasks) else "")
    plop = {(r["task"], r["seed"]): r for r in mine if r["placement"] == "plop"}
    both = {
        key: plop[key]["eval"]["score"] - own[key]["eval"]["score"] for key in own if key in plop
    }
    by_seed = _whole(both, tasks)
    cells.append(interval(by_seed, "+") if by_seed and name != "plop" else "")
    return [*cells, f"{statistics.median(r['seconds'] for r in some):.1f}"]


def _means(own: dict[tuple[str, int], dict], tasks: Sequence[str]) -> list[float]:
    return _whole({key: r["eval"]["score"] for key, r in own.items()}, tasks)


def _whole(values: dict[tuple[str, int], float], tasks: Sequence[str]) -> list[float]:
    """Means over the tasks, of each seed that has them all."""
    seeds = sorted({seed for _, seed in values})
    every = ([values.get((task, seed)) for task in tasks] for seed in seeds)
    return [statistics.fmean(one) for one in every if None not in one]


def arguments(doc: str, tasks: Sequence[str]) -> argparse.ArgumentParser:
    """Of a benchmark that searches rates and trains in several processes, with a log."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    add = parser.add_argument
    add("--base")
    add("--data")
    add("--work", type=Path)
    add("--log", type=Path)
    add("--processes", type=int, default=1)
    add("--tasks", default=",".join(tasks))
    add("--seeds", type=int, default=3)
    add("--rank", type=int, default=32)
    add("--epochs", type=float, default=2.0)
    add("--batch", type=int, default=32)
    add("--budget-seconds", type=float, default=math.inf)
    add("--table", type=Path, nargs="+")
    add("--worker", action="store_true")
    return parser


def main() -> None:
    parser = arguments(__doc__, TASKS)
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(RATES)}")
    parser.add_argument("--placements", default=",".join(PLACEMENTS))
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    if args.table:
        table([r for log in args.table for r in read(log)])
        return
    for key, known in (("tasks", None), ("kinds", RATES), ("placements", PLACEMENTS)):
        given = getattr(args, key).split(",")
        setattr(args, key, given)
        if known is not None and not set(given) <= set(known):
            parser.error(f"--{key} must be of {', '.join(known)}, got {', '.join(given)}")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(heading(f"0 to {args.seeds - 1}, {SEARCH_SEED} to search", device=device,
                  libraries=("torch", "transformers", "peft")))  # fmt: skip
    workers = Workers(args)
    begin = time.monotonic()
    workers.run(place_specs(args.tasks))
    workers.run(search_specs(args))
    workers.run(final_specs(args, read(args.log)))
    workers.close()
    print(f"\n{time.monotonic() - begin:.0f} s in {args.processes} processes\n")
    table(read(args.log))


if __name__ == "__main__":
    main()
