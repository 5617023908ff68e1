"""Merging at an 8B Llama's shapes: the rank-r SVD three ways, and every registered method.

    python benchmarks/merge_speed.py [--layers 2] [--rank 32] [--device cpu|cuda]
        [--svd-members 4] [--members 8] [--method NAME ...] [--peft-modules 1] [--repeats 1]

Random adapters of the given rank on all seven projections, weights 1/T, float32. First the
best update of rank r of the weighted sum: our `svd` against PEFT's `add_weighted_adapter(
combination_type="svd")` and `torch.svd_lowrank` of the dense sum, whose making is part of
their time. PEFT does a full SVD of every matrix, half a minute for one q_proj on a CPU,
so it gets the first `--peft-modules` modules only, and 0 leaves it out; error is against
the exact sum, in the Frobenius norm, and against the smallest possible. Then every method
over `--layers` layers, also multiplied up to 32. `linear` gets members that share one A,
since it takes no others; methods that need probe inputs are left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from codec_size import modules_of
from heading import heading
from torch import Tensor, nn

from lori_manager.engine.core import core_form, truncated
from lori_manager.engine.update import LowRankUpdate, concat_updates
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.merging.methods import MergeOptions, load_all

LIBRARIES = ("lori-manager", "torch", "peft")
ALL_LAYERS = 32
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


def compare_svd(shapes: dict[str, tuple[int, int]], args) -> None:
    members = random_adapters(shapes, args.rank, args.svd_members, False, args)
    weights = [1 / len(members)] * len(members)
    print(f"Rank {args.rank} of the sum of {len(members)} adapters, one module at a time\n")
    print("| module | way | s | relative error | above the smallest |")
    print("|---|---|---|---|---|")
    for i, name in enumerate(list(shapes)[: len(shapes) // args.layers]):
        updates = [m.updates()[name] for m in members]
        exact = concat_updates(updates, weights)
        values = torch.linalg.svdvals(core_form([exact], torch.float64).cores[0]).square()
        least, whole = float(values[args.rank :].sum()), float(values.sum())

        def ours(exact: LowRankUpdate = exact) -> LowRankUpdate:
            return truncated(exact, args.rank)[0]

        def lowrank(updates: list[LowRankUpdate] = updates) -> LowRankUpdate:
            return lowrank_svd(updates, weights, args.rank)

        rows = [("ours", *timed(ours, args.device))]
        rows.append(("torch.svd_lowrank of the dense sum", *timed(lowrank, args.device)))
        if i < args.peft_modules:
            rows.append(("PEFT svd", *peft_svd(updates, weights, args.rank, args.device)))
        for way, found, seconds in rows:
            gap = core_form([exact, found], torch.float64).cores
            error = float((gap[0] - gap[1]).square().sum())
            print(f"| {name.rpartition('.')[2]} {'x'.join(map(str, exact.shape))} | {way} "
                  f"| {seconds:.3f} | {(error / whole) ** 0.5:.6f} "
                  f"| {(error / least) ** 0.5 - 1:+.1e} |", flush=True)  # fmt: skip


def time_methods(shapes: dict[str, tuple[int, int]], args) -> None:
    apart = random_adapters(shapes, args.rank, args.members, False, args)
    shared = random_adapters(shapes, args.rank, args.members, True, args)
    weights = [1 / args.members] * args.members
    print(f"\n{args.members} adapters of rank {args.rank}, {args.layers} layers, "
          f"the least of {args.repeats}\n")  # fmt: skip
    print(f"| method | s | s per layer | {ALL_LAYERS} layers, s | rank |")
    print("|---|---|---|---|---|")
    left_out = []
    for entry in load_all():
        if args.method and entry.name not in args.method:
            continue
        if entry.facts.get("needs"):
            left_out.append(f"{entry.name} (needs {entry.facts['needs']})")
            continue
        members = shared if entry.name == "linear" else apart
        options = MergeOptions()

        def work(entry=entry, members=members, options=options) -> AdapterWeights:
            return entry.item(members, weights, options)

        found, seconds = timed(work, args.device)
        for _ in range(args.repeats - 1):
            seconds = min(seconds, timed(work, args.device)[1])
        each = seconds / args.layers
        print(f"| {entry.name} | {seconds:.2f} | {each:.3f} | {each * ALL_LAYERS:.1f} "
              f"| {found.rank} |", flush=True)  # fmt: skip
        del found
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
    parser.add_argument("--repeats", type=int, default=1, help="of methods; the least counts")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(heading(args.seed, device=args.device, libraries=LIBRARIES) + "\n")
    if args.device == "cuda":
        warm = {"layer.q_proj": (256, 256)}
        for entry in load_all():
            if not entry.facts.get("needs"):
                entry.item(random_adapters(warm, 4, 2, True, args), [0.5, 0.5], MergeOptions())
    shapes = {
        name: shape
        for name, shape in modules_of("8b").items()
        if int(name.split(".")[2]) < args.layers
    }
    torch.manual_seed(args.seed)  # what svd_lowrank draws
    compare_svd(shapes, args)
    time_methods(shapes, args)


if __name__ == "__main__":
    main()
