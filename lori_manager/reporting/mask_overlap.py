"""How much the tasks' masks share, held as packed bits: a mask of 44 million entries is 5.5 MB."""

from __future__ import annotations

import numpy as np

from lori_manager.reporting.contents import Mask, MaskOverlap
from lori_manager.reporting.source import Source

MOST = 12  # tasks; every further one is another file to unpack


def mask_overlap(source: Source) -> MaskOverlap | None:
    """The overlap of each two tasks' newest masks; None where fewer than two have one.

    At most 12 masks are read, those of the newest tasks.
    Raises:
        DamagedObject: a mask's file is not what was written.
    """
    found = source.newest_masks()
    if len(found) < 2:
        return None
    from lori_manager.engine.codec import decode_mask  # torch: only where there are masks

    chosen = list(reversed(found[:MOST]))
    packed: list[dict[str, tuple[tuple[int, ...], np.ndarray]]] = []
    for mask in chosen:
        tensors, _ = decode_mask(source.store.mask_bytes(mask))
        packed.append(
            {name: (tuple(m.shape), np.packbits(m.numpy())) for name, m in tensors.items()}
        )

    def shared(i: int, j: int) -> float | None:
        a, b = packed[i], packed[j]
        if {n: shape for n, (shape, _) in a.items()} != {n: shape for n, (shape, _) in b.items()}:
            return None
        both = sum(int(np.bitwise_count(a[n][1] & b[n][1]).sum()) for n in a)
        smaller = min(chosen[i].kept, chosen[j].kept)
        return both / smaller if smaller else 0.0

    size = len(chosen)
    shares: list[list[float | None]] = [[1.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i):
            shares[i][j] = shares[j][i] = shared(i, j)
    return MaskOverlap(
        tuple(Mask(m.ref, m.kept, m.total, m.projection) for m in chosen),
        tuple(map(tuple, shares)),
        len(found) - size,
    )
