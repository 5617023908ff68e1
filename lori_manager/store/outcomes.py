"""Outcomes per row as bytes: one bit each where all are right or wrong, else float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lori_manager.errors import DamagedObject

if TYPE_CHECKING:
    import numpy as np

BITS = "bits"
FLOAT32 = "float32"


def encode(outcomes: np.ndarray) -> tuple[str, bytes]:
    """(encoding, bytes) of a (rows,) array; NaN, for not measured, makes it float32.

    Raises:
        ValueError: not one-dimensional.
    """
    import numpy as np

    if outcomes.ndim != 1:
        raise ValueError(f"outcomes must have shape (rows,), got {outcomes.shape}")
    right = outcomes == 1
    if bool(np.all(right | (outcomes == 0))):
        return BITS, np.packbits(right).tobytes()
    return FLOAT32, encode_floats(outcomes)


def encode_floats(values: np.ndarray) -> bytes:
    """Little-endian float32, whatever the machine."""
    return values.astype("<f4").tobytes()


def decode(encoding: str, content: bytes, rows: int) -> np.ndarray:
    """The (rows,) float32 array that `encode` was given.

    Raises:
        DamagedObject: bytes that are none of `encode`'s, or of another length.
    """
    import numpy as np

    if encoding == BITS and len(content) == (rows + 7) // 8:
        return np.unpackbits(np.frombuffer(content, np.uint8), count=rows).astype(np.float32)
    if encoding == FLOAT32 and len(content) == 4 * rows:
        return np.frombuffer(content, "<f4").astype(np.float32)
    raise DamagedObject(
        f"stored outcomes are damaged ({len(content)} bytes of {encoding[:20]!r} for {rows} rows): "
        "score again, or restore registry.db from a copy"
    )
