"""The frozen A, regenerated from a seed instead of stored.

UNIFORM: a module's A (rank, in_features) is Kaiming-uniform with a = sqrt(5), that is
uniform on [-1/sqrt(in_features), 1/sqrt(in_features)), as in LoRI's reference
code (arXiv:2504.07448), which does not seed it; we do. The stream of each module
is its own Philox generator, so neither the order of modules nor parallelism
changes a value, and only raw generator words and exact float arithmetic are used:
the result is the same bits on every numpy version, processor and system.

ORTHOGONAL: A is `rank` rows out of the module's list of orthogonal rows, from
`first_row` on; see `engine.orthogonal`. Rows that do not overlap are orthogonal up to
in_features of them.
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

from lori_manager.engine.orthogonal import orthogonal_rows
from lori_manager.engine.streams import random_words

UNIFORM = "philox-uniform-1"
ORTHOGONAL = "orthogonal-rows-1"
# What each generator's A depends on, beside the modules' names and sizes.
FIELDS: dict[str, tuple[str, ...]] = {
    UNIFORM: ("seed", "line", "rank"),
    ORTHOGONAL: ("seed", "first_row", "rank"),
}


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
    words = random_words(f"{seed}|{line}|{module}|{rank}x{in_features}", (n + 1) // 2)
    # Each 64-bit word gives two 24-bit integers: low half first, wherever this runs.
    integers = (words.astype("<u8", copy=False).view("<u4") >> 8)[:n].astype(np.float32)
    # (k - 2^23) * 2^-23 is exact; the product with the bound rounds once.
    values = (integers - np.float32(2**23)) * np.float32(2**-23)
    values *= np.float32(1.0) / np.sqrt(np.float32(in_features))
    return torch.from_numpy(values.reshape(rank, in_features))


@dataclass(frozen=True)
class ProjectionSpec:
    """All that is needed to make a line's A again.

    `modules` maps a module's full name to its in_features. `line` counts for UNIFORM
    alone, `first_row` for ORTHOGONAL alone.
    """

    seed: int
    line: str
    rank: int
    modules: Mapping[str, int] = field(hash=False)
    generator: str = UNIFORM
    first_row: int = 0

    def __post_init__(self) -> None:
        if self.generator not in FIELDS:
            known = ", ".join(FIELDS)
            raise ValueError(f"unknown generator {self.generator!r}; this lori has {known}")
        if self.rank < 1 or self.seed < 0 or self.first_row < 0:
            raise ValueError(
                f"rank and seed must be positive, got {self.rank} and {self.seed}, "
                f"first row {self.first_row}"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any], modules: Mapping[str, int]) -> ProjectionSpec:
        """The inverse of `to_json`."""
        return cls(**{"line": "", **values}, modules=modules)

    def matrix(self, module: str) -> Tensor:
        """A of one module, (rank, in_features) float32."""
        size = self.modules[module]
        if self.generator == ORTHOGONAL:
            return orthogonal_rows(self.seed, module, self.first_row, self.rank, size)
        return seeded_matrix(self.seed, self.line, module, self.rank, size)

    @cached_property
    def matrices(self) -> dict[str, Tensor]:
        """A of every module. Made on first use and kept; do not modify."""
        return {name: self.matrix(name) for name in sorted(self.modules)}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, shapes and values of A: masks are bound to it."""
        return projection_digest(self.matrices)

    def to_json(self) -> dict[str, Any]:
        """What the generator reads, without the modules, which the file lists once."""
        read = {name: getattr(self, name) for name in FIELDS[self.generator]}
        return {"generator": self.generator, **read}


def projection_digest(matrices: Mapping[str, Tensor]) -> str:
    """SHA-256 over sorted names, shapes and little-endian float32 values."""
    h = hashlib.sha256()
    for name in sorted(matrices):
        a = matrices[name]
        h.update(f"{name}|{tuple(a.shape)}|".encode())
        h.update(a.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4").tobytes())
    return h.hexdigest()
