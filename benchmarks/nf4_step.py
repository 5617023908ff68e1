"""One training step over a base in nf4 at 8B Llama shapes: PEFT's QLoRA, ours, and LoRI.

    python benchmarks/nf4_step.py [--layers 8] [--rows 16] [--length 512] [--variants ...]
    python benchmarks/nf4_step.py --tiny    # small shapes on the CPU: that it runs

Random weights packed to nf4 with double quantisation by bitsandbytes, products in bf16; rank 32,
alpha 64 on all seven projections, no dropout, the loss at every position, AdamW step included, no
gradient checkpointing. All variants run one after another in one process over the very same packed
base, with liger-kernel's norm, rotary and SwiGLU where it is installed (`--plain`: without).
Times are medians of CUDA events after warm-up; peak memory is torch's, of the whole step with the
base, and beside it what goes beyond the base.

floor          the packed base alone, forward and backward to the embeddings
peft           PEFT's LoRA on Linear4bit, adapters in float32 under autocast to bf16
peft bf16      the same with adapters in bf16 and no autocast
qlora          kind `qlora`: adapters in float32
lori-d lori-s  kind `lori` without a mask, and with one of sparsity 0.9
peft again     the first once more: what differs is noise
peft prepared  as `peft` after `prepare_model_for_kbit_training`, which makes norms, embeddings and
               head float32; it changes the base and so comes last
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

RANK, ALPHA = 32, 64.0
VARIANTS = ("floor", "peft", "peft bf16", "qlora", "lori-d", "lori-s", "peft again",
            "peft prepared")  # fmt: skip
EIGHT = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128_256,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip


def build(shapes: dict, layers: int, device: str, liger: bool):
    """A Llama with random weights, its linear layers but the head packed one by one."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import LlamaConfig, LlamaForCausalLM

    from lori_manager.acceleration import accelerate
    from lori_manager.models import BaseModel, linear_shapes

    config = LlamaConfig(
        **shapes, num_hidden_layers=layers, max_position_embeddings=8192, rope_theta=500_000.0,
        tie_word_embeddings=False, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    for name in linear_shapes(model):
        owner, _, child = name.rpartition(".")
        plain = model.get_submodule(name)
        packed = Linear4bit(
            plain.in_features, plain.out_features, bias=False, compute_dtype=torch.bfloat16,
            compress_statistics=True, quant_type="nf4", device="meta",
        )  # fmt: skip
        packed.weight = Params4bit(
            plain.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4",
            module=packed,
        )  # fmt: skip
        setattr(model.get_submodule(owner), child, packed.to(device))
    model.is_loaded_in_4bit = True  # PEFT looks for it
    model.requires_grad_(False).eval()
    base = BaseModel(model, Path("random"), "bf16", 4)
    return base, liger and accelerate(base)


@contextmanager
def put_in(base: Any, variant: str) -> Iterator[tuple[list, Any]]:
    """The variant's trainable parts in the model: its parameters, and what to run a step under."""
    import torch

    autocast = torch.autocast(base.device.type, dtype=torch.bfloat16)
    if variant == "floor":
        hook = base.model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, out: out.requires_grad_(True)
        )
        try:
            yield [], nullcontext()
        finally:
            hook.remove()
        return
    if variant.startswith("peft"):
        with peft_layers(base.model, variant) as parameters:
            yield parameters, nullcontext() if "bf16" in variant else autocast
        return
    from lori_manager.config import Config
    from lori_manager.kinds import resolved

    if variant == "qlora":
        from lori_manager.adapters import qlora

        config = resolved(Config(kind="qlora", rank=RANK, alpha=ALPHA, seed=1))
        with qlora.training(base, config, steps=1) as training:
            yield list(training.parameters.values()), nullcontext()
        return
    from lori_manager.adapters import lori

    config = resolved(Config(rank=RANK, alpha=ALPHA, seed=1, base_bits=4))
    block = lori.fresh_block(base.linear_shapes, config, "benchmark")
    mask = None
    if variant == "lori-s":
        draw = torch.Generator().manual_seed(1)
        mask = {n: torch.rand(B.shape, generator=draw) < 0.1 for n, B in block.B.items()}
    layers = lori.trainable_layers(base.model, block, mask)
    with lori.in_training(base, layers) as parameters:
        yield list(parameters.values()), nullcontext()


@contextmanager
def peft_layers(model: Any, variant: str) -> Iterator[list]:
    """PEFT's QLoRA in the model, and out again."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from peft.tuners.lora import LoraLayer

    before = dict(model.named_modules())
    if "prepared" in variant:
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(1)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear",
                        task_type="CAUSAL_LM")  # fmt: skip
    wrapped = get_peft_model(model, config, autocast_adapter_dtype="bf16" not in variant)
    names = [n for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    wanted = torch.bfloat16 if "bf16" in variant else torch.float32
    for p in parameters:  # some versions make them in the dtype of the packed weight
        p.data = p.data.to(wanted)
    if len(parameters) != 2 * len(names):
        raise SystemExit("PEFT trains other parameters than A and B: the variant measures nothing")
    try:
        yield parameters
    finally:
        for name in names:
            owner, _, child = name.rpartition(".")
            setattr(model.get_submodule(owner), child, before[name])
        model.__dict__.pop("peft_config", None)
        model.requires_grad_(False)


def timed(step: Callable[[], None], device: str, warmup: int = 3, repeats: int = 9) -> list[float]:
    """Milliseconds of each step, sorted."""
    import torch

    for _ in range(warmup):
        step()
    times = []
    for _ in range(repeats):
        if device == "cpu":
            began = time.perf_counter()
            step()
            times.append((time.perf_counter() - began) * 1e3)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)


def measure(base: Any, variant: str, rows: int, length: int) -> dict[str, Any]:
    """Time and peak memory of the variant's step."""
    import torch

    device = base.device.type
    vocabulary = base.model.config.vocab_size
    draw = torch.Generator().manual_seed(2)
    batches = [torch.randint(0, vocabulary, (rows, length), generator=draw) for _ in range(3)]
    batches = [ids.to(base.device) for ids in batches]
    found: dict[str, Any] = {"variant": variant, "trained": 0, "times": None, "peak": 0.0}
    with put_in(base, variant) as (parameters, precision):
        optimizer = None
        if parameters:
            fused = True if device == "cuda" else None
            optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=fused)
        turn, losses = 0, []

        def step() -> None:
            nonlocal turn
            turn += 1
            ids = batches[turn % len(batches)]
            with precision:
                loss = base.model(input_ids=ids, labels=ids).loss
            loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())

        found["trained"] = sum(p.numel() for p in parameters)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            found["times"] = timed(step, device)
            found["first"], found["last"] = float(losses[0]), float(losses[-1])
            if device == "cuda":
                found["peak"] = torch.cuda.max_memory_allocated() / 2**30
        except torch.OutOfMemoryError:
            found["times"] = None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8, help="of the 8B model's 32")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--plain", action="store_true", help="without liger-kernel")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU")
    args = parser.parse_args()
    import bitsandbytes
    import peft
    import torch
    import transformers

    warnings.filterwarnings("ignore", category=UserWarning)
    unknown = set(args.variants.split(",")) - set(VARIANTS)
    if unknown:
        raise SystemExit(f"unknown variants {sorted(unknown)}; there are: {', '.join(VARIANTS)}")
    device = "cpu" if args.tiny else "cuda"
    if args.tiny:
        args.layers, args.rows, args.length = 2, 2, 32
    began = time.monotonic()
    base, fused = build(TINY if args.tiny else EIGHT, args.layers, device, not args.plain)
    machine = platform.processor() or "CPU" if args.tiny else torch.cuda.get_device_name()
    print(f"{machine}, torch {torch.__version__}, transformers {transformers.__version__}, peft "
          f"{peft.__version__}, bitsandbytes {bitsandbytes.__version__}, Python "
          f"{platform.python_version()}; seed 0; command: {' '.join(sys.argv)}")  # fmt: skip
    held = 0.0 if args.tiny else torch.cuda.memory_allocated() / 2**30
    tokens = args.rows * args.length
    print(f"\n{args.layers} layers, {args.rows} x {args.length} tokens, liger-kernel "
          f"{'on' if fused else 'off'}, base {held:.1f} GiB, built in "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    print("| variant | trained | ms (least to most) | tokens/s | over peft | peak GiB "
          "| beyond the base | loss, first and last step |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|", flush=True)
    reference = None
    for variant in args.variants.split(","):
        try:
            found = measure(base, variant, args.rows, args.length)
        except Exception as e:  # noqa: BLE001 - one variant's failure must not cost the others
            print(
                f"| {variant} failed: {type(e).__name__}: {str(e).splitlines()[0]} | | | | | | | |"
            )
            continue
        finally:
            gc.collect()
        if found["times"] is None:
            print(f"| {variant} | {found['trained']:,} | out of memory | | | | | |", flush=True)
            continue
        times = found["times"]
        median = times[len(times) // 2]
        if variant == "peft":
            reference = median
        ratio = f"{median / reference:.3f}" if reference else ""
        print(f"| {variant} | {found['trained']:,} | {median:.1f} ({times[0]:.1f} to "
              f"{times[-1]:.1f}) | {tokens / median * 1e3:,.0f} | {ratio} | {found['peak']:.1f} "
              f"| {found['peak'] - held:.1f} | {found['first']:.3f} {found['last']:.3f} |",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
