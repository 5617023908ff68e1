"""Whether training on a base in fp8 ends at the loss that bf16 ends at.

    python benchmarks/fp8_loss.py --base MODEL_FOLDER [--task clinc_domain] [--steps 300]
        [--seeds 3] [--batch 32] [--dense] [--device cuda]

Trains one example task as `lori train` does: dense calibration, mask, masked training, at the
default rates (--dense: all of B, no mask). A seed decides A and the order of rows, so that
both precisions see the same with the same seed. What counts is the mean loss of the last 50
steps. Exit code 1 where the means over seeds are further apart than bf16's seeds are.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from heading import heading
from transformers.utils import logging as transformers_logging

from lori_manager import models
from lori_manager.adapters import lori
from lori_manager.calibrating import grown_mask
from lori_manager.config import Config
from lori_manager.tasks.encoding import Encoded, encode_rows
from lori_manager.tasks.sources import read_source
from lori_manager.training import fit

DATA = Path(__file__).resolve().parent.parent / "examples" / "data"
LIBRARIES = ("lori-manager", "torch", "transformers", "triton")
LAST = 50


def train(base: models.BaseModel, rows: list[Encoded], config: Config, dense: bool) -> list[float]:
    """The loss of every step, in nats a completion token."""
    block = lori.fresh_block(base.linear_shapes, config, "fp8")
    mask = None
    if not dense:
        mask, _ = grown_mask(base, block, rows, config, steps=config.calibration_steps)
    layers = lori.trainable_layers(base.model, block, mask)
    peak = config.dense_learning_rate if dense else config.learning_rate
    with lori.in_training(base, layers) as values:
        return fit(base, values, rows, config, steps=config.steps, peak=peak).losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--base", type=Path, required=True)
    add("--task", default="clinc_domain")
    add("--device", default=models.best_device())
    add("--precisions", default="bf16,fp8", help="the first is what the others are held against")
    add("--dense", action="store_true")
    for name, value in {"steps": 300, "seeds": 3, "batch": 32}.items():
        add(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    print(heading(f"0 to {args.seeds - 1}", device=args.device, libraries=LIBRARIES))
    read = read_source(DATA / args.task / "train.jsonl", root=DATA)
    rows = encode_rows(models.load_tokenizer(args.base), read, max_length=512, context=None)
    last = min(LAST, args.steps)
    way = "dense" if args.dense else "masked"
    print(f"{args.task}: {len(rows)} rows, {args.steps} steps of {args.batch}, {way}; mean loss "
          f"of the last {last} steps\n")  # fmt: skip
    found: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for precision in args.precisions.split(","):
        base = models.load_base(args.base, precision, args.device)
        start = time.monotonic()
        for seed in range(args.seeds):
            config = Config(seed=seed, batch=args.batch, steps=args.steps, precision=precision,
                            calibration_steps=20)  # fmt: skip
            ends = train(base, rows, config, args.dense)[-last:]
            found.setdefault(precision, []).append(statistics.fmean(ends))
            print(f"{precision}, seed {seed}: {found[precision][-1]:.4f}", flush=True)
        seconds[precision] = (time.monotonic() - start) / args.seeds
    first, *others = found
    print("\n| precision | each seed | mean | least to most | deviation | s a seed |")
    print("|---|---|---|---|---|---|")
    for precision, ends in found.items():
        deviation = statistics.stdev(ends) if len(ends) > 1 else float("nan")
        figures = (statistics.fmean(ends), max(ends) - min(ends), deviation)
        cells = [" ".join(f"{e:.4f}" for e in ends), *(f"{figure:.4f}" for figure in figures)]
        print(f"| {precision} | {' | '.join(cells)} | {seconds[precision]:.0f} |")
    met = True
    spread = max(found[first]) - min(found[first])
    for precision in others:
        pairs = [b - a for a, b in zip(found[first], found[precision], strict=True)]
        apart = statistics.fmean(pairs)
        met &= abs(apart) <= spread
        each = " ".join(f"{pair:+.4f}" for pair in pairs)
        print(f"\n{precision} - {first}, seed by seed: {each}; mean {apart:+.4f}, {first}'s seeds "
              f"are {spread:.4f} apart")  # fmt: skip
    raise SystemExit(0 if met else 1)


if __name__ == "__main__":
    main()
