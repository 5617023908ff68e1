"""One frozen A for all modules that see the same input, or one for each: what it costs in quality.

    python benchmarks/shared_projection.py --base MODEL_FOLDER [--seeds 3] [--device cuda]

LoRI-D and LoRI-S (15 dense calibration steps) on three real tasks, the same rows, order
and rates both ways; greedy exact match on the eval rows. `apart`: q, k, v have an A each,
gate and up too. `shared`: k and v take q's, up takes gate's.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from heading import heading

from lori_manager import models
from lori_manager.acceleration import accelerate
from lori_manager.adapters import lori
from lori_manager.config import Config
from lori_manager.engine import mask as masks
from lori_manager.engine.layers import attached, low_rank_layers
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.scoring import score_rows
from lori_manager.tasks.encoding import encode_rows
from lori_manager.tasks.scorers import scorers
from lori_manager.tasks.sources import read_source
from lori_manager.training import fit

DATA = Path(__file__).resolve().parent.parent / "examples" / "data"
# Task -> rates of LoRI-S and LoRI-D as side_by_side.py's search found them.
RATES = {"clinc_domain": (2e-2, 5e-3), "snips": (1e-2, 5e-3), "sentiment_uci": (1e-3, 5e-4)}
SAME = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
LIBRARIES = ("lori-manager", "torch", "transformers")


def block_of(base: models.BaseModel, config: Config, task: str, shared: bool) -> Block:
    """B = 0 on this task's A, one for each module or for each input."""
    block = lori.fresh_block(base.linear_shapes, config, task)
    if not shared:
        return block
    tensors = {}
    for name in block.B:
        owner, _, kind = name.rpartition(".")
        tensors[name] = block.A[f"{owner}.{SAME.get(kind, kind)}"]
    return Block(block.B, block.scaling, tensors=tensors)


def train(base, block, mask, rows, config, steps, peak):
    """Trained B by module."""
    layers = lori.trainable_layers(base.model, block, mask)
    with lori.in_training(base, layers) as parameters:
        fit(base, parameters, rows, config, steps=steps, peak=peak)
    return lori.trained_B(layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--device", default=models.best_device())
    args = parser.parse_args()
    base = models.load_base(args.base, "auto", args.device)
    accelerate(base)
    print(heading(0, device=args.device, libraries=LIBRARIES))
    print(f"{base.precision}; rank 32, {args.steps} steps of 16 rows, {args.seeds} seeds\n")
    print("| task | method | A apart | A shared | shared - apart, by seed |\n|---|---|---|---|---|")
    for task, rates in RATES.items():
        splits = {}
        for split in ("train", "eval"):
            rows = read_source(DATA / task / f"{split}.jsonl", root=DATA)
            splits[split] = rows, encode_rows(base.tokenizer, rows, max_length=512, context=None)
        encoded = splits["train"][1][:-256]
        for method, peak in zip(("LoRI-S", "LoRI-D"), rates, strict=True):
            scores: dict[bool, list[float]] = {False: [], True: []}
            for seed in range(args.seeds):
                config = Config(seed=seed, batch=16, dense_learning_rate=5e-3)
                for shared, found in scores.items():
                    block, mask = block_of(base, config, task, shared), None
                    if method == "LoRI-S":
                        B = train(base, block, None, encoded, config, 15, 5e-3)
                        mask = masks.calibrate_mask(B, config.sparsity, config.scope)
                    B = train(base, block, mask, encoded, config, args.steps, peak)
                    done = lori.trained_block(block, B, mask, "bf16")
                    layers = low_rank_layers(base.model, AdapterWeights((done,)).updates())
                    with attached(base.model, layers), torch.inference_mode():
                        outcomes, _ = score_rows(
                            base, *splits["eval"], scorers.get("exact_match"), 64
                        )
                    found.append(float(outcomes.mean()))
            cells = [
                f"{statistics.mean(found):.3f} ({', '.join(f'{s:.3f}' for s in found)})"
                for found in scores.values()
            ]
            gaps = [b - a for a, b in zip(scores[False], scores[True], strict=True)]
            told = ", ".join(f"{gap:+.3f}" for gap in gaps)
            print(f"| {task} | {method} | {' | '.join(cells)} | {told} |", flush=True)


if __name__ == "__main__":
    main()
