"""One training step at Stable Diffusion 1.5 shapes: LoRI against diffusers with PEFT's LoRA.

    python benchmarks/diffusion_step.py [--batch 8] [--rank 32] [--variants ...] [--tiny]

A UNet2DConditionModel of SD 1.5's configuration with random frozen bf16 weights, latents of
64 x 64, 77 text states of width 768 an image, low-rank updates on to_q, to_k, to_v and to_out of
the cross-attention, noise-prediction loss, clipping and AdamW step included. Every variant gets a
UNet of its own in one process, latents and text states that are encoded already, and fused
AdamW. A time is the median over steps, from the end of one to the end of the next; memory is the
largest that torch allocated in the measured steps. The first variant runs once more at the end,
so that drift is seen.

`peft autocast` is what diffusers' text-to-image LoRA script does: adapters in float32,
`cast_training_params`, the forward under bf16 autocast. `peft bf16` has adapters in bf16 and no
autocast. `+nhwc` puts the UNet's weights in channels_last. `lori` is LoRI-S at sparsity 0.9 as
`lori train` runs it, noise drawn from seeded streams on the CPU included; `lori-d` trains all
of B. `-graphs` is without CUDA graphs, `-convs` with torch's own convolutions, `-nhwc` in torch's
usual layout, `-join` with every layer computing alone. `--tiny` runs a small UNet
on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

PEFT = ("peft autocast", "peft bf16", "peft bf16 +nhwc")
LORI = ("lori", "lori-d", "lori -graphs", "lori -graphs -nhwc", "lori -graphs -convs",
        "lori -graphs -join")  # fmt: skip
VARIANTS = (*PEFT, *LORI)
TARGETS = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
SD15 = {
    "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
    "down_block_types": (*(CROSS[0],) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *(CROSS[1],) * 3),
}  # fmt: skip
SMALL = {
    "sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": 4, "norm_num_groups": 8,
    "block_out_channels": (16, 32), "layers_per_block": 1,
    "down_block_types": (CROSS[0], CROSS[0]), "up_block_types": (CROSS[1], CROSS[1]),
}  # fmt: skip
WARMUP = 5


def build(shape: dict, device: str, nhwc: bool) -> nn.Module:
    """A UNet with random frozen bf16 weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            unet = UNet2DConditionModel(**shape)
    finally:
        torch.set_default_dtype(default)
    unet = unet.requires_grad_(False)
    return unet.to(memory_format=torch.channels_last) if nhwc else unet


def scheduler():
    """SD 1.5's forward process."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def given(shape: dict, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents, text states) on the CPU, as they are once encoded."""
    side = shape["sample_size"]
    torch.manual_seed(1)
    latents = torch.randn(batch, 4, side, side)
    return latents, torch.randn(batch, 77, shape["cross_attention_dim"]).bfloat16()


def peft_step(unet: nn.Module, variant: str, args, shape: dict) -> tuple[Callable, list]:
    """diffusers' own training step, and what it trains."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    unet.add_adapter(
        LoraConfig(
            r=args.rank,
            lora_alpha=args.rank,
            init_lora_weights="gaussian",
            target_modules=r".*attn2\.to_(q|k|v|out\.0)",
        )
    )
    wide = "autocast" in variant
    if wide:
        cast_training_params(unet, dtype=torch.float32)
    else:
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.bfloat16()
    unet.train()
    trained = [p for p in unet.parameters() if p.requires_grad]
    forward_process = scheduler()
    device = next(unet.parameters()).device
    latents, texts = (t.to(device) for t in given(shape, args.batch))
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")

    def step() -> None:
        noise = torch.randn_like(latents)
        at = torch.randint(0, 1000, (args.batch,), device=device)
        noisy = forward_process.add_noise(latents, noise, at)
        with torch.autocast(device.type, torch.bfloat16, enabled=wide):
            predicted = unet(noisy.bfloat16(), at, texts, return_dict=False)[0]
        loss = nn.functional.mse_loss(predicted.float(), noise.float(), reduction="mean")
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, trained


def lori_step(
    unet: nn.Module, variant: str, args, shape: dict, stack: ExitStack
) -> tuple[Callable, list]:
    """Our step, as `training.fit` makes it."""
    from lori_manager.adapters.kind import Training
    from lori_manager.adapters.lori import fresh_block, trainable_layers
    from lori_manager.config import Config
    from lori_manager.diffusion.noise_loss import noise_steps
    from lori_manager.diffusion.pipeline import DiffusionBase
    from lori_manager.engine.frozen import freeze_convolutions
    from lori_manager.engine.layers import attached
    from lori_manager.engine.siblings import join_siblings
    from lori_manager.engine.trained import TrainedValues
    from lori_manager.tasks.images import Picture
    from lori_manager.training import no_weights

    if "-convs" not in variant:
        freeze_convolutions(unet)
    unet.eval()
    base = DiffusionBase(unet, Path(), "bf16")
    base.__dict__["scheduler"] = scheduler()
    latents, texts = given(shape, args.batch)
    pictures = [Picture(bytes(16), f"{i}", f"{i}", bytes) for i in range(args.batch)]
    base._latents = {f"{i}": one for i, one in enumerate(latents)}
    base._texts = {f"{i}": one for i, one in enumerate(texts)}
    graphs = "off" if "-graphs" in variant else "auto"
    config = Config(rank=args.rank, alpha=2.0 * args.rank, targets=TARGETS, graphs=graphs)
    block = fresh_block(base.linear_shapes, config, "bench")
    torch.manual_seed(2)
    dense = variant.startswith("lori-d")
    mask = None if dense else {n: torch.rand(b.shape) > 0.9 for n, b in block.B.items()}
    layers = trainable_layers(unet, block, mask)
    stack.enter_context(attached(unet, layers))
    if "-join" not in variant:
        join_siblings(layers, base.probe)
    values = TrainedValues(list(layers.values()))

    def make(*_: object) -> None:
        values.make(torch.bfloat16)

    stack.callback(unet.register_forward_pre_hook(make).remove)
    trained = [values.parameter]
    cuda = base.device.type == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0, fused=cuda)
    training = Training({"values": values.parameter}, no_weights)
    steps = stack.enter_context(noise_steps(base, config, "bench")(training, [], 0))

    def step() -> None:
        steps.of([pictures])
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        torch.autograd.graph.increment_version(trained)

    return step, trained


def measure(variant: str, args, shape: dict, device: str) -> dict:
    """Median step in ms, peak memory in GiB, trained values."""
    nhwc = "+nhwc" in variant or (variant.startswith("lori") and "-nhwc" not in variant)
    unet = build(shape, device, nhwc)
    cuda = device == "cuda"
    with ExitStack() as stack:
        if variant.startswith("peft"):
            step, trained = peft_step(unet, variant, args, shape)
        else:
            step, trained = lori_step(unet, variant, args, shape, stack)
        for _ in range(WARMUP):
            step()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        marks = []
        for _ in range(args.steps + 1):
            if cuda:
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
            else:
                marks.append(time.perf_counter())
            step()
        if cuda:
            torch.cuda.synchronize()
        times = [a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in pairwise(marks)]
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
        count = sum(p.numel() for p in trained)
    del unet, step, trained
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    spread = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {
        "variant": variant, "ms": statistics.median(times), "low": spread[0], "high": spread[2],
        "peak_gib": peak, "trained": count,
    }  # fmt: skip


def main() -> None:
    """Measure every variant and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--log", type=Path, help="write the figures as JSON there")
    args = parser.parse_args()
    device, shape = ("cpu", SMALL) if args.tiny else ("cuda", SD15)
    if args.tiny:
        args.rank, args.batch = 4, 2
    import diffusers
    import peft

    machine = platform.processor() if device == "cpu" else torch.cuda.get_device_name()
    print(
        f"{machine}, torch {torch.__version__}, diffusers {diffusers.__version__}, peft "
        f"{peft.__version__}; batch {args.batch}, rank {args.rank}, {args.steps} steps after "
        f"{WARMUP}"
    )
    wanted = [v.strip() for v in args.variants.split(",")]
    print(f"{'variant':22} {'ms a step':>10} {'quartiles':>17} {'peak GiB':>9} {'trained':>11}")
    found = []
    for number, variant in enumerate([*wanted, wanted[0]]):
        told = measure(variant, args, shape, device)
        label = variant + (" again" if number == len(wanted) else "")
        found.append(told | {"variant": label})
        quartiles = f"{told['low']:.1f} to {told['high']:.1f}"
        print(
            f"{label:22} {told['ms']:10.1f} {quartiles:>17} {told['peak_gib']:9.2f} "
            f"{told['trained']:11,}",
            flush=True,
        )
    if args.log:
        args.log.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
