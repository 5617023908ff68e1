"""Generation speed on short real prompts: new tokens a second by batch size, cache or none.

    python benchmarks/generate.py --base MODEL_FOLDER [--device cpu|cuda] [--prompts 32]
        [--tokens 32] [--batch 1 8 32] [--uncached 8] [--rounds 3]

`generation.generate` on prompts of examples/data/snips, each made to write the same number
of tokens: the end of text may not come before. The time is that of the whole call, reading
the prompts included. Without the cache every new token computes all those before it again.
float32 on the CPU, bfloat16 on a GPU. The variants take turns in each round, after one that
is not counted. What every variant writes is compared with what the first one wrote: in
float32 they should agree, in bfloat16 batches of another size round differently.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from heading import heading

from lori_manager import models
from lori_manager.generation import generate
from lori_manager.tasks.encoding import encode_rows
from lori_manager.tasks.sources import read_source

DATA = Path(__file__).resolve().parent.parent / "examples" / "data"
LIBRARIES = ("lori-manager", "torch", "transformers")
PRECISION = {"cpu": "fp32", "cuda": "bf16"}
Variant = tuple[int, bool]  # batch, whether with the cache


def name(variant: Variant) -> str:
    batch, cache = variant
    return f"batch {batch}" + ("" if cache else ", no cache")


def run(
    base: models.BaseModel, prompts: list[list[int]], tokens: int, variant: Variant
) -> tuple[float, list[list[int]]]:
    """New tokens a second, and what was written. The lists come from the GPU when it is done."""
    batch, cache = variant
    start = time.perf_counter()
    said = generate(base, prompts, tokens, batch, min_new_tokens=tokens, cache=cache)
    return sum(map(len, said)) / (time.perf_counter() - start), said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--base", type=Path, required=True)
    add("--device", choices=tuple(PRECISION), default=models.best_device())
    add("--batch", type=int, nargs="+", default=[1, 8, 32])
    add("--uncached", type=int, nargs="*", default=[8], metavar="BATCH")
    for option, value in {"prompts": 32, "tokens": 32, "rounds": 3}.items():
        add(f"--{option}", type=int, default=value)
    args = parser.parse_args()
    base = models.load_base(args.base, PRECISION[args.device], args.device)
    rows = read_source(DATA / "snips" / "eval.jsonl", root=DATA)[: args.prompts]
    encoded = encode_rows(base.tokenizer, rows, max_length=512, context=base.context)
    prompts = [[int(i) for i in e.ids[: e.prompt_length]] for e in encoded]
    lengths = sorted(map(len, prompts))
    print(heading("none, decoding is greedy", device=args.device, libraries=LIBRARIES))
    print(f"{base.precision}; {len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, "
          f"{args.tokens} new tokens each; {args.rounds} rounds\n", flush=True)  # fmt: skip
    variants = [(b, True) for b in args.batch] + [(b, False) for b in args.uncached]
    for variant in variants:
        run(base, prompts[: variant[0]], 2, variant)
    speeds: dict[Variant, list[float]] = {v: [] for v in variants}
    written: dict[Variant, list[list[int]]] = {}
    for _ in range(args.rounds):
        for variant in variants:
            speed, written[variant] = run(base, prompts, args.tokens, variant)
            speeds[variant].append(speed)
    first = variants[0]
    slowest = statistics.median(speeds[first])
    print(f"| variant | new tokens/s, median | least - most | over {name(first)} "
          "| prompts with other tokens |\n|---|---|---|---|---|")  # fmt: skip
    for variant, found in speeds.items():
        middle = statistics.median(found)
        others = sum(a != b for a, b in zip(written[first], written[variant], strict=True))
        print(f"| {name(variant)} | {middle:,.1f} | {min(found):,.1f} - {max(found):,.1f} "
              f"| {middle / slowest:.2f} | {others} of {len(prompts)} |")  # fmt: skip


if __name__ == "__main__":
    main()
