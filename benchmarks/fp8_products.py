"""What e4m3 products and their rounding cost at 8B Llama shapes on a GPU, one by one.

    python benchmarks/fp8_products.py [--rows 8192] [--rank 32]

Each line is one product of a step, forward (W (out, in)) or gradient (W (in, out)), with
random entries: bf16 (cuBLAS), e4m3 by `torch._scaled_mm` with a scale a row, the same with
its low-rank part behind it, and both in one kernel of ours. Below: the kernels that round
rows, in GB/s of what they read and write. Medians of 20 after 5.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from heading import heading

from lori_manager.engine import fp8, triton_fp8

# (what, out, in) of the products of a layer that see one input
SHAPES = (("q k v", 6144, 4096), ("o", 4096, 4096), ("gate up", 28672, 4096), ("down", 4096, 14336))


def median_ms(run: Callable[[], object], warmup: int = 5, repeats: int = 20) -> float:
    """Of one call."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[repeats // 2]


def product(n: int, out: int, inner: int, rank: int) -> list[float]:
    """ms of: bf16; e4m3; e4m3 and the low-rank part; both in one kernel."""
    x, W = (torch.randn(k, inner, device="cuda").bfloat16() for k in (n, out))
    z, C = torch.randn(n, rank, device="cuda").bfloat16(), torch.randn(rank, out, device="cuda")
    C = C.bfloat16()
    xq, Wq = fp8.quantize_rows(x), fp8.quantize_matrix(W)

    def scaled() -> torch.Tensor:
        return torch._scaled_mm(xq.values, Wq.rows.t(), scale_a=xq.scale, scale_b=Wq.scale,
                                out_dtype=torch.bfloat16, use_fast_accum=True)  # fmt: skip

    return [
        median_ms(lambda: x.mm(W.t())),
        median_ms(scaled),
        median_ms(lambda: scaled().addmm_(z, C)),
        median_ms(lambda: triton_fp8.linear_plus(*xq, Wq.rows, Wq.scale, None, z, C)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=32)
    args = parser.parse_args()
    print(heading(0, device="cuda", libraries=("torch", "triton")))
    torch.manual_seed(0)
    n = args.rows
    columns = ("bf16", "e4m3", "e4m3, then low rank", "in one kernel")
    print(f"\nproducts of {n} rows, ms (TFLOP/s)\n\n| product | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    totals = [0.0] * len(columns)
    for name, out, inner in SHAPES:
        for way, a, b in ((name, out, inner), (f"{name}, gradient", inner, out)):
            times = product(n, a, b, args.rank)
            totals = [t + ms for t, ms in zip(totals, times, strict=True)]
            cells = [f"{ms:.3f} ({2 * n * out * inner / ms / 1e9:.0f})" for ms in times]
            print(f"| {way} | {' | '.join(cells)} |", flush=True)
    flops = sum(4 * n * out * inner for _, out, inner in SHAPES)
    cells = [f"{ms:.3f} ({flops / ms / 1e9:.0f})" for ms in totals]
    print(f"| a layer | {' | '.join(cells)} |")
    print("\n| rounding | ms | GB/s |\n|---|---|---|")
    for widths in ((4096,), (14336,), (4096, 1024, 1024), (14336, 14336)):
        parts = [torch.randn(n, w, device="cuda").bfloat16() for w in widths]
        by = torch.rand(sum(widths), device="cuda")
        ms = median_ms(lambda parts=parts, by=by: fp8.quantize_rows(parts, by))
        print(f"| {' '.join(map(str, widths))} | {ms:.3f} | {3 * n * sum(widths) / ms / 1e6:.0f} |")
    both, dh = (torch.randn(n, w, device="cuda").bfloat16() for w in (28672, 14336))
    by = torch.rand(28672, device="cuda")
    for name, read, run in (
        ("gating, 14336", 7, lambda: triton_fp8.gate(both)),
        ("its gradient", 12, lambda: triton_fp8.gate_gradient(both, dh, by)),
    ):
        ms = median_ms(run)
        print(f"| {name} | {ms:.3f} | {read * n * 14336 / ms / 1e6:.0f} |")


if __name__ == "__main__":
    main()
