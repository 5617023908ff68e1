"""Whether everything stored is whole, and every mask fits its A."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lori_manager.context import Context
from lori_manager.errors import DamagedObject, LoriError
from lori_manager.records import Adapter, Finding, Mask

if TYPE_CHECKING:
    from torch import Tensor


def verify(ws: Context, *, deep: bool = False) -> Iterator[Finding]:
    """Every row has its file, every file its digest, every mask fits its A.

    Args:
        deep: decode every adapter, too. A file that is what was written may still be nothing
            that this lori can read.
    """
    damaged = set()
    for finding in ws.store.verify():
        damaged.add(finding.subject)
        yield finding
    if deep:
        for adapter in ws.store.adapters():
            if adapter.ref not in damaged:
                try:
                    ws.stored(adapter)
                except LoriError as e:
                    damaged.add(adapter.ref)
                    yield Finding("damaged", adapter.ref, str(e))
    masks = [mask for task in ws.store.tasks() for mask in ws.store.masks(task.name)]
    masks = [mask for mask in masks if mask.ref not in damaged]
    if masks:
        yield from _of_masks(ws, masks, _Projections(ws, damaged))


def _of_masks(ws: Context, masks: list[Mask], known: _Projections) -> Iterator[Finding]:
    from lori_manager.engine.codec import decode_mask
    from lori_manager.engine.projection import ProjectionSpec

    for mask in masks:
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
            fits = mask.projection in known
        shapes = all(m.shape[1] == spec["rank"] for m in tensors.values()) if spec else True
        if not fits or not shapes:
            yield Finding(
                "unfit", mask.ref, "the A that it names is not the A it was calibrated on"
            )


class _Projections:
    """Digests of the A of stored adapters, of which no more are made than are asked for."""

    def __init__(self, ws: Context, damaged: set[str]) -> None:
        self._made: set[str] = set()
        self._left = self._digests(ws, damaged)

    def __contains__(self, digest: str) -> bool:
        while digest not in self._made:
            made = next(self._left, None)
            if made is None:
                return False
            self._made.add(made)
        return True

    @staticmethod
    def _digests(ws: Context, damaged: set[str]) -> Iterator[str]:
        from lori_manager.engine.projection import projection_digest
        from lori_manager.engine.weights import KindWeights

        merged = []
        for adapter in ws.store.adapters():
            if adapter.ref in damaged:
                continue
            try:
                weights = ws.stored(adapter)
            except LoriError:  # told elsewhere
                continue
            if isinstance(weights, KindWeights):
                continue
            yield from (block.projection_digest for block in weights.blocks)
            if len(weights.blocks) > 1 and weights.router is None:
                merged.append(adapter)
        for adapter in merged:
            yield projection_digest(_joined(ws, adapter))


def _joined(ws: Context, merge: Adapter) -> dict[str, Tensor]:
    """The A that continuing a merge of several trains on, and calibrates a mask for."""
    return {name: update.A for name, update in ws.weights(merge).updates().items()}
