"""Which rows of the orthogonal matrices each A was given: a small file beside the registry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from lori_manager.errors import DamagedObject
from lori_manager.store.files import private_folder, storing, write_atomic

FILE = "orthogonal.json"


def give_rows(root: Path, label: str, rank: int, used: Mapping[str, int]) -> int:
    """The first row of the label's A, chosen the first time that it asks.

    Rows are given out in order, `rank` at a time, so that no two labels share one. A
    label has the same rows whenever it asks with the same rank.

    Args:
        root: the store's folder.
        label: whose A.
        rank: how many rows.
        used: `rows_key` -> first row of every stored A: what is stored is what counts,
            should the file be lost.
    Raises:
        StorageFailed; DamagedObject: the file is not as it was written.
    """
    path, locks = root / FILE, root / "locks"
    with storing(path):
        private_folder(locks)
        with FileLock(locks / f"{FILE}.lock"):
            given = _read(path) | dict(used)
            key = rows_key(label, rank)
            if key not in given:
                ends = (row + int(known.rpartition(" ")[2]) for known, row in given.items())
                given[key] = max(ends, default=0)
                write_atomic(path, json.dumps(given, indent=1, sort_keys=True).encode())
            return given[key]


def rows_key(label: str, rank: int) -> str:
    """What rows are given to."""
    return f"{label} {rank}"


def _read(path: Path) -> dict[str, int]:
    try:
        given = json.loads(path.read_bytes())
        if any(
            type(row) is not int or not k.rpartition(" ")[2].isdigit() for k, row in given.items()
        ):
            raise ValueError("not rows by name")
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as e:
        raise DamagedObject(f"{path} is damaged ({e}): remove it, stored A's are known") from e
    return dict(given)
