"""Seeded random words that are the same bits on every machine."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def random_words(label: str, count: int) -> NDArray[np.uint64]:
    """(count,) raw words of the Philox generator of that label.

    numpy promises the raw words of a generator for ever, and of no distribution.
    """
    key = int.from_bytes(hashlib.sha256(label.encode()).digest()[:16], "little")
    return np.random.Philox(key=key).random_raw(count).astype(np.uint64, copy=False)
