"""A routed adapter as a directory: a PEFT directory a member, and the router beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lori_manager import foreign
from lori_manager.adapters.peft_config import shown
from lori_manager.adapters.peft_export import write_peft
from lori_manager.adapters.peft_format import CARD_FILE, FINGERPRINT_KEY
from lori_manager.adapters.peft_import import read_peft
from lori_manager.adapters.staging import staged_directory
from lori_manager.engine.router import Router
from lori_manager.engine.update import LowRankUpdate
from lori_manager.engine.weights import AdapterWeights, routed_adapter
from lori_manager.errors import DamagedObject, ImportRefused

ROUTER_CONFIG = "router.json"
ROUTER_FILE = "router.safetensors"
RESERVED = frozenset({ROUTER_CONFIG, ROUTER_FILE, CARD_FILE.casefold()})
VERSION = 1
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")

_CARD = """# {label}

One of {count} LoRAs acts on each input, chosen by a router; written by lori.

- Base model: `{base}`
- In Python:

  ```python
  from lori_manager import load_routed

  model = load_routed("this directory", "the base's folder or hub id")
  model.generate(["a prompt"], max_new_tokens=32)
  ```

- Each of {names} is a PEFT directory of its own: `PeftModel.from_pretrained(base, directory)`,
  or a `--lora-modules` entry of vLLM.
- Elsewhere: take the base's states before `{reads}`, all adapters off, scale each token's to
  length 1, and put the mean over the prompt and the last token's one behind the other: x. The
  member is the largest entry of `weights x + bias` in `{file}`, counted in the order of
  `members` in `{config}`.
"""


def write_routed(
    members: Mapping[str, Mapping[str, LowRankUpdate]],
    router: Router,
    directory: Path,
    *,
    base_name: str,
    revision: str | None,
    fingerprint: str,
    all_modules: Collection[str],
    transposed: Collection[str] = (),
    label: str = "",
) -> None:
    """Write every member as `write_peft` does, and the router.

    Args:
        members: name -> module name -> update, in the router's order. Not modified.
        router: of them.
        directory, base_name, revision, fingerprint, all_modules, transposed, label: as for
            `write_peft`.
    Raises:
        InvalidInput, Conflict, StorageFailed: as `write_peft`.
    """
    config = {
        "version": VERSION,
        "members": list(members),
        "base_model_name_or_path": base_name,
        "revision": revision,
        **router.report(),
    }
    card = _CARD.format(
        label=label or "Routed LoRAs",
        count=len(members),
        base=base_name,
        names=", ".join(f"`{name}`" for name in members),
        reads=router.reads,
        file=ROUTER_FILE,
        config=ROUTER_CONFIG,
    )
    with staged_directory(directory, ROUTER_CONFIG) as staged:
        for name, updates in members.items():
            write_peft(
                updates,
                staged / name,
                base_name=base_name,
                revision=revision,
                fingerprint=fingerprint,
                all_modules=all_modules,
                transposed=transposed,
                label=f"{label}, {name}" if label else name,
            )
        tensors = {"weights": router.weights.contiguous(), "bias": router.bias.contiguous()}
        metadata = {"format": "pt", FINGERPRINT_KEY: fingerprint}
        save_file(tensors, staged / ROUTER_FILE, metadata=metadata)
        (staged / CARD_FILE).write_text(card, encoding="utf-8")
        (staged / ROUTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_routed(
    directory: Path, *, shapes: Mapping[str, tuple[int, int]], fingerprint: str
) -> tuple[AdapterWeights, list[str]]:
    """Inverse of `write_routed`.

    Args:
        directory: as it was written, or a copy.
        shapes: full name -> (out_features, in_features) of every linear module of the base.
        fingerprint: of the base's weights.
    Returns:
        The routed adapter, and its members' names.
    Raises:
        ImportRefused: not such a directory, or one of another base.
        DamagedObject: a file is malformed.
    """
    try:
        config = foreign.read_json(foreign.file_inside(directory, ROUTER_CONFIG))
        path = foreign.file_inside(directory, ROUTER_FILE)
        header, _ = foreign.read_header(path)
        if set(header) != {"weights", "bias"} or {t.dtype for t in header.values()} != {"F32"}:
            raise foreign.Malformed(f"{ROUTER_FILE} must hold weights and bias in F32 alone")
        tensors = load_file(path)
    except OSError as e:
        raise ImportRefused(f"{directory} holds no routed adapter: {e.strerror or e}") from e
    except (foreign.Malformed, SafetensorError) as e:
        raise DamagedObject(f"{directory}: the router is malformed: {e}; copy it again") from e
    try:
        router, names = _router(config, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise DamagedObject(f"{directory}: the router is malformed: {e}; copy it again") from e
    members = []
    for name in names:
        found = read_peft(directory / name, shapes=shapes, base_names=(), fingerprint=fingerprint)
        if not isinstance(found.weights, AdapterWeights) or found.magnitudes is not None:
            raise ImportRefused(f"{directory / name} is no plain LoRA, and a routed member must be")
        members.append(found.weights)
    return routed_adapter(members, router), names


def _router(config: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[Router, list[str]]:
    """What the files say; ValueError and its like where they do not fit together."""
    if config["version"] != VERSION:
        raise ValueError(f"version {shown(config['version'])}, this lori reads {VERSION}")
    names, reads, held_out = config["members"], config["reads"], config["held_out"]
    if not isinstance(names, list) or not isinstance(held_out, list):
        raise ValueError("`members` and `held_out` must be lists")
    if any(type(n) is not int or not 0 <= n < 2**31 for row in held_out for n in row):
        raise ValueError("`held_out` must hold counts")
    for name in names:
        if not isinstance(name, str) or not _FOLDER.fullmatch(name):
            raise ValueError(f"{shown(name)} is no folder's name")
    weights, bias = tensors["weights"], tensors["bias"]
    if not isinstance(reads, str) or not reads or not reads.isprintable():
        raise ValueError("it does not say what it reads")
    if not bool(torch.isfinite(weights).all() and torch.isfinite(bias).all()):
        raise ValueError("it is not finite")
    router = Router(reads, weights, bias, tuple(map(tuple, held_out)))
    if len(names) != router.members:
        raise ValueError(f"{len(names)} names for {router.members} members")
    return router, names
