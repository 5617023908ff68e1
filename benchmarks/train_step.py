"""One training step at 8B Llama shapes on a GPU: LoRI against the frozen base and PEFT.

    python benchmarks/train_step.py [--layers 32,8] [--variants ...] [--log FILE]

Random bf16 weights, rank 32 on all seven projections, 8192 real tokens a step (16 x 512
and 4 x 2048), the loss at every position, AdamW step included, no gradient
checkpointing. Each variant runs in a process of its own; times are medians of CUDA
events after warm-up. `floor` is the frozen base alone, forward and backward to the
embeddings; it runs twice so that the noise is seen. `+liger` replaces norm, rotary,
SwiGLU and loss by liger-kernel's. PEFT's LoRA has its A frozen, as LoRI's is, and adapters in
bf16; `peft fp32` has them in float32, PEFT's default. `lori plain` is without our own kernels.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

SHAPES = ((16, 512), (4, 2048))
RANK = 32
VARIANTS = (
    "floor", "peft", "peft fp32", "lori", "floor +liger", "peft +liger", "peft fp32 +liger",
    "lori plain +liger", "lori +liger", "lori-d +liger", "floor again +liger",
)  # fmt: skip
# 2 products of 2 flops a weight and token (forward, gradient of the input); the head at
# every position. 7.50e9 weights at 32 layers.
LAYER_WEIGHTS = 218_103_808
HEAD_WEIGHTS = 128_256 * 4096


def build(layers: int):
    """A Llama of 8B shapes with random frozen bf16 weights on the GPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128_256,
        max_position_embeddings=8192, rope_theta=500_000.0, tie_word_embeddings=False,
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(default)
    return model.requires_grad_(False).train()


def prepare(model, variant: str) -> list:
    """Put the variant's trainable parts into the model; returns its parameters."""
    import torch

    if variant.startswith("floor"):
        model.enable_input_require_grads()
        return []
    if variant.startswith("peft"):
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=RANK, lora_alpha=64, target_modules="all-linear",
                            task_type="CAUSAL_LM")  # fmt: skip
        inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_B" in name)
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # `get_peft_model` makes them float32 unless told otherwise
                wide = torch.float32 if "fp32" in variant else torch.bfloat16
                parameter.data = parameter.data.to(wide)
        return [p for p in model.parameters() if p.requires_grad]
    from lori_manager.engine import kernels
    from lori_manager.engine.fp8 import quantize_base
    from lori_manager.engine.gated import gates_together
    from lori_manager.engine.layers import LoriLinear
    from lori_manager.engine.siblings import join_siblings
    from lori_manager.engine.trained import TrainedValues
    from lori_manager.models import linear_shapes

    kernels.enable("plain" not in variant)
    if "fp8" in variant:
        quantize_base(model, linear_shapes(model))
    generator = torch.Generator(device="cuda").manual_seed(1)
    layers = {}
    for name, (out, inner) in linear_shapes(model).items():
        A = torch.rand(RANK, inner, device="cuda", generator=generator) * 2 - 1
        mask = None
        if not variant.startswith("lori-d"):
            mask = torch.rand(out, RANK, device="cuda", generator=generator) < 0.1
        layers[name] = LoriLinear(model.get_submodule(name), A / inner**0.5, 2.0, mask)
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, layers[name])
    ids = torch.zeros(1, 2, dtype=torch.long, device="cuda")
    if not join_siblings(layers, lambda: model(input_ids=ids)):
        raise SystemExit("no layers share an input: the variant measures nothing")
    values = TrainedValues(list(layers.values())).parameter
    model.fused = ExitStack()  # until the process ends
    if model.fused.enter_context(gates_together(model)) == 0 and "plain" not in variant:
        raise SystemExit("no gated feed-forward was found: the variant measures nothing new")
    return [values]


def measure(step: Callable[[], None], warmup: int = 3, repeats: int = 9) -> list[float]:
    """Milliseconds of each step, sorted."""
    import torch

    for _ in range(warmup):
        step()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)


def account(step: Callable[[], None], steps: int = 3, most: int = 40) -> None:
    """Print where each millisecond of a step goes, kernel by kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            step()
    found = sorted(seen.key_averages(), key=lambda e: -e.device_time_total)
    whole = sum(e.device_time_total for e in found) / steps / 1e3
    print(
        f"{whole:.1f} ms of kernels a step\n| kernel | launches | ms | us each |\n|---|---|---|---|"
    )
    for e in found[:most]:
        ms = e.device_time_total / steps / 1e3
        name = e.key.replace("|", "/")[:110]
        print(f"| {name} | {e.count / steps:.0f} | {ms:.2f} | {ms * 1e3 * steps / e.count:.0f} |")


def work(variant: str, layers: int, kernels: bool) -> None:
    """Measure one variant at every shape; one JSON line each."""
    import torch

    if "+liger" in variant:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model = build(layers)
    parameters = prepare(model, variant)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None
    for rows, length in SHAPES:
        batches = [torch.randint(0, 128_256, (rows, length), device="cuda") for _ in range(3)]
        turn = 0

        def step(batches: list = batches) -> None:
            nonlocal turn
            turn += 1
            ids = batches[turn % len(batches)]
            model(input_ids=ids, labels=ids).loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        found = {"variant": variant, "layers": layers, "shape": [rows, length]}
        try:
            times = measure(step)
            found |= {"median": times[len(times) // 2], "least": times[0], "most": times[-1],
                      "peak": torch.cuda.max_memory_allocated() / 2**30}  # fmt: skip
        except torch.OutOfMemoryError:
            found["median"] = None
        print(json.dumps(found), flush=True)
        if kernels:
            account(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", default="32,8")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--log", type=Path)
    parser.add_argument("--rate", type=float, default=785.0, help="measured TFLOP/s of bf16")
    parser.add_argument("--account", action="store_true", help="kernel by kernel too")
    parser.add_argument("--worker", nargs=2, metavar=("VARIANT", "LAYERS"))
    args = parser.parse_args()
    if args.worker:
        return work(args.worker[0], int(args.worker[1]), args.account)
    import torch
    import transformers

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers "
          f"{transformers.__version__}, Python {platform.python_version()}; command: "
          f"{' '.join(sys.argv)}")  # fmt: skip
    for layers in map(int, args.layers.split(",")):
        rows = []
        for variant in args.variants.split(","):
            done = subprocess.run(
                [sys.executable, __file__, "--worker", variant, str(layers)]
                + ["--account"] * args.account,
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                print(f"{variant} failed: {last}", flush=True)
            if args.account:
                print(f"\n## {variant}, {layers} layers\n{done.stdout}", flush=True)
            rows += [json.loads(line) for line in lines]
            if args.log:
                with args.log.open("a") as f:
                    f.writelines(line + "\n" for line in lines)
        flops = 4 * (LAYER_WEIGHTS * layers + HEAD_WEIGHTS) * 8192
        for shape in SHAPES:
            mine = [r for r in rows if tuple(r["shape"]) == shape]
            floor = next((r for r in mine if r["variant"] == "floor +liger"), None)
            print(f"\n{layers} layers, {shape[0]} x {shape[1]} tokens")
            print("| variant | ms (least to most) | tokens/s | over floor +liger | peak GiB "
                  "| share of the card's rate |")  # fmt: skip
            print("|---|---|---|---|---|---|")
            for r in mine:
                if r["median"] is None:
                    print(f"| {r['variant']} | out of memory | | | | |")
                    continue
                ratio = f"{r['median'] / floor['median']:.3f}" if floor else ""
                share = flops / r["median"] / 1e9 / args.rate
                print(f"| {r['variant']} | {r['median']:.1f} ({r['least']:.1f} to {r['most']:.1f}) "
                      f"| {8192 / r['median'] * 1e3:,.0f} | {ratio} | {r['peak']:.1f} "
                      f"| {share:.1%} |", flush=True)  # fmt: skip
    return None


if __name__ == "__main__":
    main()
