"""The frozen random A, regenerated from a seed instead of stored.

A module's A (rank, in_features) is Kaiming-uniform with a = sqrt(5), that is
uniform on [-1/sqrt(in_features), 1/sqrt(in_features)), as in LoRI's reference
code (arXiv:2504.07448), which does not seed it; we do. The stream of each module
is its own Philox generator, so neither the order of modules nor parallelism
changes a value, and only raw generator words and exact float arithmetic are used:
the result is the same bits on every numpy version, processor and system.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

GENERATOR = "philox-uniform-1"


def seeded_matrix(seed: int, line: str, module: str, rank: int, in_features: int) -> Tensor:
    """One module's A.

    Args:
        seed: the user's seed, 0 or more.
        line: name of the line whose A this is; empty where all lines share one A.
        module: the module's full name in the model.
        rank, in_features: the shape.
    Returns:
        (rank, in_features) float32, uniform on [-1/sqrt(in_features), 1/sqrt(in_features)).
    """
    n = rank * in_features
    label = f"{seed}|{line}|{module}|{rank}x{in_features}".encode()
    key = int.from_bytes(hashlib.sha256(label).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw((n + 1) // 2)
    # Each 64-bit word gives two 24-bit integers: low half first, wherever this runs.
    integers = (words.astype("<u8", copy=False).view("<u4") >> 8)[:n].astype(np.float32)
    # (k - 2^23) * 2^-23 is exact; the product with the bound rounds once.
    values = (integers - np.float32(2**23)) * np.float32(2**-23)
    values *= np.float32(1.0) / np.sqrt(np.float32(in_features))
    return torch.from_numpy(values.reshape(rank, in_features))


@dataclass(frozen=True)
class ProjectionSpec:
    """All that is needed to make a line's A again.

    `modules` maps a module's full name to its in_features.
    """

    seed: int
    line: str
    rank: int
    modules: Mapping[str, int] = field(hash=False)
    generator: str = GENERATOR

    def __post_init__(self) -> None:
        if self.generator != GENERATOR:
            raise ValueError(f"unknown generator {self.generator!r}; this lori has {GENERATOR!r}")
        if self.rank < 1 or self.seed < 0:
            raise ValueError(f"rank and seed must be positive, got {self.rank} and {self.seed}")

    def matrix(self, module: str) -> Tensor:
        """A of one module, (rank, in_features) float32."""
        return seeded_matrix(self.seed, self.line, module, self.rank, self.modules[module])

    @cached_property
    def matrices(self) -> dict[str, Tensor]:
        """A of every module. Made on first use and kept; do not modify."""
        return {name: self.matrix(name) for name in sorted(self.modules)}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, shapes and values of A: masks are bound to it."""
        return projection_digest(self.matrices)

    def to_json(self) -> dict[str, Any]:
        """Without the modules, which the file lists once."""
        return {
            "generator": self.generator,
            "seed": self.seed,
            "line": self.line,
            "rank": self.rank,
        }


def projection_digest(matrices: Mapping[str, Tensor]) -> str:
    """SHA-256 over sorted names, shapes and little-endian float32 values."""
    h = hashlib.sha256()
    for name in sorted(matrices):
        a = matrices[name]
        h.update(f"{name}|{tuple(a.shape)}|".encode())
        h.update(a.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4").tobytes())
    return h.hexdigest()
