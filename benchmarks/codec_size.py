"""How large a stored LoRI-S adapter is beside PEFT's LoRA file of the same rank.

Random bfloat16 values under masks whose density differs by module from 1 to 27%, as
trained ones do. `--shapes 8b` takes about 3 GiB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

from lori_manager.engine.codec import decode_adapter, encode_adapter
from lori_manager.engine.projection import ProjectionSpec
from lori_manager.engine.weights import AdapterWeights, Block

# name -> hidden, key and value features, mlp features, layers
SHAPES = {"135m": (576, 192, 1536, 30), "8b": (4096, 1024, 14336, 32)}
DENSITIES = (0.01, 0.27)


def modules_of(shapes: str) -> dict[str, tuple[int, int]]:
    """Module name -> (out_features, in_features) of a Llama's seven projections."""
    hidden, kv, mlp, layers = SHAPES[shapes]
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    return {f"model.layers.{i}.{m}": size for i in range(layers) for m, size in sizes.items()}


def random_adapter(
    modules: dict[str, tuple[int, int]], rank: int, sparsity: float, seed: int
) -> AdapterWeights:
    """Masks of differing density with exactly round((1 - sparsity) * n) True in all."""
    rng = np.random.default_rng(seed)
    low, high = DENSITIES
    b = (high - low) / (1 - sparsity - low) - 1  # makes the mean density 1 - sparsity
    scores = {}
    for name, (out_features, _) in modules.items():
        density = np.float32(low + (high - low) * rng.beta(1, b))
        scores[name] = rng.random((out_features, rank), np.float32) / density
    flat = np.concatenate([s.ravel() for s in scores.values()])
    kept = round((1 - sparsity) * flat.size)
    cut = np.partition(flat, kept)[kept]
    mask = {name: torch.from_numpy(s < cut) for name, s in scores.items()}
    B = {}
    for name, m in mask.items():
        values = torch.from_numpy(rng.standard_normal(tuple(m.shape), np.float32))
        B[name] = torch.where(m, values * 0.01, 0.0).to(torch.bfloat16)
    spec = ProjectionSpec(seed, "safety", rank, {n: size[1] for n, size in modules.items()})
    return AdapterWeights((Block(B, 2.0, spec, None, mask),))


def peft_bytes(modules: dict[str, tuple[int, int]], rank: int) -> int:
    """Size of PEFT's bfloat16 LoRA file: header and both factors of every module."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (out_features, in_features) in modules.items():
        for factor, shape in (("A", [rank, in_features]), ("B", [out_features, rank])):
            start, end = end, end + 2 * shape[0] * shape[1]
            key = f"base_model.model.{name}.lora_{factor}.weight"
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    return 8 + len(json.dumps(header, separators=(",", ":"))) + end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", choices=SHAPES, default="135m")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    modules = modules_of(args.shapes)
    weights = random_adapter(modules, args.rank, args.sparsity, args.seed)
    block = weights.blocks[0]
    assert block.projection is not None
    assert block.mask is not None
    densities = [float(m.float().mean()) for m in block.mask.values()]

    start = time.perf_counter()
    digest = block.projection_digest
    regenerate = time.perf_counter() - start
    start = time.perf_counter()
    data = encode_adapter(weights)
    encode = time.perf_counter() - start
    start = time.perf_counter()
    again, _ = decode_adapter(data, check_projection=False)
    decode = time.perf_counter() - start
    same = all(
        torch.equal(block.B[n].view(torch.int16), again.blocks[0].B[n].view(torch.int16))
        and torch.equal(block.mask[n], again.blocks[0].mask[n])
        for n in modules
    )
    assert same, "the decoded adapter differs"
    assert again.blocks[0].projection_digest == digest

    peft = peft_bytes(modules, args.rank)
    rows = [
        ("machine", f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"),
        ("command", " ".join([Path(sys.executable).name, *sys.argv])),
        ("seed, threads", f"{args.seed}, {args.threads}"),
        ("shapes", f"{args.shapes}: {len(modules)} modules, rank {args.rank}"),
        ("entries of B, kept", f"{sum(b.numel() for b in block.B.values()):,}, "
         f"{sum(int(m.sum()) for m in block.mask.values()):,}"),
        ("density by module", f"{min(densities):.1%} to {max(densities):.1%}"),
        ("PEFT LoRA, bf16", f"{peft:,} bytes"),
        ("LoRI-S file", f"{len(data):,} bytes"),
        ("ratio", f"1/{peft / len(data):.2f}"),
        ("A from its seed, with digest", f"{regenerate:.2f} s"),
        ("encode (A at hand)", f"{encode:.2f} s"),
        ("decode (without A)", f"{decode:.2f} s"),
    ]  # fmt: skip
    for label, value in rows:
        print(f"{label:30}{value}")


if __name__ == "__main__":
    main()
