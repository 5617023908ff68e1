"""What an adapter's stored form needs to know of the base's weights, read from its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lori_manager.adapters.checkpoint import DTYPES, Part, plan_full
from lori_manager.engine.update import LowRankUpdate
from lori_manager.errors import WrongBase
from lori_manager.store.files import storing


def row_norms(folder: Path, updates: Mapping[str, LowRankUpdate]) -> dict[str, Tensor]:
    """||W + scaling B A|| of each row of every updated module, (out_features,) float64.

    Args:
        folder: the base's. One weight at a time is in memory.
        updates: module name -> update. Not modified.
    Raises:
        WrongBase, NotFound, InvalidInput: see `checkpoint.plan_full`.
    """
    names = {id(update): name for name, update in updates.items()}
    found = {}
    for shard in plan_full(folder, updates).shards:
        for part in shard.parts:
            if isinstance(part.update, LowRankUpdate):
                W = _weight(part)
                W += part.update.B.float() @ (part.update.A.float() * part.update.scaling)
                found[names[id(part.update)]] = torch.linalg.norm(W.double(), dim=1)
    return found


def _weight(part: Part) -> Tensor:
    """A module's weight, (out_features, in_features) float32 of its own memory."""
    source = part.source
    with storing(source.file), source.file.open("rb") as f:
        f.seek(source.begin)
        data = bytearray(f.read(source.nbytes))
    if len(data) != source.nbytes:
        raise WrongBase(f"{source.file} was cut short while it was read: fetch it again")
    W = torch.frombuffer(data, dtype=DTYPES[source.dtype]).view(source.shape)
    W = W.t() if part.transposed else W
    return W.to(torch.float32, copy=True)
