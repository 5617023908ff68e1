"""How fast `lori export --format full` writes a model, beside `cp` and fsync of the same files.

    python benchmarks/full_export.py [--layers 7] [--rank 32] [--repeats 7] [--folder DIR]

A Llama of random bf16 weights at 8B shapes (vocabulary 32000), as many layers of it as asked
for, in files of about 1 GB; an update of every linear layer but the head. Both write new files
on the same disk, turn by turn, each ending when all is flushed; the base was read once before
and mostly lies in memory. Timed is `write_full`; the command itself also checks the base's
fingerprint, which it remembers. Peak memory is that of processes of their own: one that
exports, and one that only imports what the export needs and holds the update.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from heading import heading
from safetensors.torch import save_file

from lori_manager import models
from lori_manager.adapters.full_export import write_full
from lori_manager.engine.update import LowRankUpdate

LIBRARIES = ("lori-manager", "torch", "transformers", "safetensors")
HIDDEN, KV, MLP, VOCABULARY = 4096, 1024, 14336, 32000
GOAL_SPEED = 0.5  # of cp's
GOAL_MEMORY = 1 << 30  # above the largest file
SHARD = 10**9
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN), "mlp.down_proj": (HIDDEN, MLP),
}  # fmt: skip


def build(folder: Path, layers: int, seed: int) -> None:
    """Write the base: config and weights, a file whenever SHARD bytes are full."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        sizes |= {f"model.layers.{i}.{n}.weight": size for n, size in LINEAR.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            sizes[f"model.layers.{i}.{norm}.weight"] = (HIDDEN,)
    sizes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    generator = torch.Generator().manual_seed(seed)
    weight_map, held = {}, {}
    shards = 0
    for i, (name, size) in enumerate(sizes.items()):
        held[name] = (torch.randn(size, generator=generator) * 0.02).bfloat16()
        weight_map[name] = f"model-{shards:05}.safetensors"
        if sum(t.nbytes for t in held.values()) >= SHARD or i == len(sizes) - 1:
            save_file(held, folder / f"model-{shards:05}.safetensors", metadata={"format": "pt"})
            shards, held = shards + 1, {}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def updates(layers: int, rank: int, seed: int) -> dict[str, LowRankUpdate]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{i}.{name}": LowRankUpdate(
            torch.randn(rank, size[1], generator=generator),
            torch.randn(size[0], rank, generator=generator) * 1e-3,
            2.0,
        )
        for i in range(layers)
        for name, size in LINEAR.items()
    }


def copy(base: Path, target: Path) -> None:
    """`cp`, then every file flushed."""
    target.mkdir()
    files = [str(f) for f in sorted(base.iterdir())]
    subprocess.run(["cp", *files, str(target)], check=True)
    for file in (*target.iterdir(), target):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def peak(mode: str, base: Path, target: Path, args: argparse.Namespace) -> int:
    """Bytes at most resident in a process of its own."""
    command = [sys.executable, __file__, "--worker", mode, str(base), str(target),
               "--layers", str(args.layers), "--rank", str(args.rank)]  # fmt: skip
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(out.split()[-1])


def worker(args: argparse.Namespace) -> None:
    mode, base, target = args.worker
    made = updates(args.layers, args.rank, args.seed)
    models.load_skeleton(Path(base))
    if mode == "export":
        write_full(Path(base), made, Path(target), fingerprint="bench")
    # Not ru_maxrss, which begins with what the parent held.
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")))


def processor() -> float:
    """Seconds of processor time, of this process and those it waited for."""
    mine, theirs = (resource.getrusage(who) for who in
                    (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))  # fmt: skip
    return mine.ru_utime + mine.ru_stime + theirs.ru_utime + theirs.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    print(heading(args.seed, libraries=LIBRARIES))
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        base = Path(place) / "base"
        base.mkdir()
        build(base, args.layers, args.seed)
        os.sync()
        files = sorted(base.glob("*.safetensors"))
        size, largest = (f([x.stat().st_size for x in files]) for f in (sum, max))
        print(f"{args.layers} layers at 8B shapes, {size / 1e9:.2f} GB in {len(files)} files, the "
              f"largest {largest / 1e9:.2f} GB; rank {args.rank}; {args.repeats} times each, "
              "turn by turn\n")  # fmt: skip
        made = updates(args.layers, args.rank, args.seed)
        target = Path(place) / "target"
        works = {
            "cp, fsync": lambda: copy(base, target),
            "write_full": lambda: write_full(base, made, target, fingerprint="bench"),
        }
        wall: dict[str, list[float]] = {name: [] for name in works}
        busy: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(args.repeats + 1):  # the first of them warms up
            for name, work in works.items():
                start, spent = time.perf_counter(), processor()
                work()
                if turn:
                    wall[name].append(time.perf_counter() - start)
                    busy[name].append(processor() - spent)
                shutil.rmtree(target)
                os.sync()
        print("| what | median s | least - most | MB/s | over cp's speed | processor s | its share "
              "of 1 core |")  # fmt: skip
        print("|---|---|---|---|---|---|---|")
        floor = statistics.median(wall["cp, fsync"])
        for name, times in wall.items():
            middle, spent = statistics.median(times), statistics.median(busy[name])
            print(f"| {name} | {middle:.2f} | {min(times):.2f} - {max(times):.2f} "
                  f"| {size / middle / 1e6:.0f} | {floor / middle:.2f} | {spent:.2f} "
                  f"| {spent / middle:.0%} |")  # fmt: skip
        speed = floor / statistics.median(wall["write_full"])
        before, most = (peak(mode, base, target, args) for mode in ("idle", "export"))
    limit = largest + GOAL_MEMORY
    print(f"\nPeak memory {most / 2**20:.0f} MiB, of which {before / 2**20:.0f} MiB are Python, "
          "its libraries and the update; the largest file and 1 GiB are "
          f"{limit / 2**20:.0f} MiB.")  # fmt: skip
    met = speed >= GOAL_SPEED and most <= limit
    print(f"Goals, {GOAL_SPEED:g} of cp's speed and that memory: " + ("met" if met else "NOT met"))
    raise SystemExit(0 if met else 1)


if __name__ == "__main__":
    main()
