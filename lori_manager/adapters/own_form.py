"""Adapters that PEFT has no form for, as a folder of our own: docs/kinds.md describes it.

lori_adapter.json says what it is and of which base, adapter.safetensors holds the tensors by the
names that the kind gives them. The reading side trusts neither.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lori_manager import foreign
from lori_manager.adapters.peft_format import CARD_FILE, FINGERPRINT_KEY, FLOATS
from lori_manager.adapters.staging import staged_directory
from lori_manager.engine.codec import DIMENSIONS
from lori_manager.engine.weights import KindWeights
from lori_manager.errors import DamagedObject, ImportRefused
from lori_manager.kinds import KINDS

JSON_FILE = "lori_adapter.json"
TENSORS_FILE = "adapter.safetensors"
FORMAT = "lori-kind"
VERSION = 1
_FIELDS = frozenset({"format", "version", "kind", "source", "options", "base"})


def write_own(weights: KindWeights, directory: Path, told: Mapping[str, Any]) -> None:
    """Write the folder.

    Args:
        weights: as stored. Not modified.
        directory: made if missing; whole or without its lori_adapter.json.
        told: `base_name`, `revision`, `fingerprint` and `label` count here, see
            `KindModule.write`.
    Raises:
        Conflict, StorageFailed: see `staging.staged_directory`.
    """
    doc = {
        "format": FORMAT,
        "version": VERSION,
        "kind": weights.kind,
        "source": KINDS[weights.kind].source,
        "options": dict(weights.options),
        "base": {key: told[key] for key in ("base_name", "revision", "fingerprint")},
    }
    tensors = {n: t.detach().cpu().clone().contiguous() for n, t in weights.tensors.items()}
    metadata = {"format": "pt", FINGERPRINT_KEY: told["fingerprint"]}
    with staged_directory(directory, JSON_FILE) as staged:
        (staged / CARD_FILE).write_text(_card(weights, told), encoding="utf-8")
        (staged / JSON_FILE).write_text(json.dumps(doc, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, staged / TENSORS_FILE, metadata=metadata)


def read_own(
    directory: Path, *, base_names: Collection[str], fingerprint: str, assume_base: bool = False
) -> tuple[KindWeights, dict[str, Any]]:
    """The adapter of such a folder, and its lori_adapter.json.

    Whether its tensors fit the base is for the kind to say.

    Args:
        directory: holds both files.
        base_names: hub id and paths that this base goes by.
        fingerprint: of this base's weights.
        assume_base: take a folder that does not tell its base's fingerprint.
    Raises:
        ImportRefused: of another base, of a kind or a version that this lori has not.
        DamagedObject: a file is cut short or malformed, or holds values that are not finite.
    """
    try:
        doc = _read_json(directory / JSON_FILE)
        _check_base(doc["base"], base_names, fingerprint, assume_base)
        return KindWeights(doc["kind"], doc["options"], _read_tensors(directory)), doc
    except (ImportRefused, DamagedObject) as e:
        raise type(e)(f"{directory}: {e}") from e


def _read_json(path: Path) -> dict[str, Any]:
    try:
        doc = foreign.read_json(foreign.file_inside(path.parent, path.name))
    except OSError as e:
        raise ImportRefused(f"{path.name} cannot be read: {e.strerror or e}") from e
    except foreign.Malformed as e:
        raise DamagedObject(f"{path.name} is not usable: {e}; copy it again") from e
    if not isinstance(doc, dict) or doc.get("format") != FORMAT:
        raise ImportRefused(f"{path.name} must say that its format is {FORMAT!r}")
    if type(doc.get("version")) is not int or doc["version"] != VERSION:
        raise ImportRefused(
            f"{path.name} is of version {str(doc.get('version'))[:20]!r}, this lori reads "
            f"{VERSION}: update lori"
        )
    kind = doc.get("kind")
    row = KINDS.get(kind) if isinstance(kind, str) else None
    if row is None or not row.own_form:
        known = ", ".join(k.name for k in KINDS.values() if k.own_form)
        raise ImportRefused(f"kind {str(kind)[:40]!r} has no such folder; these may have: {known}")
    for key in ("options", "base"):
        if not isinstance(doc.get(key), dict):
            raise ImportRefused(f"`{key}` of {path.name} must be an object")
    unknown = doc.keys() - _FIELDS
    if unknown:
        raise ImportRefused(f"{path.name} has the unknown field {min(unknown)[:40]!r}: update lori")
    return doc


def _check_base(
    base: Mapping[str, Any], names: Collection[str], fingerprint: str, assume: bool
) -> None:
    recorded = base.get("fingerprint")
    if recorded is not None and recorded != fingerprint:
        raise ImportRefused(
            f"made for a base with fingerprint {str(recorded)[:20]!r}, this base has "
            f"{fingerprint[:20]}: import it into a workspace of its own base"
        )
    if recorded is None and base.get("base_name") not in names and not assume:
        raise ImportRefused(
            "it does not say of which base it is: import it into a workspace of that base, or "
            "assume the base if both are the same weights"
        )


def _read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    try:
        path = foreign.file_inside(directory, TENSORS_FILE)
        header, _ = foreign.read_header(path)
    except (foreign.Malformed, OSError) as e:
        raise DamagedObject(f"{TENSORS_FILE} cannot be read: {e}; copy it again") from e
    dtypes = {entry.dtype for entry in header.values()}
    if len(dtypes) != 1 or not dtypes.issubset(FLOATS):
        raise ImportRefused(
            f"{TENSORS_FILE} must hold tensors of one dtype of {', '.join(FLOATS)}, got "
            f"{', '.join(sorted(dtypes)) or 'none'}"
        )
    for name, entry in header.items():
        if not 1 <= len(entry.shape) <= DIMENSIONS or 0 in entry.shape:
            raise ImportRefused(
                f"tensor {name[:80]!r} of {TENSORS_FILE} has the shape {list(entry.shape)}: "
                f"expected values in 1 to {DIMENSIONS} dimensions"
            )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in sorted(header)}
    except (SafetensorError, OSError) as e:
        raise DamagedObject(f"{TENSORS_FILE} cannot be read: {e}; copy it again") from e
    for name, t in tensors.items():
        if not bool(torch.isfinite(t).all()):
            raise DamagedObject(
                f"tensor {name[:80]!r} has values that are not finite: take an earlier export"
            )
    return tensors


def _card(weights: KindWeights, told: Mapping[str, Any]) -> str:
    row = KINDS[weights.kind]
    base = told["base_name"]
    header = (
        f"base_model: {json.dumps(base)}\n" if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) else ""
    )
    title = " ".join(str(told["label"]).split()) or f"{row.title} adapter"
    return (
        f"---\n{header}tags: [lori]\n---\n\n# {title}\n\n"
        f"An adapter of kind {row.title} ({row.source}), written by lori.\n\n"
        f"- Base model: `{' '.join(base.split())}`\n"
        f"- Load: `lori import` in a workspace of that base\n"
    )
