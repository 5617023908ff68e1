"""Noise and timesteps that a label decides, the same on every machine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lori_manager.engine.streams import random_words


def normals(label: str, shape: Sequence[int]) -> Tensor:
    """float32 numbers of that shape, standard normal, drawn from the label's stream.

    By Box and Muller in float64, out of the generator's raw words: each word gives two.
    """
    count = math.prod(shape)
    halves = random_words(label, (count + 1) // 2).astype("<u8", copy=False).view("<u4")
    uniform = (halves.astype(np.float64) + 0.5) * 2.0**-32  # inside (0, 1)
    radius, angle = np.sqrt(-2.0 * np.log(uniform[::2])), 2.0 * np.pi * uniform[1::2]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return torch.from_numpy(pairs.reshape(-1)[:count].astype(np.float32).reshape(tuple(shape)))


def timesteps(label: str, count: int, total: int) -> Tensor:
    """(count,) int64 in [0, total), each equally likely."""
    return torch.from_numpy((_uniform(label, count) * total).astype(np.int64))


def spread_timesteps(label: str, count: int, total: int) -> Tensor:
    """(count,) int64, one out of each of `count` equal parts of [0, total), in their order."""
    at = (np.arange(count) + _uniform(label, count)) / count
    return torch.from_numpy((at * total).astype(np.int64))


def _uniform(label: str, count: int) -> np.ndarray:
    """float64 in [0, 1)."""
    return (random_words(label, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
