"""An adapter merged into its base, as a model folder of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lori_manager.adapters.staging import staged_directory
from lori_manager.engine.update import LowRankUpdate


def write_full(base: Path, updates: Mapping[str, LowRankUpdate], directory: Path) -> None:
    """Write base + update in the base's own dtype, with its tokenizer.

    The sum is made in float32 and rounded once.

    Args:
        base: the base's folder.
        updates: module name -> update. Not modified.
        directory: made if missing.
    Raises:
        Conflict: `directory` is not empty. StorageFailed: it cannot be written.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with staged_directory(directory, "config.json") as staged:
        model: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
        with torch.no_grad():
            for name, update in updates.items():
                weight = model.get_submodule(name).weight
                delta = LowRankUpdate(update.A.float(), update.B.float(), update.scaling).delta()
                if delta.shape != weight.shape:
                    delta = delta.T  # GPT-2's Conv1D keeps (in_features, out_features)
                weight.copy_((weight.float() + delta).to(weight.dtype))
        model.save_pretrained(staged)
        AutoTokenizer.from_pretrained(base, trust_remote_code=False).save_pretrained(staged)
