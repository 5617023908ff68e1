"""Training speed on short real rows: real (unpadded) tokens a second, ours and PEFT + Trainer.

    python benchmarks/train_small.py --base MODEL_FOLDER [--steps 36] [--device cpu|cuda]
        [--task clinc_domain ...] [--rounds 3] [--variant NAME ...]

Ours is `training.fit` with LoriLinear, dense and under a random mask of the given
sparsity. The peer is PEFT's LoRA (trains A and B) under `transformers.Trainer`, labels
on the completion only: with its defaults, grouped by length, and on a GPU twice with
what makes it fastest (liger-kernel where it is installed), under autocast and with
adapters in bfloat16 themselves. The base is float32 on the CPU and bfloat16 on a GPU for
all (Trainer's default there: bf16=True, adapters in float32). Logging and saving are off for all.

The same training rows, batch, rank and number of steps for each; with steps =
rows / batch every variant sees every row once. The variants take turns in each round. The
first steps of a run are left out of the time and of the tokens.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from heading import heading
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from lori_manager import models
from lori_manager.acceleration import accelerate
from lori_manager.adapters import lori
from lori_manager.config import Config
from lori_manager.engine import mask as masks
from lori_manager.tasks.batches import training_order
from lori_manager.tasks.encoding import Encoded, encode_rows
from lori_manager.tasks.sources import read_source
from lori_manager.training import fit

DATA = Path(__file__).resolve().parent.parent / "examples" / "data"
TASKS = ("clinc_domain", "snips", "sentiment_uci")
LIBRARIES = ("lori-manager", "torch", "transformers", "peft", "accelerate")
DENSE, SPARSE = "lori dense", "lori sparse"
DEFAULT, GROUPED = "trainer default", "trainer grouped"
BEST_AUTOCAST, BEST_BF16 = "trainer best, autocast", "trainer best, bf16 adapters"
RATES = {DENSE: 5e-3, SPARSE: 1e-2}  # as in side_by_side.py
LORA_RATE = 2e-3
PRECISION = {"cpu": "fp32", "cuda": "bf16"}
GOALS = {"cpu": {GROUPED: 1.3, DEFAULT: 2.0}, "cuda": {"trainer best": 4.0}}


@dataclass
class Clock:
    """When each optimizer step ended, and what the measured ones processed."""

    device: str
    warmup: int
    steps: int
    at: dict[int, float] = field(default_factory=dict)

    def tick(self, step: int) -> None:
        """Note the end of step 1..steps; waits for the GPU at the window's ends only."""
        if step in (self.warmup, self.steps):
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.at[step] = time.perf_counter()

    @property
    def seconds(self) -> float:
        """From the end of the last warm-up step to the end of the last step."""
        return self.at[self.steps] - self.at[self.warmup]


class Run(NamedTuple):
    """One run's figures: real tokens a second, mean loss of all steps, peak GiB on the GPU.

    `whole` counts all steps and all that comes before the first one too: graphs that are
    captured, kernels that are compiled.
    """

    speed: float
    whole: float
    loss: float
    gib: float


def run_ours(
    sparse: bool, base: models.BaseModel, rows: list[Encoded], args: Any
) -> tuple[float, float, float]:
    """`training.fit` on fresh layers: tokens a second, of the whole run, mean loss."""
    accelerate(base)
    config = Config(seed=args.seed, batch=args.batch, rank=args.rank, alpha=2.0 * args.rank)
    block = lori.fresh_block(base.linear_shapes, config, "benchmark")
    mask = None
    if sparse:
        generator = torch.Generator().manual_seed(args.seed)
        random = {n: torch.randn(B.shape, generator=generator) for n, B in block.B.items()}
        mask = masks.calibrate_mask(random, args.sparsity, "model")
    layers = lori.trainable_layers(base.model, block, mask)
    clock = Clock(args.device, args.warmup, args.steps)
    begin = time.perf_counter()
    with lori.in_training(base, layers) as parameters:
        result = fit(base, parameters, rows, config, steps=args.steps,
                     peak=RATES[SPARSE if sparse else DENSE],
                     on_progress=lambda p: clock.tick(p.step))  # fmt: skip
    lengths = [len(row.ids) for row in rows]
    order = training_order(lengths, args.batch, args.steps, args.seed)[args.warmup :]
    tokens = sum(lengths[i] for batch in order for i in batch)
    whole = result.tokens / (clock.at[args.steps] - begin)
    return tokens / clock.seconds, whole, statistics.mean(result.losses)


@dataclass
class Ticks(TrainerCallback):
    """Tells a clock the end of every step."""

    clock: Clock

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.clock.tick(state.global_step)


def options(variant: str, device: str) -> dict[str, Any]:
    """What a variant changes in TrainingArguments."""
    chosen: dict[str, Any] = {"bf16": device == "cuda", "use_cpu": device == "cpu"}
    if variant != DEFAULT:
        chosen |= {"train_sampling_strategy": "group_by_length"}
    if variant in (BEST_AUTOCAST, BEST_BF16):
        # The filter would wait for the GPU at every step.
        chosen |= {"optim": "adamw_torch_fused", "dataloader_num_workers": 0,
                   "logging_nan_inf_filter": False, "bf16": variant == BEST_AUTOCAST,
                   "use_liger_kernel": find_spec("liger_kernel") is not None}  # fmt: skip
    return chosen


def run_trainer(
    variant: str, base: models.BaseModel, rows: list[Encoded], args: Any
) -> tuple[float, float, float]:
    """PEFT's LoRA under transformers.Trainer: as `run_ours`."""
    torch.manual_seed(args.seed)
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear",
                      task_type="CAUSAL_LM")  # fmt: skip
    model = get_peft_model(base.model, lora, autocast_adapter_dtype=variant != BEST_BF16)
    tokenizer = base.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    examples = []
    for row in rows:
        ids, n = [int(i) for i in row.ids], row.prompt_length
        examples.append({"input_ids": ids, "labels": [-100] * n + ids[n:]})
    pad = DataCollatorForSeq2Seq(tokenizer)
    tokens: list[int] = []  # by batch, in the order of the steps: there are no workers

    def collate(batch: list[dict[str, list[int]]]) -> Any:
        tokens.append(sum(len(e["input_ids"]) for e in batch))
        return pad(batch)

    clock = Clock(args.device, args.warmup, args.steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=args.steps, per_device_train_batch_size=args.batch,
            learning_rate=LORA_RATE, seed=args.seed, logging_strategy="no", save_strategy="no",
            report_to="none", disable_tqdm=True, **options(variant, args.device),
        )  # fmt: skip
        if arguments.n_gpu > 1:
            raise SystemExit("several GPUs are visible: choose one with CUDA_VISIBLE_DEVICES")
        trainer = Trainer(
            model=model, args=arguments, train_dataset=examples, data_collator=collate,
            processing_class=tokenizer, callbacks=[Ticks(clock)],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        begin = time.perf_counter()
        loss = trainer.train().training_loss
    whole = sum(tokens[: args.steps]) / (clock.at[args.steps] - begin)
    return sum(tokens[args.warmup : args.steps]) / clock.seconds, whole, loss


def run(variant: str, rows: list[Encoded], args: Any) -> Run:
    """One run on a freshly loaded base."""
    gc.collect()  # the last run's model
    base = models.load_base(args.base, PRECISION[args.device], args.device)
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if variant in (DENSE, SPARSE):
        speed, whole, loss = run_ours(variant == SPARSE, base, rows, args)
    else:
        speed, whole, loss = run_trainer(variant, base, rows, args)
    if not math.isfinite(loss):
        raise SystemExit(f"{variant}: the loss is {loss}")
    gib = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else 0.0
    return Run(speed, whole, loss, gib)


def report(task: str, runs: dict[str, list[Run]], device: str) -> None:
    """One task's medians, then ours over each peer."""
    middle = {v: statistics.median(r.speed for r in found) for v, found in runs.items()}
    print(
        f"\n{task}\n\n| variant | real tokens/s, median | least - most | whole run "
        "| mean loss | peak GiB |\n|---|---|---|---|---|---|"
    )
    for v, found in runs.items():
        speeds = [r.speed for r in found]
        peak = f"{max(r.gib for r in found):.2f}" if device == "cuda" else "-"
        loss = statistics.median(r.loss for r in found)
        whole = statistics.median(r.whole for r in found)
        print(f"| {v} | {middle[v]:,.0f} | {min(speeds):,.0f} - {max(speeds):,.0f} "
              f"| {whole:,.0f} | {loss:.3f} | {peak} |")  # fmt: skip
    ours = [v for v in (DENSE, SPARSE) if v in runs]
    print("\n| ratio over | " + " | ".join(ours) + " | goal |\n|---|" + "---|" * (len(ours) + 1))
    for peer in (v for v in runs if v not in ours):
        goal = next((g for name, g in GOALS[device].items() if peer.startswith(name)), "-")
        cells = [f"{middle[v] / middle[peer]:.2f}" for v in ours]
        print(f"| {peer} | " + " | ".join(cells) + f" | {goal} |", flush=True)


def main() -> None:
    every = (DENSE, SPARSE, DEFAULT, GROUPED, BEST_AUTOCAST, BEST_BF16)
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--base", type=Path, required=True)
    add("--device", choices=("cpu", "cuda"), default=models.best_device())
    add("--task", nargs="+", choices=TASKS, default=TASKS)
    add("--variant", nargs="+", choices=every, help="all that the device has by default")
    numbers = {"steps": 36, "warmup": 4, "rounds": 3, "batch": 32, "rank": 32, "seed": 0}
    for name, value in numbers.items():
        add(f"--{name}", type=int, default=value)
    add("--sparsity", type=float, default=0.9)
    args = parser.parse_args()
    if not 1 <= args.warmup < args.steps:
        parser.error("--warmup must be at least 1 and below --steps")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    variants = args.variant or (every if args.device == "cuda" else every[:4])
    print(heading(args.seed, device=args.device, libraries=LIBRARIES))
    print(f"{PRECISION[args.device]}; rank {args.rank}, all-linear; {args.steps} steps of "
          f"{args.batch} rows, the first {args.warmup} left out; {args.rounds} rounds")  # fmt: skip
    tokenizer = models.load_tokenizer(args.base)
    for task in args.task:
        source = read_source(DATA / task / "train.jsonl", root=DATA)
        rows = encode_rows(tokenizer, source, max_length=512, context=None)
        runs: dict[str, list[Run]] = {v: [] for v in variants}
        for _ in range(args.rounds):
            for variant in variants:
                runs[variant].append(run(variant, rows, args))
        mean = sum(len(r.ids) for r in rows) / len(rows)
        report(f"{task}: {len(rows)} rows, {mean:.1f} tokens a row", runs, args.device)


if __name__ == "__main__":
    main()
