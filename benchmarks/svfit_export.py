"""Whether an SVFit adapter, exported as a plain LoRA, computes in PEFT what it was trained to.

    python benchmarks/svfit_export.py --base MODEL --data DIR [--steps 10] [--values 256] [--lr R]

Trains for a few steps on DIR/train.jsonl, exports, and compares on rows of DIR/eval.jsonl the
logits of W + U diag(delta) V' with those of PeftModel on the export, in float32. Says too what the
singular values cost to compute and to read back, what they hold and what the adapter weighs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from heading import heading
from peft import PeftModel

from lori_manager import models
from lori_manager.adapters import svfit
from lori_manager.adapters.spectra import spectra
from lori_manager.kinds import resolved
from lori_manager.tasks.batches import collate
from lori_manager.tasks.encoding import Encoded
from lori_manager.workspace import Workspace

LIBRARIES = ("lori-manager", "torch", "transformers", "peft")


def logits(model: Any, rows: list[Encoded]) -> torch.Tensor:
    """Of all rows' real tokens, (tokens, vocabulary)."""
    ids = torch.from_numpy(collate(rows).ids)
    lengths = torch.tensor([len(r.ids) for r in rows])
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    out: torch.Tensor = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
    return out[real]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--values", type=int, default=256)
    parser.add_argument("--lr", type=float, default=0.0, help="0: the kind's usual rate")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(heading(args.seed, libraries=LIBRARIES))

    with tempfile.TemporaryDirectory() as name, Workspace.create(Path(name), args.base) as ws:
        config = resolved(
            ws.settings.config.replace(
                kind="svfit", kind_options={"values": args.values}, steps=args.steps,
                learning_rate=args.lr, seed=args.seed, precision="fp32", store_dtype="fp32",
            )
        )  # fmt: skip
        ours, second = (models.load_base(ws.base_folder, "fp32", "cpu") for _ in "ab")
        ranks = {n: min(args.values, *shape) for n, shape in ours.linear_shapes.items()}
        for told in ("first time", "read back"):
            start = time.monotonic()
            found = spectra(ours, ranks)
            print(f"singular values of {len(ranks)} modules, {told}: "
                  f"{time.monotonic() - start:.1f} s")  # fmt: skip
        held = [s.energy for s in found.values()]
        print(f"the {args.values} largest hold {sum(held) / len(held):.1%} of the energy on "
              f"average, {min(held):.1%} at least")  # fmt: skip

        data = args.data.resolve()
        ws.add_task("task", train=data / "train.jsonl", eval=data / "eval.jsonl")
        (trained,) = ws.train(["task"], config)
        adapter, (score,) = trained.adapter, trained.scores
        facts = adapter.facts
        print(f"rate {config.learning_rate:g}: {facts['parameters']} values trained for "
              f"{facts['steps']} steps in {facts['seconds']:.0f} s, loss {facts['first_loss']:.3f} "
              f"-> {facts['last_loss']:.3f}, {score.scorer} {score.value:.3f}, "
              f"{adapter.bytes / 1e6:.1f} MB stored in float32")  # fmt: skip

        exported = ws.export(adapter.ref, Path(name) / "peft")
        rows = ws.rows(ws.store.task("task"), "eval")[1][: args.rows]
        theirs = PeftModel.from_pretrained(second.model, exported).eval()
        with torch.inference_mode():
            peers, base = logits(theirs, rows), logits(ours.model, rows)
        with svfit.training(ours, config, steps=1, start=ws.weights(adapter)), torch.no_grad():
            mine = logits(ours.model, rows)
        largest = float(mine.abs().max())
        difference = float((mine - peers).abs().max())
        print(f"largest logit {largest:.3f}, largest change over the base "
              f"{float((mine - base).abs().max()):.3f}, largest difference to PEFT "
              f"{difference:.2e}, ratio {difference / largest:.1e} (goal <= 1e-5)")  # fmt: skip


if __name__ == "__main__":
    main()
