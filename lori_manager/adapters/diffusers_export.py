"""A UNet's adapter as a directory that diffusers loads."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from lori_manager.adapters.peft_export import padded_tensors, target_names
from lori_manager.adapters.peft_format import CARD_FILE, FINGERPRINT_KEY
from lori_manager.adapters.staging import staged_directory
from lori_manager.engine.update import LowRankUpdate

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
PREFIX = "unet"
METADATA_KEY = "lora_adapter_metadata"


def write_diffusers(
    updates: Mapping[str, LowRankUpdate],
    directory: Path,
    *,
    base_name: str,
    revision: str | None,
    fingerprint: str,
    all_modules: Collection[str],
    transposed: Collection[str] = (),
    label: str = "",
) -> None:
    """Write updates as one LoRA that diffusers reads and that reproduces them.

    Factors are those of `write_peft`, under PEFT's names behind `unet.`; their rank, alpha
    and modules stand in the file's metadata as diffusers' own `save_lora_weights` writes them.
    Read it by `pipe.load_lora_weights(directory)`, or into the UNet alone by
    `unet.load_lora_adapter(directory, prefix="unet", weight_name=WEIGHTS_FILE)`.

    Args: as of `write_peft`. `transposed` is empty: a UNet has no such layers.
    Raises:
        ValueError: no updates, an unknown module, a transposed one.
        InvalidInput: values that are not finite.
        Conflict: `directory` is a file, or not empty. StorageFailed: it cannot be written.
    """
    unknown = sorted(set(updates) - set(all_modules))
    if not updates or unknown or transposed:
        raise ValueError(f"expected updates of the UNet's plain layers, got {unknown[:1]}")
    rank = max(update.rank for update in updates.values())
    tensors = padded_tensors(updates, rank, torch.float32, f"{PREFIX}.")
    told = {
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": target_names(set(updates), all_modules),
    }
    metadata = {
        "format": "pt",
        FINGERPRINT_KEY: fingerprint,
        METADATA_KEY: json.dumps({f"{PREFIX}.{k}": v for k, v in told.items()}, sort_keys=True),
    }
    with staged_directory(directory, WEIGHTS_FILE) as staged:
        (staged / CARD_FILE).write_text(
            _card(label, base_name, revision, rank, len(updates)), encoding="utf-8"
        )
        save_file(tensors, staged / WEIGHTS_FILE, metadata=metadata)


def _card(label: str, base_name: str, revision: str | None, rank: int, modules: int) -> str:
    title = " ".join(label.split()) or "LoRA adapter"
    base = " ".join((f"{base_name}, revision {revision}" if revision else base_name).split())
    return (
        "---\nlibrary_name: diffusers\ntags: [lora, lori]\n---\n\n"
        f"# {title}\n\nA LoRA of rank {rank} on {modules} modules of the UNet, written by lori.\n\n"
        f"- Base pipeline: `{base}`\n"
        "- Load: `pipe.load_lora_weights(directory)`\n"
    )
