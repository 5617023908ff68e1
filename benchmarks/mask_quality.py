"""Which entries of B should train: masks of equal size, made in several ways.

    python benchmarks/mask_quality.py --base MODEL --data FOLDER --work FOLDER --log FILE
        [--processes 4] [--tasks a,b,c] [--masks dense-20,gradient-20,...] [--seeds 3]
        [--budget-seconds 480]
    python benchmarks/mask_quality.py --table LOG [LOG ...]

`dense-N` keeps the largest |B| after N dense steps on the first 1024 rows (`all`: as many as the
training has, on all of them, the paper's way; `half`: half as many), `gradient-N` the largest
absolute sum of N steps' gradients at B = 0, `square-N` the largest sum of their squares, `random`
any; `-matrix` behind the name ranks every matrix alone instead of all together. `none` trains all
of B. A, rows and steps are the same for all. Each mask and task has its learning rate searched on
probe rows with one seed, by trainings of full length; then it is trained with the seeds. What a
log holds is not run again.

FOLDER holds a folder a task with train.jsonl and eval.jsonl; the first 3000 rows train, the last
256 are probe rows, the first 500 rows of eval.jsonl are scored by greedy exact match. Processes
share the GPUs in turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

from heading import heading
from placement_quality import SEARCH_SEED, Workers, arguments, best_rates, interval, read

MASKS = ("dense-20", "dense-60", "dense-half", "dense-all", "gradient-20", "square-20",
         "dense-20-matrix", "dense-all-matrix", "gradient-20-matrix", "random", "none")  # fmt: skip
USUAL = "dense-all"
RATES = dict.fromkeys(MASKS, (0.01, 0.02, 0.04, 0.08)) | {"none": (1e-3, 2e-3, 4e-3, 8e-3)}
TASKS = ("clinc150", "wikisql", "sentiment_uci")


# ---- what is run


def each(args: argparse.Namespace) -> list[dict]:
    return [
        {"what": "train", "mask": mask, "task": task, "rank": args.rank, "epochs": args.epochs,
         "batch": args.batch}
        for mask, task in itertools.product(args.masks, args.tasks)
    ]  # fmt: skip


def search_specs(args: argparse.Namespace) -> list[dict]:
    return [
        spec | {"rate": rate, "seed": SEARCH_SEED, "search": True}
        for spec in each(args)
        for rate in RATES[spec["mask"]]
    ]


def final_specs(args: argparse.Namespace, results: Iterable[dict]) -> list[dict]:
    """A training for each seed, at the rate that the search found; seed by seed."""
    best = best_rates(results, ("mask", "task"))
    return [
        spec | {"rate": best[spec["mask"], spec["task"]], "seed": seed}
        for seed, spec in itertools.product(range(args.seeds), each(args))
        if (spec["mask"], spec["task"]) in best
    ]


# ---- one process


def work(args: argparse.Namespace) -> None:
    from quality_worker import Worker

    worker = Worker(Path(args.base), Path(args.data), Path(args.work), "own")
    for line in sys.stdin:
        spec = json.loads(line)
        try:
            told = spec | train_one(worker, spec)
        except Exception as e:  # noqa: BLE001 - one spec's failure is told, the others run on
            traceback.print_exc()
            told = spec | {"failed": f"{type(e).__name__}: {e}"[:300]}
        print(json.dumps(told), flush=True)


def train_one(worker, spec: dict) -> dict:
    """One adapter: on its own probe rows in a search, on eval rows otherwise."""
    from quality_worker import outcomes

    from lori_manager.adapters import lori
    from lori_manager.adapters.applying import applied
    from lori_manager.config import Config
    from lori_manager.engine.weights import AdapterWeights
    from lori_manager.scoring import score_rows
    from lori_manager.tasks.scorers import scorers
    from lori_manager.training import fit

    parts = worker.task(spec["task"])
    rows = parts["train"].encoded
    config = Config(
        rank=spec["rank"], alpha=2.0 * spec["rank"], seed=spec["seed"], batch=spec["batch"],
        steps=max(1, math.ceil(len(rows) * spec["epochs"] / spec["batch"])),
    )  # fmt: skip
    begin = time.monotonic()
    block = lori.first_block(worker.base, config, spec["task"])
    mask = mask_of(worker.base, block, rows, config, spec["mask"])
    made = time.monotonic() - begin
    layers = lori.trainable_layers(worker.base.model, block, mask)
    with lori.in_training(worker.base, layers) as parameters:
        trained = sum(p.numel() for p in parameters.values())
        fit(worker.base, parameters, rows, config, steps=config.steps, peak=spec["rate"])
    weights = AdapterWeights((lori.trained_block(block, lori.trained_B(layers), mask, "bf16"),))
    seconds = time.monotonic() - begin
    part = "probe" if spec.get("search") else "eval"
    held = parts[part]
    with applied(worker.base, weights):
        hits, _ = score_rows(worker.base, held.rows, held.encoded, scorers.get("exact_match"), 128)
    return {
        part: outcomes(hits),
        "parameters": trained,
        "steps": config.steps,
        "mask_seconds": round(made, 2),
        "seconds": round(seconds, 2),
    }


def mask_of(base, block, rows, config, name: str):
    """Module name -> bool (out_features, rank); None for `none`."""
    import torch
    from quality_worker import CALIBRATION_ROWS

    from lori_manager.calibrating import grown_mask
    from lori_manager.engine.mask import calibrate_mask

    if name == "none":
        return None
    way, _, rest = name.partition("-")
    length, _, scope = rest.partition("-")
    if way == "random":
        g = torch.Generator().manual_seed(config.seed)
        drawn = {n: torch.rand(b.shape, generator=g) for n, b in block.B.items()}
        return calibrate_mask(drawn, config.sparsity, "model")
    whole = {"all": config.steps, "half": config.steps // 2}
    steps = whole.get(length) or int(length)
    chosen = rows if length in whole else rows[:CALIBRATION_ROWS]
    config = config.replace(scope=scope or "model")
    if way == "dense":
        return grown_mask(base, block, chosen, config, steps=steps)[0]
    sums = summed_gradients(base, block, chosen, config, steps, way)
    return calibrate_mask(sums, config.sparsity, config.scope)


def summed_gradients(base, block, rows, config, steps: int, way: str) -> dict:
    """Sums over steps of the gradients of B, or of their squares, B staying zero."""
    import torch

    from lori_manager.adapters import lori
    from lori_manager.adapters.kind import Training
    from lori_manager.training import fit, no_weights

    layers = lori.trainable_layers(base.model, block, None)
    with lori.in_training(base, layers) as parameters:
        sums = {n: torch.zeros_like(p) for n, p in parameters.items()}

        def add(_: int) -> None:
            for n, p in parameters.items():
                sums[n] += p.grad.square() if way == "square" else p.grad
                p.data.zero_()

        training = Training(parameters, no_weights, after_step=add)
        fit(base, parameters, rows, config.replace(clip=0.0), steps=steps, peak=1e-12,
            training=training)  # fmt: skip
        for n, p in parameters.items():
            p.data.copy_(sums[n])
    return lori.trained_B(layers)


# ---- tables


def table(results: Sequence[dict]) -> None:
    """Print each mask's scores over tasks and seeds."""
    final = [r for r in results if "eval" in r]
    tasks = sorted({r["task"] for r in final})
    head = ["mask", "trained", *tasks, "mean", f"{USUAL} minus it", "s to make", "s"]
    print(f"\nexact match, mean over seeds and 95% interval; in [] the rate\n\n"
          f"| {' | '.join(head)} |\n|{'---|' * len(head)}")  # fmt: skip
    scores = {(r["mask"], r["task"], r["seed"]): r["eval"]["score"] for r in final}
    for mask in (m for m in MASKS if any(r["mask"] == m for r in final)):
        own = [r for r in final if r["mask"] == mask]
        seeds = sorted({r["seed"] for r in own})
        cells = [mask, f"{own[0]['parameters']:,}"]
        for task in tasks:
            mine = [scores[mask, task, s] for s in seeds if (mask, task, s) in scores]
            rates = {f"{r['rate']:g}" for r in own if r["task"] == task}
            cells.append(f"{interval(mine)} [{', '.join(sorted(rates))}]" if mine else "")
        whole = [s for s in seeds if all((mask, t, s) in scores for t in tasks)]
        means = [statistics.fmean(scores[mask, t, s] for t in tasks) for s in whole]
        usual = [statistics.fmean(scores[USUAL, t, s] for t in tasks) for s in whole
                 if all((USUAL, t, s) in scores for t in tasks)]  # fmt: skip
        cells.append(interval(means) if means else "")
        paired = [a - b for a, b in zip(usual, means, strict=False)]
        cells.append(interval(paired, "+") if paired and mask != USUAL else "")
        for key in ("mask_seconds", "seconds"):
            cells.append(f"{statistics.median(r[key] for r in own):.1f}")
        print(f"| {' | '.join(cells)} |")
    failed = [r for r in results if "failed" in r]
    if failed:
        print(f"\n{len(failed)} failed, the first: {failed[0]['failed']}")


def main() -> None:
    parser = arguments(__doc__, TASKS)
    parser.add_argument("--masks", default=",".join(MASKS))
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    if args.table:
        table([r for log in args.table for r in read(log)])
        return
    args.tasks, args.masks = args.tasks.split(","), args.masks.split(",")
    if not set(args.masks) <= set(MASKS):
        parser.error(f"--masks must be of {', '.join(MASKS)}, got {', '.join(args.masks)}")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(heading(f"0 to {args.seeds - 1}, {SEARCH_SEED} to search", device=device,
                  libraries=("torch", "transformers")))  # fmt: skip
    workers = Workers(args, __file__)
    workers.run(search_specs(args))
    workers.run(final_specs(args, read(args.log)))
    workers.close()
    table(read(args.log))


if __name__ == "__main__":
    main()
