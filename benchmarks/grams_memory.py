"""The memory that regression merges take beyond the model, at an 8B Llama's layer shapes.

    python benchmarks/grams_memory.py [--shapes 8b|small] [--layers 2 4] [--members 8]
        [--method regmean regmean-held layerwise iteris] [--rows 32] [--tokens 96]
        [--device cpu|cuda] [--log FILE]

A Llama of random weights (bf16 on a GPU, with the whole vocabulary) and random adapters of
rank 32 on all seven projections are merged as `lori merge` does it, each member on random
rows of its own. Told are the model's own bytes and the most that was held beside it at any
time: allocated memory on a GPU, the growth of the resident set on a CPU; `reserved` is all that
PyTorch took of the GPU, the model and unused pieces too. `regmean-held`
collects all moments before it merges, which is what the others spare. A method whose memory
does not grow with the layers has the same figure on 2 as on 4. GiB are 2^30 bytes; every row
is a JSON line in the log as soon as it is there. `iteris` solves twice, on its own inputs
and on the merge's, which is all that more iterations would repeat.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from codec_size import SHAPES
from heading import heading
from transformers import LlamaConfig, LlamaForCausalLM

from lori_manager.consolidation import input_grams
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.grams import StreamedGrams
from lori_manager.iteris import merge_iteris
from lori_manager.layerwise import merge_layerwise
from lori_manager.merging.methods import MergeOptions
from lori_manager.merging.regmean import merge_regmean
from lori_manager.models import BaseModel
from lori_manager.tasks.encoding import Encoded

GIB = 2**30
GOAL = 24
# name -> hidden, key and value features, mlp features; heads; vocabulary
MODELS = {"8b": (SHAPES["8b"][:3], 32, 128256), "small": ((256, 64, 896), 4, 4096)}
METHODS = ("regmean", "regmean-held", "layerwise", "iteris")
BATCH = 32


def random_model(shapes: str, layers: int, device: str) -> BaseModel:
    (hidden, kv, mlp), heads, vocabulary = MODELS[shapes]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads * kv // hidden,
        vocab_size=vocabulary, max_position_embeddings=512,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    precision = "bf16" if device == "cuda" else "fp32"
    return BaseModel(model.eval().requires_grad_(False), Path(), precision)


def random_member(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> AdapterWeights:
    g = torch.Generator().manual_seed(seed)
    A = {n: (torch.randn(rank, s[1], generator=g) / s[1] ** 0.5) for n, s in shapes.items()}
    B = {n: torch.randn(s[0], rank, generator=g) * 1e-2 for n, s in shapes.items()}
    A, B = ({n: m.bfloat16() for n, m in factor.items()} for factor in (A, B))
    return AdapterWeights((Block(B, 2.0, tensors=A),))


def random_rows(rows: int, tokens: int, vocabulary: int, seed: int) -> list[Encoded]:
    """Rows of up to so many tokens, of words of their own."""
    draw = np.random.default_rng(seed)
    words = draw.choice(vocabulary, vocabulary // 8, replace=False).astype(np.int32)
    lengths = draw.integers(tokens // 2, tokens + 1, rows)
    return [Encoded(draw.choice(words, n), int(n) - 4) for n in lengths]


def merged(
    method: str, base: BaseModel, members: Sequence[AdapterWeights], rows: list[list[Encoded]]
) -> AdapterWeights:
    """As `lori merge` calls it."""
    weights, options = [1 / len(members)] * len(members), MergeOptions(iterations=2)
    if method == "layerwise":
        return merge_layerwise(base, members, weights, rows, options)
    if method == "iteris":
        return merge_iteris(base, members, weights, rows, options)
    updates = [member.updates() for member in members]
    if method == "regmean":
        grams = StreamedGrams(base, updates, rows, BATCH)
        told = replace(options, grams=grams, groups=grams.groups)
    else:
        held = [input_grams(base, u, r, BATCH) for u, r in zip(updates, rows, strict=True)]
        told = replace(options, grams=held)
    return merge_regmean(members, weights, told)


class Memory:
    """Bytes held now, and the most since `reset`."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def _status(self, key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
        raise SystemExit(f"/proc/self/status has no {key}: memory is read on Linux alone")

    def reset(self) -> int:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before counts for no one
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
        return self._status("VmRSS")

    def reserved(self) -> int | None:
        """All that was taken of the GPU, at most; None on a CPU."""
        return torch.cuda.max_memory_reserved() if self.cuda else None

    def most(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", choices=sorted(MODELS), default="8b")
    add("--layers", type=int, nargs="+", default=[2, 4])
    add("--members", type=int, default=8)
    add("--rank", type=int, default=32)
    add("--rows", type=int, default=32, help="of each member")
    add("--tokens", type=int, default=96, help="of a row, at most")
    add("--method", nargs="+", choices=METHODS, default=list(METHODS))
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--log", type=Path)
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    libraries = ("lori-manager", "torch", "transformers")
    print(heading(args.seed, device=args.device, libraries=libraries))
    print(f"{args.members} members of rank {args.rank}, {args.rows} rows each, shapes "
          f"{args.shapes} {MODELS[args.shapes][0]}\n")  # fmt: skip
    print("| method | layers | model GiB | beyond it GiB | both GiB | reserved GiB | s | rank |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    memory = Memory(args.device)
    rows = [random_rows(args.rows, args.tokens, MODELS[args.shapes][2], i)
            for i in range(args.members)]  # fmt: skip
    for layers in args.layers:
        torch.manual_seed(args.seed)
        base = random_model(args.shapes, layers, args.device)
        own = sum(p.numel() * p.element_size() for p in base.model.parameters())
        members = [random_member(base.linear_shapes, args.rank, args.seed + i)
                   for i in range(args.members)]  # fmt: skip
        # Kernels, workspaces and threads are not what is measured.
        merged("regmean", base, members[:2], [one[:2] for one in rows[:2]])
        for method in args.method:
            before = memory.reset()
            start = time.perf_counter()
            found = merged(method, base, members, rows)
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            beyond, reserved = memory.most() - before, memory.reserved()
            taken = "" if reserved is None else f"{reserved / GIB:.2f}"
            row = {
                "shapes": args.shapes, "method": method, "layers": layers, "seed": args.seed,
                "members": args.members, "rows": args.rows, "tokens": args.tokens,
                "device": args.device, "model_bytes": own, "beyond_bytes": beyond,
                "reserved_bytes": reserved,
                "seconds": round(seconds, 3), "rank": found.rank,
            }  # fmt: skip
            if args.log:
                with args.log.open("a") as f:
                    f.write(json.dumps(row) + "\n")
            print(f"| {method} | {layers} | {own / GIB:.2f} | {beyond / GIB:.2f} "
                  f"| {(own + beyond) / GIB:.2f} | {taken} | {seconds:.1f} | {found.rank} |",
                  flush=True)  # fmt: skip
            del found
        del base, members  # before the next model is made
    print(f"\ngoal: at most {GOAL} GiB")


if __name__ == "__main__":
    main()
