"""Checkpoints of a training: folders that are whole or not there, of which the last two are kept.

`step-000000012/` holds `tensors.safetensors` and `manifest.json`, which tells the step, plain
facts, the size and SHA-256 of the tensors' file and a SHA-256 of all that. It is written aside,
flushed and renamed. Nothing in it is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lori_manager.errors import DamagedObject
from lori_manager.records import JSON
from lori_manager.store.files import TEMPORARY, private_folder, storing, sync_folder, write_synced

KEPT = 2  # so that where the newest is damaged, there is the one before
MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"
VERSION = 1
_STEP = re.compile(r"step-([0-9]{9})")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """The state after so many steps: tensors by name, on the CPU, and plain JSON."""

    step: int
    tensors: Mapping[str, Tensor]
    facts: JSON


def steps(folder: Path) -> list[int]:
    """The steps of which `folder` has a checkpoint, whole or not, oldest first."""
    if not folder.is_dir():
        return []
    found = (_STEP.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: JSON) -> None:
    """Add the state after `step` and prune: on return it survives a power cut.

    Args:
        folder: of this training alone, made where it is missing; its parent must exist.
        step: from 1.
        tensors: any dtype and device; not changed.
        facts: plain JSON.
    Raises:
        StorageFailed: full, read-only or failing disk.
    """
    data = save_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    manifest = {
        "version": VERSION,
        "step": step,
        "facts": facts,
        "bytes": len(data),
        "tensors": hashlib.sha256(data).hexdigest(),
    }
    text = json.dumps(manifest | {"manifest": _digest(manifest)})
    aside = folder / f"{TEMPORARY}{secrets.token_hex(8)}"
    with storing(folder):
        private_folder(folder)
        _clear(folder)
        aside.mkdir(mode=0o700)
        try:
            write_synced(aside / TENSORS, (data,))
            write_synced(aside / MANIFEST, (text.encode(),))
            sync_folder(aside)
            _remove(_place(folder, step))
            aside.rename(_place(folder, step))
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        sync_folder(folder)
        for old in steps(folder)[:-KEPT]:
            _remove(_place(folder, old))


def newest(folder: Path, check: Callable[[Checkpoint], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole and that `check` takes; None where there is none.

    Those passed over are set apart as `step-....damaged`, which is told in the log.
    Args:
        check: raises ValueError or KeyError for a state of something else.
    Raises:
        StorageFailed: the disk fails.
    """
    found = steps(folder)
    while found:
        path = _place(folder, found.pop())
        try:
            checkpoint = _read(path)
            check(checkpoint)
        except (DamagedObject, ValueError, KeyError) as e:
            apart = path.with_name(f"{path.name}.damaged")
            with storing(folder):
                _remove(apart)
                path.rename(apart)
                sync_folder(folder)
            then = f"going back to step {found[-1]}" if found else "starting again"
            logger.warning(
                "checkpoint unusable (%s): set aside as %s, %s", e, f"{folder.name}/{apart.name}",
                then,
            )  # fmt: skip
        else:
            return checkpoint
    return None


def discard(folder: Path) -> None:
    """Remove all checkpoints: what they led to is stored."""
    shutil.rmtree(folder, ignore_errors=True)


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}"


def _read(path: Path) -> Checkpoint:
    """Raises DamagedObject where anything is not what was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        told = manifest.pop("manifest")
        if told != _digest(manifest):
            raise ValueError("its manifest is not what was written")
        if manifest["version"] != VERSION:
            raise ValueError(f"it has version {manifest['version']}, expected {VERSION}")
        data = (path / TENSORS).read_bytes()
        if hashlib.sha256(data).hexdigest() != manifest["tensors"]:
            raise ValueError("its tensors are not what was written")
        if _place(path.parent, manifest["step"]) != path:
            raise ValueError(f"it is of step {manifest['step']}")
        return Checkpoint(manifest["step"], load_tensors(data), manifest["facts"])
    except OSError as e:
        raise DamagedObject(f"it cannot be read: {e.strerror or e}") from e
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise DamagedObject(str(e)) from e


def _digest(manifest: JSON) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _remove(path: Path) -> None:
    """Take a folder away at once: renamed first, so that no half of it is ever taken for whole."""
    if path.exists():
        gone = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
        path.rename(gone)
        shutil.rmtree(gone)


def _clear(folder: Path) -> None:
    """Remove what a killed process left half written; only one trains in a folder at a time."""
    for left in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(left, ignore_errors=True)
