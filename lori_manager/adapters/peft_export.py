"""An adapter as a directory that PEFT loads and vLLM serves."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lori_manager.adapters.peft_format import (
    CARD_FILE,
    CONFIG_FILE,
    FINGERPRINT_KEY,
    HEADS,
    KEY_PREFIX,
    WEIGHTS_FILE,
    last_part,
    named_by,
)
from lori_manager.adapters.staging import staged_directory
from lori_manager.engine.update import LowRankUpdate
from lori_manager.engine.weights import Head
from lori_manager.errors import InvalidInput

LABELS_FILE = "labels.json"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def write_peft(
    updates: Mapping[str, LowRankUpdate],
    directory: Path,
    *,
    base_name: str,
    revision: str | None,
    fingerprint: str,
    all_modules: Collection[str],
    dtype: torch.dtype = torch.float32,
    transposed: Collection[str] = (),
    label: str = "",
    overwrite: bool = False,
    head: Head | None = None,
    head_modules: Collection[str] = (),
    task_type: str | None = "CAUSAL_LM",
    magnitudes: Mapping[str, Tensor] | None = None,
) -> None:
    """Write updates as one PEFT LoRA, or DoRA, that reproduces them.

    Every module gets the largest rank (zero rows of A and columns of B) and
    lora_alpha = r, with each update's scaling multiplied into its B: no pattern
    or scaling is left that a loader could read differently. A scaling of 1 in
    float32 is kept bit for bit.

    A new directory appears whole or not at all. An existing one is filled in
    place with the configuration removed first and written last, so that a crash
    never leaves a loadable mixture of two adapters.

    Args:
        updates: module name in the causal language model -> update. Not modified.
        directory: made if missing, with its parents.
        base_name: the hub id or path that the base was loaded from.
        revision: the base's revision on the hub, if it has one.
        fingerprint: of the base's weights; kept in the weights' metadata.
        all_modules: the names of all modules of the base, containers included.
        dtype: float32, bfloat16 or float16, of the factors written.
        transposed: modules whose weight is (in, out), GPT-2's Conv1D.
        label: what the model card calls the adapter, such as `safety@3`.
        overwrite: replace an adapter that is already in `directory`; other files stay.
        head: of an encoder, written as PEFT's `modules_to_save`; `LABELS_FILE` beside it holds
            what the base must be loaded with to have as many labels.
        head_modules: names of the modules that it is made of.
        task_type: PEFT's word for what the model does; None where it has none.
        magnitudes: of every updated module's rows, (out_features,): then it is a DoRA.
    Raises:
        ValueError: no updates, an unknown module, or another dtype.
        InvalidInput: a target that is an output head; values that are not finite in `dtype`.
        Conflict: `directory` is a file, or not empty and `overwrite` is False.
        StorageFailed: the directory cannot be written.
    """
    if not updates or dtype not in _DTYPES:
        raise ValueError(
            f"expected updates and a dtype of {_DTYPES}, got {len(updates)} and {dtype}"
        )
    unknown = sorted(set(updates) - set(all_modules))
    if unknown:
        raise ValueError(f"module {unknown[0]!r} is not one of the base's {len(all_modules)}")
    heads = sorted(name for name in updates if last_part(name) in HEADS)
    if heads:
        raise InvalidInput(
            f"module {heads[0]!r} is an output head, which may share its weights with the "
            "embeddings; train without targeting it"
        )
    rank = max(update.rank for update in updates.values())
    config = {
        **shared_config("LORA", base_name, revision),
        "task_type": task_type,
        "modules_to_save": sorted(head_modules) or None,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": target_names(set(updates), all_modules),
        "fan_in_fan_out": any(name in updates for name in transposed),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": magnitudes is not None,
    }
    tensors = padded_tensors(updates, rank, dtype)
    for name, values in (magnitudes or {}).items():
        tensors[f"{KEY_PREFIX}{name}.lora_magnitude_vector"] = finite(
            values, dtype, f"lora_magnitude_vector of module {name!r}"
        )
    files = {}
    serving = f"- Serve: vLLM with `--max-lora-rank` of {rank} or more\n"
    if head is not None:
        tensors |= {KEY_PREFIX + name: finite(t, dtype, name) for name, t in head.tensors.items()}
        labels = dict(enumerate(head.labels))
        told = {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}
        files[LABELS_FILE] = json.dumps(told, indent=2) + "\n"
        serving = (
            f"- Labels: {', '.join(head.labels)}; load the base with `id2label` and `label2id` of "
            f"{LABELS_FILE}\n"
        )
    elif magnitudes is not None:
        serving = ""
    method = "LoRA" if magnitudes is None else "DoRA"
    card = model_card(
        label,
        base_name,
        revision,
        f"A {method} of rank {rank} on {len(updates)} modules",
        serving,
    )
    save_peft(
        directory, config, tensors, card, fingerprint=fingerprint, overwrite=overwrite, files=files
    )


def save_peft(
    directory: Path,
    config: Mapping[str, Any],
    tensors: dict[str, Tensor],
    card: str,
    *,
    fingerprint: str,
    overwrite: bool = False,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write configuration, tensors, model card and other `files` as one directory.

    See `write_peft`.
    """
    with staged_directory(directory, CONFIG_FILE, overwrite) as staged:
        for name, content in (files or {}).items():
            (staged / name).write_text(content, encoding="utf-8")
        (staged / CARD_FILE).write_text(card, encoding="utf-8")
        (staged / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(
            tensors, staged / WEIGHTS_FILE, metadata={"format": "pt", FINGERPRINT_KEY: fingerprint}
        )


def shared_config(peft_type: str, base_name: str, revision: str | None) -> dict[str, Any]:
    """The fields that PEFT's configurations of all types have."""
    return {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "inference_mode": True,
        "modules_to_save": None,
    }


def target_names(modules: set[str], all_modules: Collection[str]) -> list[str]:
    """`target_modules`: last parts where these mean exactly `modules`, else the full names."""
    for targets in ({last_part(name) for name in modules}, modules):
        if {name for name in all_modules if named_by(targets, name)} == modules:
            return sorted(targets)
    raise ValueError("the full name of an updated module is the ending of another module's name")


def padded_tensors(
    updates: Mapping[str, LowRankUpdate], rank: int, dtype: torch.dtype, prefix: str = KEY_PREFIX
) -> dict[str, Tensor]:
    """PEFT's names -> factors at that rank, the scaling multiplied into B.

    Args:
        prefix: of the names.
    Raises:
        InvalidInput: values that are not finite in `dtype`.
    """
    tensors = {}
    for name, update in updates.items():
        padded = update.padded(rank)
        # Folded in float64: float32 would round the scaling itself before multiplying.
        B = padded.B.detach().cpu().double() * padded.scaling
        for factor, values in (("lora_A", padded.A), ("lora_B", B)):
            tensors[f"{prefix}{name}.{factor}.weight"] = finite(
                values, dtype, f"{factor} of module {name!r}"
            )
    return tensors


def finite(values: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """A copy to write, in that dtype on the CPU.

    Raises:
        InvalidInput: a value that is not finite in it; names `what`.
    """
    # Copied: safetensors refuses memory that two tensors share, as a shared A does.
    stored = values.detach().to("cpu", dtype, copy=True).contiguous()
    if not bool(torch.isfinite(stored).all()):
        raise InvalidInput(
            f"{what} is not finite in {dtype}: choose a dtype of larger range, or train the "
            "adapter again"
        )
    return stored


def model_card(
    label: str,
    base_name: str,
    revision: str | None,
    what: str,
    serving: str = "",
    tag: str = "lora",
) -> str:
    """A model card; the base is named in its header where it looks like a hub id."""
    header = ["library_name: peft", f"tags: [{tag}, lori]"]
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base_name):
        header.insert(0, f"base_model: {json.dumps(base_name)}")
    title = " ".join(label.split()) or "LoRA adapter"
    base = f"{base_name}, revision {revision}" if revision else base_name
    return (
        "---\n" + "\n".join(header) + f"\n---\n\n# {title}\n\n"
        f"{what}, written by lori.\n\n"
        f"- Base model: `{' '.join(base.split())}`\n"
        "- Load: `PeftModel.from_pretrained(base, directory)`\n" + serving
    )
