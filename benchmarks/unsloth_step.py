# ruff: noqa: PTH100, PTH103, PTH118, PTH123, PTH202, PTH208, BLE001, E501
"""Unsloth's training step at 8B Llama shapes: one JSON line a shape, as train_step.py's `work`.

    pip install unsloth==2026.10.9 && python benchmarks/unsloth_step.py

A random bf16 Llama (8 layers, the shapes of `build` in train_step.py) is written to a temporary
folder, loaded with `FastLanguageModel.from_pretrained`, given rank-32 LoRA on the seven
projections with `FastLanguageModel.get_peft_model`, and trained with AdamW; 16 x 512 and
4 x 2048 random tokens, the loss at every position, no gradient checkpointing.

Decided: the base is bf16 and the LoRA matrices are float32, as Unsloth makes them (its
`prepare_model_for_training` upcasts every lora_A/lora_B of a bf16 model to float32). For such a
model Unsloth's patched trainers set `bf16=True` and ACCELERATE_MIXED_PRECISION=bf16
(unsloth/models/rl.py, mixed_precision_dtype == 'float32'), so accelerate wraps the *forward*
(not the backward) in bf16 autocast and converts the outputs to float32. The kernels cast the
LoRA matrices themselves, so autocast is not needed for correctness; it is on here because it is
what a user of Unsloth's trainer gets. UNSLOTH_STEP_AUTOCAST=0 turns it off.

Environment, all optional, each with UNSLOTH_STEP_ before it: LAYERS HIDDEN INTER HEADS KV VOCAB
MAXPOS RANK SHAPES (16x512,4x2048) WARMUP (8) REPEATS (9) AUTOCAST (1) FRESH (1: each shape in a
process of its own, as Unsloth tunes and compiles per process; 0: both in one) ACCOUNT (1: kernels
of a step too) NAME (a label) TMP (a folder for the model and the compile caches; /tmp).
"""

from __future__ import annotations

import os
import sys


def flag(name: str, default: str) -> str:
    return os.environ.get("UNSLOTH_STEP_" + name, default)


def number(name: str, default: int) -> int:
    return int(flag(name, str(default)))


TMP = flag("TMP", "/tmp")
for _name, _value in {
    # nothing reaches for the network
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
    "DISABLE_TELEMETRY": "1", "WANDB_DISABLED": "true",
    "UNSLOTH_DISABLE_AUTO_UPDATES": "1",
    # caches stay in TMP
    "UNSLOTH_COMPILE_LOCATION": os.path.join(TMP, "unsloth_compiled_cache"),
    "TORCHINDUCTOR_CACHE_DIR": os.path.join(TMP, "uns_inductor"),
    "TRITON_CACHE_DIR": os.path.join(TMP, "uns_triton"),
    "HF_HOME": os.path.join(TMP, "uns_hf"),
    "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
}.items():  # fmt: skip
    os.environ.setdefault(_name, _value)
os.environ.pop("HF_TOKEN", None)

import json  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402

LAYERS = number("LAYERS", 8)
RANK = number("RANK", 32)
VOCAB = number("VOCAB", 128_256)
MAXPOS = number("MAXPOS", 8192)
SHAPES = [tuple(map(int, s.split("x"))) for s in flag("SHAPES", "16x512,4x2048").split(",")]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BEGAN = time.time()


def say(*parts: object) -> None:
    print(f"[{time.time() - BEGAN:7.1f} s]", *parts, file=sys.stderr, flush=True)


def batches_of(rows: int, length: int, device) -> list:
    import torch

    generator = torch.Generator(device=device).manual_seed(rows)
    return [
        torch.randint(0, VOCAB, (rows, length), device=device, generator=generator)
        for _ in range(3)
    ]


def make(folder: str) -> None:
    """Write the random model and a small tokenizer; runs in a process without Unsloth."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    # The ids that patch_tokenizer and the model's config will look for. The tokenizer is smaller
    # than the vocabulary of the model, so the embeddings are not resized.
    words = ["<unk>", "<s>", "</s>", "<pad>"] + [chr(c) for c in range(33, 127)]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", model_max_length=MAXPOS, padding_side="right",
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=number("HIDDEN", 4096), intermediate_size=number("INTER", 14336),
        num_hidden_layers=LAYERS, num_attention_heads=number("HEADS", 32),
        num_key_value_heads=number("KV", 8), vocab_size=VOCAB, max_position_embeddings=MAXPOS,
        rope_theta=500_000.0, tie_word_embeddings=False, use_cache=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(where):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.eval().save_pretrained(folder, max_shard_size="4GB")
    # What the unpatched model's loss on the first batch of each shape is, to compare with.
    expected = {}
    for rows, length in SHAPES:
        ids = batches_of(rows, length, where)[1]
        with torch.no_grad():
            parts = [model(input_ids=i, labels=i).loss.float() for i in ids.split(1)]
        expected[f"{rows}x{length}"] = sum(parts).item() / rows
    with open(os.path.join(folder, "expected_loss.json"), "w") as f:
        json.dump(expected, f)
    say("losses of the unpatched model", expected)
    size = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder))
    say(f"wrote {size / 2**30:.2f} GiB, rope {getattr(config, 'rope_parameters', None)}")


def load(folder: str):
    """The model as an Unsloth user has it, and its trainable parameters."""
    from unsloth import FastLanguageModel  # isort: skip  (before transformers)
    import torch

    more = {"device_map": {"": flag("DEVICE", "")}} if flag("DEVICE", "") else {}  # for tests
    model, _ = FastLanguageModel.from_pretrained(
        folder, dtype=torch.bfloat16, load_in_4bit=False, max_seq_length=2048,
        use_gradient_checkpointing=False, **more,
    )  # fmt: skip
    say(f"loaded as {type(model).__name__}")
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=64, lora_dropout=0, bias="none", target_modules=PROJECTIONS,
        use_gradient_checkpointing=False, random_state=3407,
    )  # fmt: skip
    model.for_training(use_gradient_checkpointing=False)  # what Unsloth's trainer calls first
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = {str(p.dtype) for p in model.parameters() if not p.requires_grad}
    layer = model.base_model.model.model.layers[0]
    say(f"{sum(p.numel() for p in trained):,} trained in {({str(p.dtype) for p in trained})}, "
        f"frozen {frozen}, on {({str(p.device) for p in model.parameters()})}")  # fmt: skip
    say(f"layer forward {getattr(layer.forward, '__qualname__', layer.forward)}, "
        f"mlp {getattr(layer.mlp.forward, '__qualname__', layer.mlp.forward)}, "
        f"apply_qkv {getattr(getattr(layer.self_attn, 'apply_qkv', None), '__qualname__', None)}, "
        f"checkpointing {getattr(model, 'is_gradient_checkpointing', None)}")  # fmt: skip
    try:
        from unsloth.models import _utils
        from unsloth.models._block_compile import __file__ as _  # noqa: F401
        from unsloth.utils import attention_dispatch

        say(f"xformers {_utils.xformers_version}, flash-attn {_utils.HAS_FLASH_ATTENTION}, "
            f"attention backend {attention_dispatch.select_attention_backend(False)}")  # fmt: skip
    except Exception as error:  # a report only
        say("no report of the attention backend:", error)
    wrong = {str(p.dtype) for p in trained} - {"torch.float32", "torch.bfloat16"}
    if wrong or len(trained) != LAYERS * 7 * 2:
        raise SystemExit(f"{len(trained)} trained tensors, dtypes {wrong}: not what was asked for")
    return model, trained


def account(step, steps: int = 3, most: int = 45) -> None:
    """Print where each millisecond of a step goes, kernel by kernel (train_step.py's)."""
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
    sys.stdout.flush()


def work(folder: str, shapes: list[tuple[int, int]]) -> None:
    model, trained = load(folder)
    import torch

    cuda = torch.cuda.is_available() and trained[0].is_cuda
    device = trained[0].device
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    autocast = flag("AUTOCAST", "1") == "1"
    with open(os.path.join(folder, "expected_loss.json")) as f:
        expected = json.load(f)
    for at, (rows, length) in enumerate(shapes):
        batches = batches_of(rows, length, device)
        turn = 0
        losses = []

        def step(batches: list = batches, losses: list = losses) -> None:
            nonlocal turn
            turn += 1
            ids = batches[turn % len(batches)]
            # as accelerate's prepare_model does: the forward alone under autocast
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                loss = model(input_ids=ids, labels=ids).loss
            loss.float().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())

        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found = {"variant": flag("NAME", "unsloth"), "layers": LAYERS, "shape": [rows, length]}
        try:
            times = []
            warmup, repeats = number("WARMUP", 8), number("REPEATS", 9)
            for i in range(warmup):
                clock = time.time()
                step()
                if cuda:
                    torch.cuda.synchronize()
                if i == 0 and at == 0:  # B is zero still: this is the base model's loss
                    want, got = expected[f"{rows}x{length}"], losses[0].item()
                    note = "agrees" if abs(want - got) < 0.02 else "DIFFERS: is the step right?"
                    say(f"first loss {got:.4f}, of the unpatched model {want:.4f}: {note}")
                say(
                    f"{rows} x {length}: warm-up step {i + 1}, {(time.time() - clock) * 1e3:.1f} ms"
                )
            if cuda:  # the peak of compiling and tuning is not the step's
                warm = torch.cuda.max_memory_allocated() / 2**30
                say(f"peak in warm-up {warm:.2f} GiB")
                torch.cuda.reset_peak_memory_stats()
            for _ in range(repeats):
                if cuda:
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record()
                    step()
                    end.record()
                    torch.cuda.synchronize()
                    times.append(begin.elapsed_time(end))
                else:
                    clock = time.perf_counter()
                    step()
                    times.append((time.perf_counter() - clock) * 1e3)
            say("losses", [round(x.item(), 4) for x in losses])
            if not all(torch.isfinite(x).item() for x in losses):
                raise SystemExit("the loss is not finite: the step measures nothing")
            times.sort()
            found |= {"median": times[len(times) // 2], "least": times[0], "most": times[-1],
                      "peak": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0}  # fmt: skip
        except torch.OutOfMemoryError:
            traceback.print_exc()
            found["median"] = None
        print(json.dumps(found), flush=True)
        if cuda and flag("ACCOUNT", "0") == "1":
            account(step)


def guarded(function, *args) -> int:
    try:
        function(*args)
        return 0
    except BaseException as error:  # a full traceback whatever it was
        if isinstance(error, SystemExit) and error.code in (0, None):
            return 0
        traceback.print_exc()
        sys.stderr.flush()
        sys.stdout.flush()
        return 1


def main() -> int:
    if len(sys.argv) > 2 and sys.argv[1] == "--make":
        return guarded(make, sys.argv[2])
    if len(sys.argv) > 2 and sys.argv[1] == "--work":
        shapes = [tuple(map(int, s.split("x"))) for s in sys.argv[3].split(",")]
        return guarded(work, sys.argv[2], shapes)
    os.makedirs(TMP, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="uns_model_", dir=TMP)
    try:
        failed = subprocess.run([sys.executable, "-u", __file__, "--make", folder]).returncode
        if failed:
            print(f"making the model failed: {failed}", flush=True)
            return 1
        text = ["x".join(map(str, s)) for s in SHAPES]
        groups = text if flag("FRESH", "1") == "1" else [",".join(text)]
        for group in groups:
            # Unsloth writes into the working directory now and then; let that be TMP.
            script = os.path.abspath(__file__)
            done = subprocess.run(
                [sys.executable, "-u", script, "--work", folder, group], cwd=TMP,
            )  # fmt: skip
            if done.returncode:
                print(f"unsloth {group} failed: {done.returncode}", flush=True)
                failed = 1
        return failed
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
