"""A folder with an adapter of any form that lori reads, as an adapter of ours."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lori_manager.adapters import dora, prefix
from lori_manager.adapters.kind import module_of
from lori_manager.adapters.own_form import JSON_FILE, read_own
from lori_manager.adapters.peft_import import read_config, read_peft
from lori_manager.engine.weights import KindWeights, Stored
from lori_manager.errors import DamagedObject, ImportRefused
from lori_manager.models import Skeleton


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        weights: as they will be stored.
        method: what made it: a kind's name, or `peft-lora`.
        config: what the folder says of it.
        notes: what the user should hear, one sentence each.
    """

    weights: Stored
    method: str
    config: dict[str, Any]
    notes: tuple[str, ...] = ()


def read_adapter(
    directory: Path,
    skeleton: Skeleton,
    *,
    folder: Path,
    base_names: Collection[str],
    fingerprint: str,
    assume_base: bool = False,
) -> Found:
    """Read a folder of our own form, or PEFT's LoRA, DoRA, IA3 or prefix tuning.

    Args:
        directory: the folder.
        skeleton: the base's modules.
        folder: its weights, read where what the folder says needs them.
        base_names: hub id and paths that this base goes by.
        fingerprint: of this base's weights.
        assume_base: accept an adapter whose base cannot be told or has another name.
    Raises:
        ImportRefused, DamagedObject, WrongBase: says what to do.
    """
    told: dict[str, Any] = {
        "base_names": base_names,
        "fingerprint": fingerprint,
        "assume_base": assume_base,
    }
    if (directory / JSON_FILE).is_file():
        own, doc = read_own(directory, **told)
        module_of(own.kind).check(skeleton.model, own)
        return Found(own, own.kind, {"lori": doc})
    if _peft_type(directory) == prefix.PEFT_TYPE:
        learned, config, notes = prefix.read(directory, skeleton.model, **told)
        return Found(learned, prefix.KIND, {"peft": config}, notes)
    found = read_peft(directory, shapes=skeleton.linear_shapes, **told)
    weights: Stored = found.weights
    if found.magnitudes is not None and not isinstance(weights, KindWeights):
        weights = dora.from_magnitudes(weights, found.magnitudes, folder)
    method = weights.kind if isinstance(weights, KindWeights) else "peft-lora"
    return Found(weights, method, {"peft": found.config}, tuple(found.notes))


def _peft_type(directory: Path) -> object:
    """What a PEFT directory says it is; None where it says nothing that can be read."""
    try:
        return read_config(directory).get("peft_type")
    except (ImportRefused, DamagedObject):
        return None
