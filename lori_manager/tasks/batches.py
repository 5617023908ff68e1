"""From encoded rows to padded batches in a fixed, seeded order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from lori_manager.tasks.encoding import Encoded

MEGABATCH = 8  # batches whose rows are sorted by length together


def permutation(n: int, seed: int, label: str) -> np.ndarray:
    """A seeded order of 0..n-1, the same with every numpy version.

    Sorting raw generator words depends on no distribution's implementation.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}|{label}".encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(n) if n else np.zeros(0, np.uint64)
    return np.argsort(words, kind="stable")


def training_order(lengths: Sequence[int], batch: int, steps: int, seed: int) -> list[np.ndarray]:
    """Row numbers of each step's batch.

    Every pass over the rows is a fresh permutation, cut into mega-batches whose
    rows are sorted by length so that a batch holds rows of like length; the
    batches of a mega-batch are shuffled again. The last batch of a pass may be
    small; it is never padded with repeated rows.

    Args:
        lengths: tokens of each row.
        batch: rows a step.
        steps: how many batches to give, over as many passes as it takes.
        seed: decides everything.
    Raises:
        ValueError: no rows.
    """
    if not len(lengths):
        raise ValueError("`lengths` is empty: expected at least one row")
    order: list[np.ndarray] = []
    size = np.asarray(lengths)
    epoch = 0
    while len(order) < steps:
        rows = permutation(len(size), seed, f"rows {epoch}")
        for start in range(0, len(rows), batch * MEGABATCH):
            mega = rows[start : start + batch * MEGABATCH]
            mega = mega[np.argsort(-size[mega], kind="stable")]
            cuts = [mega[i : i + batch] for i in range(0, len(mega), batch)]
            label = f"batches {epoch} {start}"
            order.extend(cuts[i] for i in permutation(len(cuts), seed, label))
        epoch += 1
    return order[:steps]


def length_batches(lengths: Sequence[int], batch: int) -> list[np.ndarray]:
    """Row numbers in batches of like length, longest first, so that memory fails early."""
    rows = np.argsort(-np.asarray(lengths), kind="stable")
    return [rows[i : i + batch] for i in range(0, len(rows), batch)]


def collate(rows: Sequence[Encoded], pad: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pad at the end and mark what is to be predicted.

    Returns:
        ids (rows, length) int64; wanted (rows, length) bool, True where the *next*
        token belongs to the completion; targets, the int64 tokens at those places
        in row-major order.
    """
    longest = max(len(r.ids) for r in rows)
    ids = np.full((len(rows), longest), pad, np.int64)
    wanted = np.zeros((len(rows), longest), bool)
    targets = []
    for i, row in enumerate(rows):
        tokens = np.asarray(row.ids, np.int64)
        ids[i, : len(tokens)] = tokens
        first = max(row.prompt_length, 1)  # an empty prompt: the first token has no context
        wanted[i, first - 1 : len(tokens) - 1] = True
        targets.append(tokens[first:])
    return ids, wanted, np.concatenate(targets)
