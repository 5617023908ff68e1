"""LoRI-S, LoRI-D and PEFT's LoRA side by side: same rows, steps and rank, searched rates.

    python benchmarks/side_by_side.py --base MODEL_FOLDER [--search] [--seeds 3] [--jobs 6]

With --search every method's learning rate is searched on a part of the training rows
that is kept out of training; without it the rates found before (RATES) are used. Then
each method is trained with each seed and scored on the eval rows by greedy exact match.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "examples" / "data"
TASKS = ("clinc_domain", "snips", "sentiment_uci")
GRID = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
METHODS = ("lori-s", "lori-d", "lora")
RATES = {"lori-s": 1e-2, "lori-d": 5e-3, "lora": 2e-3}


def run_one(spec: dict) -> dict:
    """Train one adapter and score it; everything is in `spec`."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    from lori_manager import models
    from lori_manager.adapters import lori
    from lori_manager.calibrating import grown_mask
    from lori_manager.config import Config
    from lori_manager.engine.layers import attached, low_rank_layers
    from lori_manager.engine.weights import AdapterWeights
    from lori_manager.scoring import score_rows
    from lori_manager.tasks.encoding import encode_rows
    from lori_manager.tasks.scorers import scorers
    from lori_manager.tasks.sources import read_source
    from lori_manager.training import fit

    config = Config.from_json(spec["config"])
    base = models.load_base(Path(spec["base"]), "fp32")
    torch.backends.cuda.matmul.allow_tf32 = False

    def read(split: str) -> list:
        return read_source(DATA / spec["task"] / f"{split}.jsonl", root=HERE)

    train, held = read("train"), read("eval")
    if spec["search"]:
        train, held = train[:-256], train[-256:]
    else:
        train = train[:-256]  # the rows that `add-task` would set aside as probe rows

    def encode(rows: list) -> list:
        return encode_rows(base.tokenizer, rows, max_length=512, context=base.context)

    encoded = encode(train)
    start = time.monotonic()
    method = spec["method"]
    if method == "lora":
        torch.manual_seed(config.seed)
        inject_adapter_in_model(
            LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules="all-linear",
                       task_type="CAUSAL_LM"),
            base.model,
        )  # fmt: skip
        wanted = {n: p for n, p in base.model.named_parameters() if "lora_" in n}
        base.model.requires_grad_(False)
        for p in wanted.values():
            p.requires_grad_(True)
        result = fit(base, wanted, encoded, config, steps=config.steps, peak=spec["rate"])
        layers = {}
    else:
        block = lori.fresh_block(base.linear_shapes, config, spec["task"])
        mask = None
        if method == "lori-s":
            mask, _ = grown_mask(base, block, encoded, config, steps=config.calibration_steps)
        layers = lori.trainable_layers(base.model, block, mask)
        with lori.in_training(base, layers) as parameters:
            result = fit(base, parameters, encoded, config,
                         steps=config.steps, peak=spec["rate"])  # fmt: skip
        block = lori.trained_block(block, lori.trained_B(layers), mask, "bf16")
        layers = low_rank_layers(base.model, AdapterWeights((block,)).updates())
    seconds = time.monotonic() - start
    with attached(base.model, layers), torch.inference_mode():
        outcomes, _ = score_rows(base, held, encode(held), scorers.get("exact_match"), 64)
    return spec | {
        "score": float(outcomes.mean()),
        "rows": len(held),
        "seconds": seconds,
        "parameters": result.parameters,
        "loss": sum(result.losses[-5:]) / 5,
    }


def run_all(specs: list[dict], jobs: int, log: Path) -> list[dict]:
    """Run every spec in `jobs` processes; rows are appended to `log` as they come."""
    shares = [specs[i::jobs] for i in range(jobs)]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        )
        for share in shares if share
    ]  # fmt: skip
    for worker, share in zip(workers, shares, strict=False):
        worker.stdin.write("".join(json.dumps(s) + "\n" for s in share))
        worker.stdin.close()
    results = []
    for worker in workers:
        for line in worker.stdout:
            if line.startswith("{"):
                results.append(json.loads(line))
                with log.open("a") as f:
                    f.write(line)
        if worker.wait():
            raise SystemExit(f"a worker failed with {worker.returncode}")
    return results


def work() -> None:
    for line in sys.stdin.read().splitlines():
        print(json.dumps(run_one(json.loads(line))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--calibration-steps", type=int, default=15)
    parser.add_argument("--dense-rate", type=float, default=5e-3)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--log", type=Path, default=Path("side_by_side.jsonl"))
    parser.add_argument("--worker", action="store_true")
    args = parser.parse_args()
    if args.worker:
        return work()
    tasks = args.tasks.split(",")

    def spec(method: str, task: str, seed: int, rate: float, search: bool) -> dict:
        config = {
            "seed": seed, "steps": args.steps, "batch": args.batch,
            "calibration_steps": args.calibration_steps, "dense_learning_rate": args.dense_rate,
        }  # fmt: skip
        return {"method": method, "task": task, "rate": rate, "config": config,
                "base": args.base, "search": search}  # fmt: skip

    rates = {(m, t): RATES[m] for m in METHODS for t in tasks}
    if args.search:
        found = run_all(
            [spec(m, t, 1000, r, True) for m, t, r in itertools.product(METHODS, tasks, GRID)],
            args.jobs, args.log,
        )  # fmt: skip
        print("\nsearch on held-out training rows (one seed): exact match by learning rate")
        for m, t in rates:
            mine = sorted(
                (f["rate"], f["score"]) for f in found if (f["method"], f["task"]) == (m, t)
            )
            rates[m, t] = max(mine, key=lambda x: x[1])[0]
            print(f"  {m:7s} {t:14s}", "  ".join(f"{r:g}: {s:.3f}" for r, s in mine))
    results = run_all(
        [spec(m, t, s, rates[m, t], False) for (m, t), s in
         itertools.product(rates, range(args.seeds))],
        args.jobs, args.log,
    )  # fmt: skip
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(f"\n{device}, torch {torch.__version__}; rank 32, alpha 64, {args.steps} steps of "
          f"{args.batch} rows, {args.seeds} seeds; command: {' '.join(sys.argv)}")  # fmt: skip
    print("| method | parameters | " + " | ".join(tasks) + " |")
    print("|---|---|" + "---|" * len(tasks))
    for m in METHODS:
        cells = []
        for t in tasks:
            mine = [r for r in results if (r["method"], r["task"]) == (m, t)]
            scores = [r["score"] for r in mine]
            each = ", ".join(f"{s:.3f}" for s in scores)
            cells.append(f"{sum(scores) / len(scores):.3f} ({each}) at {mine[0]['rate']:g}")
        count = next(r["parameters"] for r in results if r["method"] == m)
        print(f"| {m} | {count:,} | " + " | ".join(cells) + " |")
    return None


if __name__ == "__main__":
    main()
