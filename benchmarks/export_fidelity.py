"""Whether an adapter exported to PEFT computes what ours does, and how large both files are.

    python benchmarks/export_fidelity.py --workspace DIR --ref REF [--rows 32]

Logits of both in float32 on the first eval rows of every task, at real tokens. The
size is compared with the same adapter as PEFT's LoRA file of equal rank in bfloat16.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from heading import heading
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lori_manager import models
from lori_manager.engine.layers import attached, low_rank_layers
from lori_manager.tasks.batches import collate
from lori_manager.tasks.encoding import Encoded
from lori_manager.workspace import Workspace

LIBRARIES = ("lori-manager", "torch", "transformers", "peft", "safetensors")


def compare(ours: models.BaseModel, layers: Any, theirs: Any, rows: list[Encoded]) -> list[float]:
    """Largest logit, largest difference, largest change that the adapter makes, equal argmax."""
    largest = difference = change = 0.0
    equal = tokens = 0
    for start in range(0, len(rows), 8):
        batch = rows[start : start + 8]
        ids = torch.from_numpy(collate(batch, 0)[0]).to(ours.device)
        lengths = torch.tensor([len(r.ids) for r in batch], device=ours.device)
        real = torch.arange(ids.shape[1], device=ours.device) < lengths[:, None]

        def logits(model: Any, ids: torch.Tensor = ids, real: torch.Tensor = real) -> torch.Tensor:
            return model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits[real]

        with attached(ours.model, layers):
            mine = logits(ours.model)
        base, peers = logits(ours.model), logits(theirs)
        largest = max(largest, float(mine.abs().max()))
        difference = max(difference, float((mine - peers).abs().max()))
        change = max(change, float((mine - base).abs().max()))
        equal += int((mine.argmax(-1) == peers.argmax(-1)).sum())
        tokens += len(mine)
    return [largest, difference, change, equal / tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--ref", required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    print(heading("none: nothing is random", device=args.device, libraries=LIBRARIES))

    with Workspace.open(args.workspace) as ws, tempfile.TemporaryDirectory() as name:
        adapter = ws.adapter(args.ref)
        exported = ws.export(adapter.ref, Path(name) / "peft")
        ours, second = (models.load_base(ws.base_folder, "fp32", args.device) for _ in "ab")
        layers = low_rank_layers(ours.model, ws.weights(adapter).updates())
        theirs = PeftModel.from_pretrained(second.model, exported).eval()
        print(f"{adapter.ref}, {adapter.method}, rank {adapter.rank}, {args.rows} rows a task\n")
        print("| task | largest logit | largest difference | ratio (goal <= 1e-5) "
              "| largest change over the base | same argmax |")  # fmt: skip
        print("|---|---|---|---|---|---|")
        worst = 0.0
        with torch.inference_mode():
            for task in ws.store.tasks():
                rows = ws.rows(task, "eval")[1][: args.rows]
                largest, difference, change, equal = compare(ours, layers, theirs, rows)
                worst = max(worst, difference / largest)
                print(f"| {task.ref} | {largest:.3f} | {difference:.2e} | "
                      f"{difference / largest:.2e} | {change:.3f} | {equal:.2%} |")  # fmt: skip
        bf16 = {
            k: v.bfloat16() for k, v in load_file(exported / "adapter_model.safetensors").items()
        }
        save_file(bf16, Path(name) / "bf16.safetensors", metadata={"format": "pt"})
        size = (Path(name) / "bf16.safetensors").stat().st_size
    print(f"\nworst ratio {worst:.2e}: {'met' if worst <= 1e-5 else 'NOT met'}")
    ratio = size / adapter.bytes
    print(f"stored file {adapter.bytes:,} bytes, PEFT's in bf16 {size:,}: 1/{ratio:.2f}")


if __name__ == "__main__":
    main()
