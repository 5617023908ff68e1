"""Merging at an 8B Llama's shapes: the rank-r SVD three ways, and every registered method.

    python benchmarks/merge_speed.py [--layers 2] [--rank 32] [--device cpu|cuda]
        [--svd-members 4] [--members 8] [--method NAME ...] [--peft-modules 1] [--repeats 1]
        [--shapes 8b|135m] [--log FILE]

Random adapters of the given rank on all seven projections, weights 1/T, float32. First the
best update of rank r of the weighted sum: our `svd` against PEFT's `add_weighted_adapter(
combination_type="svd")` and `torch.svd_lowrank` of the dense sum, whose making is part of
their time. PEFT does a full SVD of every matrix, half a minute for one q_proj on a CPU,
so it gets the first `--peft-modules` of the seven only, and 0 leaves it out; error is against
the exact sum, in the Frobenius norm, and against the smallest possible. Then every method
over `--layers` layers, also multiplied up to all of the shapes' own. `linear` gets members
that share one A, since it takes no others; methods that need probe inputs are left out.
Each row is a JSON line in the log as soon as it is there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from codec_size import SHAPES, modules_of
from heading import heading
from torch import Tensor, nn

from lori_manager.engine.core import core_form, truncated
from lori_manager.engine.update import LowRankUpdate, concat_updates
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.merging.methods import MergeOptions, load_all

LIBRARIES = ("lori-manager", "torch", "peft")
SCALING = 2.0

T = TypeVar("T")


def timed(work: Callable[[], T], device: str) -> tuple[T, float]:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return found, time.perf_counter() - start


def least(work: Callable[[], T], args: argparse.Namespace) -> tuple[T, float]:
    """What it gives and the least seconds of `--repeats` runs."""
    found, seconds = timed(work, args.device)
    for _ in range(args.repeats - 1):
        seconds = min(seconds, timed(work, args.device)[1])
    return found, seconds


def keep(row: dict, args: argparse.Namespace) -> None:
    """Add a row to the log, with what it was measured on."""
    if args.log:
        told = {"shapes": args.shapes, "layers": args.layers, "adapter_rank": args.rank,
                "device": args.device, "seed": args.seed, "repeats": args.repeats}  # fmt: skip
        with args.log.open("a") as f:
            f.write(json.dumps(told | row) + "\n")


def random_adapters(
    shapes: dict[str, tuple[int, int]], rank: int, count: int, shared: bool, args
) -> list[AdapterWeights]:
    """Adapters whose B has columns of falling size; each with an A of its own, or all with one."""
    g = torch.Generator(args.device).manual_seed(args.seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=args.device)

    sizes = torch.logspace(0, -1, rank, device=args.device) * 1e-3
    A, out = None, []
    for _ in range(count):
        if A is None or not shared:
            A = {n: draw(rank, s[1]) / s[1] ** 0.5 for n, s in shapes.items()}
        B = {n: draw(s[0], rank) * sizes for n, s in shapes.items()}
        out.append(AdapterWeights((Block(B, SCALING, tensors=A),)))
    return out


def peft_svd(
    updates: list[LowRankUpdate], weights: list[float], rank: int, device: str
) -> tuple[LowRankUpdate, float]:
    """PEFT's merge of these updates on one bare linear layer."""
    from peft import LoraConfig, get_peft_model

    out_features, in_features = updates[0].shape
    model = nn.Module()
    model.layer = nn.utils.skip_init(
        nn.Linear, in_features, out_features, bias=False, device=device
    )
    peft, names = None, [f"t{i}" for i in range(len(updates))]
    for name, update in zip(names, updates, strict=True):
        config = LoraConfig(
            r=update.rank, lora_alpha=SCALING * update.rank, target_modules=["layer"]
        )
        if peft is None:
            peft = get_peft_model(model, config, adapter_name=name)
        else:
            peft.add_adapter(name, config)
        layer = peft.base_model.model.layer
        layer.lora_A[name].weight.data = update.A.clone()
        layer.lora_B[name].weight.data = update.B.clone()

    def work() -> None:
        peft.add_weighted_adapter(names, weights, "all", combination_type="svd", svd_rank=rank)

    _, seconds = timed(work, device)
    A, B = layer.lora_A["all"].weight.data, layer.lora_B["all"].weight.data
    return LowRankUpdate(A, B, layer.scaling["all"]), seconds


def lowrank_svd(updates: list[LowRankUpdate], weights: list[float], rank: int) -> LowRankUpdate:
    total = sum(w * u.delta() for u, w in zip(updates, weights, strict=True))
    U, S, V = torch.svd_lowrank(total, q=rank)
    return LowRankUpdate(V.t(), U * S)


def warm_up(args: argparse.Namespace) -> None:
    """Every way once at a small size: a GPU's libraries are loaded at their first call."""
    small = {"layer.q_proj": (256, 256)}
    members = random_adapters(small, 4, 2, True, args)
    updates = [member.updates()["layer.q_proj"] for member in members]
    for entry in load_all():
        if not entry.facts.get("needs"):
            entry.item(members, [0.5, 0.5], MergeOptions())
    truncated(concat_updates(updates, [0.5, 0.5]), 4)
    lowrank_svd(updates, [0.5, 0.5], 4)
    if args.peft_modules:
        peft_svd(updates, [0.5, 0.5], 4, args.device)


def compare_svd(shapes: dict[str, tuple[int, int]], args) -> None:
    members = random_adapters(shapes, args.rank, args.svd_members, False, args)
    weights = [1 / len(members)] * len(members)
    print(f"Rank {args.rank} of the sum of {len(members)} adapters, one module at a time, ours "
          f"and torch's the least of {args.repeats}\n")  # fmt: skip
    print("| module | way | s | relative error | above the smallest |")
    print("|---|---|---|---|---|")
    beside: dict[str, list[tuple[float, float]]] = defaultdict(list)  # way -> (its s, ours)
    for i, name in enumerate(list(shapes)[: len(shapes) // args.layers]):
        updates = [m.updates()[name] for m in members]
        exact = concat_updates(updates, weights)
        values = torch.linalg.svdvals(core_form([exact], torch.float64).cores[0]).square()
        smallest, whole = float(values[args.rank :].sum()), float(values.sum())

        def ours(exact: LowRankUpdate = exact) -> LowRankUpdate:
            return truncated(exact, args.rank)[0]

        def lowrank(updates: list[LowRankUpdate] = updates) -> LowRankUpdate:
            return lowrank_svd(updates, weights, args.rank)

        rows = [("ours", *least(ours, args))]
        rows.append(("torch.svd_lowrank of the dense sum", *least(lowrank, args)))
        if i < args.peft_modules:
            rows.append(("PEFT svd", *peft_svd(updates, weights, args.rank, args.device)))
        for way, found, seconds in rows:
            gap = core_form([exact, found], torch.float64).cores
            error = float((gap[0] - gap[1]).square().sum())
            relative, above = (error / whole) ** 0.5, (error / smallest) ** 0.5 - 1
            beside[way].append((seconds, rows[0][2]))
            keep({"what": "svd", "module": name, "shape": exact.shape, "way": way,
                  "members": len(members), "seconds": seconds, "error": relative,
                  "above_smallest": above}, args)  # fmt: skip
            print(f"| {name.rpartition('.')[2]} {'x'.join(map(str, exact.shape))} | {way} "
                  f"| {seconds:.4f} | {relative:.6f} | {above:+.1e} |", flush=True)  # fmt: skip
    one = {n: s for n, s in shapes.items() if n in list(shapes)[: len(shapes) // args.layers]}
    layer = random_adapters(one, args.rank, args.svd_members, False, args)

    def at_once() -> AdapterWeights:
        return load_all().get("svd")(layer, weights, MergeOptions(max_rank=args.rank))

    _, together = least(at_once, args)
    keep({"what": "svd", "way": "ours, one call", "members": len(members),
          "modules": len(one), "seconds": together}, args)  # fmt: skip
    print(f"\nours, the layer's {len(one)} modules in one call: {together:.4f} s")
    for way, pairs in beside.items():
        theirs, mine = (sum(column) for column in zip(*pairs, strict=True))
        if len(pairs) == len(one) and way != "ours":
            mine = together
        if way != "ours":
            print(f"\n{way}: {theirs:.3f} s for {len(pairs)} modules, ours {mine:.4f} s, "
                  f"{theirs / mine:.0f} times")  # fmt: skip


def time_methods(shapes: dict[str, tuple[int, int]], args) -> None:
    chosen = [entry for entry in load_all() if not args.method or entry.name in args.method]
    left_out = [f"{e.name} (needs {e.facts['needs']})" for e in chosen if e.facts.get("needs")]
    chosen = [entry for entry in chosen if not entry.facts.get("needs")]
    if chosen:
        every = SHAPES[args.shapes][3]
        weights = [1 / args.members] * args.members
        print(f"\n{args.members} adapters of rank {args.rank}, {args.layers} layers, "
              f"the least of {args.repeats}\n")  # fmt: skip
        print(f"| method | s | s per layer | {every} layers, s | rank |")
        print("|---|---|---|---|---|")
    for shared in (False, True):  # one set of adapters at a time: of 32 layers it takes 2.7 GB
        mine = [entry for entry in chosen if (entry.name == "linear") == shared]
        members = random_adapters(shapes, args.rank, args.members, shared, args) if mine else []
        for entry in mine:

            def work(entry=entry, members=members) -> AdapterWeights:
                return entry.item(members, weights, MergeOptions())

            found, seconds = least(work, args)
            each = seconds / args.layers
            keep({"what": "method", "method": entry.name, "members": args.members,
                  "seconds": seconds, "rank": found.rank}, args)  # fmt: skip
            print(f"| {entry.name} | {seconds:.2f} | {each:.3f} | {each * every:.1f} "
                  f"| {found.rank} |", flush=True)  # fmt: skip
            del found
        del members
    if left_out:
        print(f"\nLeft out: {', '.join(left_out)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--svd-members", type=int, default=4)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--method", nargs="*", help="only these; `none` for the SVDs alone")
    parser.add_argument("--peft-modules", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="but of PEFT; the least counts")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--log", type=Path, help="JSON lines, added to")
    args = parser.parse_args()
    print(heading(args.seed, device=args.device, libraries=LIBRARIES) + "\n")
    if args.device == "cuda":
        warm_up(args)
    shapes = {
        name: shape
        for name, shape in modules_of(args.shapes).items()
        if int(name.split(".")[2]) < args.layers
    }
    torch.manual_seed(args.seed)  # what svd_lowrank draws
    compare_svd(shapes, args)
    time_methods(shapes, args)


if __name__ == "__main__":
    main()
