"""How far products in 8-bit floats are off float32, on a real model's inputs and gradients.

    python benchmarks/fp8_error.py --base MODEL_FOLDER [--task clinc_domain] [--rows 4]

Emulated on the CPU. Each figure is a relative Frobenius error of one linear layer, over the
tokens of a few rows: of W, of y = x W' and of dx = dy W, for scales by row or by tensor, for
e4m3 and e5m2, and for the two ways to hold W for dx: rounded anew with a scale for each input
column, or the very numbers of the forward, whose row scales then go into dy ("kept").
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from heading import heading
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging as transformers_logging

from lori_manager import models
from lori_manager.tasks.encoding import encode_rows
from lori_manager.tasks.sources import read_source

DATA = Path(__file__).resolve().parent.parent / "examples" / "data"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def rounded(x: Tensor, dim: int | None, dtype: torch.dtype = E4M3) -> Tensor:
    """x in 8 bits and back; a scale for each line along `dim`, or one for all."""
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = (largest / torch.finfo(dtype).max).clamp_min(2.0**-100)
    return (x / scale).to(dtype).float() * scale


def watched(base: models.BaseModel, task: str, count: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (x, dy) over the tokens of some rows, each (tokens, features)."""
    caught: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def hook(name: str) -> Any:
        def watch(_: Any, inputs: Any, out: Tensor) -> None:
            x = inputs[0].detach()[0]
            out.register_hook(lambda dy: caught[name].append((x, dy[0].clone())))

        return watch

    base.model.get_input_embeddings().weight.requires_grad_(True)
    for name in base.linear_shapes:
        base.model.get_submodule(name).register_forward_hook(hook(name))
    read = read_source(DATA / task / "train.jsonl", root=DATA)[:count]
    for row in encode_rows(base.tokenizer, read, max_length=512, context=base.context):
        ids = torch.tensor([[int(i) for i in row.ids]])
        first = max(row.prompt_length, 1)
        F.cross_entropy(base.model(ids).logits[0, first - 1 : -1], ids[0, first:]).backward()
    return {n: tuple(torch.cat(t) for t in zip(*c, strict=True)) for n, c in caught.items()}


def errors(x: Tensor, dy: Tensor, W: Tensor) -> dict[str, float]:
    """Every figure of one layer."""

    def off(got: Tensor, expected: Tensor) -> float:
        return float((got - expected).norm() / expected.norm())

    y, dx = x @ W.t(), dy @ W
    scale = W.abs().amax(1) / 448
    held = (W / scale[:, None]).to(E4M3).float()
    kept, own = held * scale[:, None], rounded(W, 0)
    folded = {dtype: rounded(dy * scale, 1, dtype) @ held for dtype in (E4M3, E5M2)}
    return {
        "W, by row": off(kept, W),
        "W, by tensor": off(rounded(W, None), W),
        "y, bf16": off((x.bfloat16() @ W.bfloat16().t()).float(), y),
        "y, by row": off(rounded(x, 1) @ kept.t(), y),
        "y, by tensor": off(rounded(x, None) @ rounded(W, None).t(), y),
        "dx, by row, W kept, dy e4m3": off(folded[E4M3], dx),
        "dx, by row, W kept, dy e5m2": off(folded[E5M2], dx),
        "dx, by row, W by column, dy e4m3": off(rounded(dy, 1) @ own, dx),
        "dx, by row, W by column, dy e5m2": off(rounded(dy, 1, E5M2) @ own, dx),
        "dx, by tensor, dy e4m3": off(rounded(dy, None) @ rounded(W, None), dx),
        "against the forward's gradient: W kept": off(folded[E4M3], dy @ kept),
        "against the forward's gradient: W by column": off(rounded(dy, 1) @ own, dy @ kept),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--task", default="clinc_domain")
    parser.add_argument("--rows", type=int, default=4)
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    print(heading("none", libraries=("torch", "transformers")))
    base = models.load_base(args.base, "fp32", "cpu")
    found = defaultdict(list)
    for name, (x, dy) in watched(base, args.task, args.rows).items():
        W = base.model.get_submodule(name).weight.detach()
        for what, error in errors(x, dy, W).items():
            found[what].append(error)
    print(f"\n{args.task}, {args.rows} rows, {len(base.linear_shapes)} layers\n")
    print("| relative error | median | mean | most |\n|---|---|---|---|")
    for what, each in found.items():
        figures = statistics.median(each), statistics.fmean(each), max(each)
        print(f"| {what} | {' | '.join(f'{figure:.4f}' for figure in figures)} |")


if __name__ == "__main__":
    main()
