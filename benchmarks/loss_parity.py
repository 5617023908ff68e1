"""Whether training gives the losses that PEFT's LoRA gives with the same frozen A.

    python benchmarks/loss_parity.py --base MODEL_FOLDER [--steps 50] [--rows 8] [--rank 8]

Ours is `training.fit` with dense LoriLinear in place, those of one input joined: rows
packed or padded without a mask, the head at completions alone. The peer is a plain loop
around PEFT's model: A copied from ours and frozen, B zero, rows padded at the end with an
attention mask, logits everywhere, AdamW, clipping written out. Both see the same rows of
all three example tasks in the same order. Exit code 1 where a goal is missed.

In float64 nothing is rounded to float32: transformers' RMSNorm, which rounds whatever the
model's dtype, is replaced on both sides by the same formula. In float32 the peer trains
twice: with transformers' own loss, and with the same mean over completion tokens through
logsumexp. torch's cross_entropy on the CPU sums 49,152 exponentials in few float32 sums,
which makes every loss too small by about 2e-6 nats; the goal is held against the second.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from heading import heading
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from lori_manager import models
from lori_manager.adapters import lori
from lori_manager.config import Config
from lori_manager.tasks.batches import training_order
from lori_manager.tasks.encoding import Encoded, encode_rows
from lori_manager.tasks.sources import read_source
from lori_manager.training import fit

DATA = Path(__file__).resolve().parent.parent / "examples" / "data"
TASKS = ("clinc_domain", "snips", "sentiment_uci")
LIBRARIES = ("lori-manager", "torch", "transformers", "peft")
IGNORED = -100  # transformers' label of a token that is not in the loss
# (what, two runs of `main`, steps that a goal is for, largest relative difference of the loss)
COMPARED: tuple[tuple[str, str, str, int, float | None], ...] = (
    ("ours, PEFT: float64", "ours 64", "PEFT 64", 50, 1e-8),
    ("ours, PEFT: float32", "ours 32", "PEFT 32", 20, 1e-5),
    ("ours, PEFT with transformers' loss: float32", "ours 32", "stock 32", 20, None),
    ("ours: float32, float64", "ours 32", "ours 64", 20, None),
    ("PEFT: float32, float64", "PEFT 32", "PEFT 64", 20, None),
    ("PEFT with transformers' loss: float32, float64", "stock 32", "PEFT 64", 20, None),
)


def widen(model: Any) -> Any:
    """The model in float64, in its RMSNorms too."""
    for module in model.double().modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(F.rms_norm, normalized_shape=module.weight.shape,
                                     weight=module.weight, eps=module.variance_epsilon)  # fmt: skip
    return model


def our_losses(
    dtype: torch.dtype, rows: list[Encoded], config: Config, args: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Each step's loss, in nats a completion token; A by module name."""
    base = models.load_base(args.base, "fp32", "cpu")
    if dtype == torch.float64:
        base = models.BaseModel(widen(base.model), base.folder, "fp64")
    block = lori.fresh_block(base.linear_shapes, config, "parity")
    layers = lori.trainable_layers(base.model, block, None)
    layers = {name: layer.to(dtype) for name, layer in layers.items()}
    with lori.in_training(base, layers) as values:
        if all(len(layer.group.layers) == 1 for layer in layers.values()):
            raise SystemExit("no layers share an input: expected siblings to be joined")
        result = fit(base, values, rows, config, steps=args.steps, peak=args.rate)
    return result.losses, block.A


def batches(
    rows: Sequence[Encoded], order: Sequence[Any], pad: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """ids, attention mask, labels of each step: (rows, length) int64, padded at the end."""
    for numbers in order:
        batch = [rows[i] for i in numbers]
        shape = (len(batch), max(len(r.ids) for r in batch))
        ids, labels = torch.full(shape, pad), torch.full(shape, IGNORED)
        real = torch.zeros(shape, dtype=torch.long)
        for i, row in enumerate(batch):
            tokens = torch.tensor([int(t) for t in row.ids])
            ids[i, : len(tokens)] = tokens
            real[i, : len(tokens)] = 1
            labels[i, row.prompt_length : len(tokens)] = tokens[row.prompt_length :]
        yield ids, real, labels


def exact_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of labelled tokens; (rows, length, vocabulary) and (rows, length)."""
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
    return (logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]).mean()


def their_losses(
    dtype: torch.dtype, rows: list[Encoded], A: dict[str, Tensor], config: Config, args: Any,
    *, stock: bool = False,
) -> list[float]:  # fmt: skip
    """Each step's loss, in nats a completion token; `stock`: transformers' own."""
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    if dtype == torch.float64:
        base = widen(base)
    lora = LoraConfig(r=config.rank, lora_alpha=int(config.alpha), target_modules="all-linear",
                      lora_dropout=0.0, task_type="CAUSAL_LM")  # fmt: skip
    model = get_peft_model(base, lora, autocast_adapter_dtype=False).to(dtype).eval()
    left, B = dict(A), []
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (m["default"].weight for m in (module.lora_A, module.lora_B))
            a.requires_grad_(False).copy_(left.pop(name.removeprefix("base_model.model.")))
            if b.any() or module.scaling["default"] != config.scaling:
                raise SystemExit(f"{name}: expected B to begin at zero, and our scaling")
            B.append(b)
    trained = [p for p in model.parameters() if p.requires_grad]
    if left or {id(p) for p in trained} != {id(p) for p in B}:
        raise SystemExit("expected PEFT to train B of the same modules, and nothing else")
    optimizer = torch.optim.AdamW(B, lr=args.rate, betas=(0.9, 0.999),
                                  weight_decay=config.weight_decay)  # fmt: skip
    order = training_order([len(r.ids) for r in rows], config.batch, args.steps, config.seed)
    losses, clipped = [], 0
    for ids, real, labels in batches(rows, order, model.config.pad_token_id or 0):
        out = model(input_ids=ids, attention_mask=real, labels=labels, use_cache=False)
        loss = out.loss if stock else exact_loss(out.logits, labels)
        loss.backward()
        norm = torch.cat([b.grad.flatten() for b in B]).norm()
        if norm > config.clip:
            clipped += 1
            for b in B:
                b.grad.mul_(config.clip / (norm + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{clipped} of {args.steps} steps clipped; ", end="")
    return losses


def report(runs: dict[str, list[float]], steps: int) -> bool:
    """Two tables; whether every goal is met."""
    apart = [[abs(a - b) / abs(b) for a, b in zip(runs[one], runs[other], strict=True)]
             for _, one, other, *_ in COMPARED]  # fmt: skip
    print("\nLargest relative difference of the loss up to a step:\n")
    print("| step | loss | " + " | ".join(title for title, *_ in COMPARED) + " |")
    print("|---|---|" + "---|" * len(COMPARED))
    for step in sorted({1, 2, 5, *range(10, steps + 1, 10), steps}):
        if step <= steps:
            cells = [f"{max(found[:step]):.1e}" for found in apart]
            print(f"| {step} | {runs['ours 64'][step - 1]:.4f} | {' | '.join(cells)} |")
    print("\n| what | steps | largest relative difference | goal |\n|---|---|---|---|")
    met = True
    for (title, _, _, first, goal), found in zip(COMPARED, apart, strict=True):
        worst = max(found[:first])
        met &= goal is None or worst <= goal
        shown = "-" if goal is None else f"{goal:.0e}"
        print(f"| {title} | {min(first, steps)} | {worst:.2e} | {shown} |")
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--base", type=Path, required=True)
    for name, value in {"steps": 50, "rows": 8, "rank": 8, "seed": 0}.items():
        add(f"--{name}", type=int, default=value)
    add("--rate", type=float, default=Config.dense_learning_rate)
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config = Config(rank=args.rank, alpha=2.0 * args.rank, batch=args.rows, seed=args.seed,
                    schedule="constant", warmup=0.0, weight_decay=0.01, clip=1.0)  # fmt: skip
    print(heading(args.seed, libraries=LIBRARIES))
    source = [r for t in TASKS for r in read_source(DATA / t / "train.jsonl", root=DATA)]
    rows = encode_rows(models.load_tokenizer(args.base), source, max_length=512, context=None)
    print(f"rank {args.rank} on every linear layer, {args.steps} steps of {args.rows} of "
          f"{len(rows)} rows, rate {args.rate:g}, weight decay 0.01, clip 1\n",
          flush=True)  # fmt: skip

    A: dict[str, Tensor] = {}

    def ours(dtype: torch.dtype) -> list[float]:
        losses, found = our_losses(dtype, rows, config, args)
        A.update(found)
        return losses

    def theirs(dtype: torch.dtype, stock: bool = False) -> list[float]:
        return their_losses(dtype, rows, A, config, args, stock=stock)

    work: dict[str, Callable[[], list[float]]] = {
        "ours 64": lambda: ours(torch.float64),
        "PEFT 64": lambda: theirs(torch.float64),
        "ours 32": lambda: ours(torch.float32),
        "PEFT 32": lambda: theirs(torch.float32),
        "stock 32": lambda: theirs(torch.float32, stock=True),
    }
    runs = {}
    for name, run in work.items():
        start = time.monotonic()
        runs[name] = run()
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    raise SystemExit(0 if report(runs, args.steps) else 1)


if __name__ == "__main__":
    main()
