"""Whether everything stored is whole, and every mask fits its A."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lori_manager.context import Context
from lori_manager.errors import DamagedObject
from lori_manager.records import Adapter, Finding

if TYPE_CHECKING:
    from torch import Tensor


def verify(ws: Context) -> Iterator[Finding]:
    """Every row has its file, every file its digest, every mask fits its A."""
    from lori_manager.engine.codec import decode, decode_mask
    from lori_manager.engine.projection import ProjectionSpec, projection_digest
    from lori_manager.engine.weights import KindWeights

    damaged = set()
    for finding in ws.store.verify():
        damaged.add(finding.subject)
        yield finding
    known: set[str] = set()
    merged: list[Adapter] = []
    for adapter in ws.store.adapters():
        if adapter.ref in damaged:
            continue
        try:
            weights, _ = decode(ws.store.adapter_bytes(adapter))
        except DamagedObject as e:
            yield Finding("damaged", adapter.ref, str(e))
            continue
        if isinstance(weights, KindWeights):
            continue
        for block in weights.blocks:
            known.add(block.projection_digest)
        if len(weights.blocks) > 1 and weights.router is None:
            merged.append(adapter)
    for task in ws.store.tasks():
        for mask in ws.store.masks(task.name):
            if mask.ref in damaged:
                continue
            try:
                tensors, meta = decode_mask(ws.store.mask_bytes(mask))
            except DamagedObject as e:
                yield Finding("damaged", mask.ref, str(e))
                continue
            spec = meta.get("projection")
            if spec is not None:
                made = ProjectionSpec.from_json(spec, meta["in_features"])
                fits = made.digest == mask.projection
            elif "digest" in meta:
                fits = meta["digest"] == mask.projection
            else:  # a file of before the digest was kept in it
                while mask.projection not in known and merged:
                    known.add(projection_digest(_joined(ws, merged.pop())))
                fits = mask.projection in known
            shapes = all(m.shape[1] == spec["rank"] for m in tensors.values()) if spec else True
            if not fits or not shapes:
                yield Finding(
                    "unfit", mask.ref, "the A that it names is not the A it was calibrated on"
                )


def _joined(ws: Context, merge: Adapter) -> dict[str, Tensor]:
    """The A that continuing a merge of several trains on, and calibrates a mask for."""
    return {name: update.A for name, update in ws.weights(merge).updates().items()}
