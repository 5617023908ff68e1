"""From encoded rows to padded or packed batches in a fixed, seeded order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lori_manager.tasks.encoding import Encoded

IGNORED = -100  # a target of this value counts nothing, as in torch
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


@dataclass(frozen=True)
class Batch:
    """Rows as a model takes them.

    Attributes:
        ids: int64 (rows, longest) padded at the end, or (1, tokens) packed.
        wanted: int64 (n,), places in the flattened `ids` whose *next* token belongs to
            a completion, row by row.
        targets: int64 (n,), those next tokens, or where a teacher's words for them stand;
            `IGNORED` where `wanted` only fills up.
        counts: how many of `wanted` each row has.
        bounds: of a packed sequence, else None.
    """

    ids: np.ndarray
    wanted: np.ndarray
    targets: np.ndarray
    counts: np.ndarray
    bounds: RowBounds | None = None


@dataclass(frozen=True)
class RowBounds:
    """Where the rows of a packed sequence are.

    Attributes:
        positions: int64 (tokens,), each token's place in its row, from 0.
        slots: int64 (tokens,), its place in a padded (rows, longest); rows * longest
            for tokens that only fill up.
        starts: int64 (rows + 2,), where each row begins, where the last one ends, and
            where the tokens that fill up end.
        rows, longest: how many rows, and no row has more tokens.
    """

    positions: np.ndarray
    slots: np.ndarray
    starts: np.ndarray
    rows: int
    longest: int


@dataclass(frozen=True)
class Sizes:
    """Fixed sizes that packed batches are filled up to."""

    tokens: int
    wanted: int
    rows: int
    longest: int


def _answers(
    rows: Sequence[Encoded], offsets: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`wanted`, `targets` and `counts` of rows that begin at these places."""
    wanted, targets = [], []
    for row, offset in zip(rows, offsets, strict=True):
        first = max(row.prompt_length, 1)  # an empty prompt: the first token has no context
        wanted.append(np.arange(offset + first - 1, offset + len(row.ids) - 1))
        told = row.ids[first:] if row.taught is None else row.taught
        targets.append(np.asarray(told, np.int64))
    counts = np.array([len(t) for t in targets])
    return np.concatenate(wanted), np.concatenate(targets), counts


def collate(rows: Sequence[Encoded], pad: int = 0) -> Batch:
    """Rows below one another, padded at the end.

    What `pad` is does not matter to a causal model: it stands behind every real token.
    """
    longest = max(len(r.ids) for r in rows)
    ids = np.full((len(rows), longest), pad, np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
    return Batch(ids, *_answers(rows, range(0, ids.size, longest)))


def pack(rows: Sequence[Encoded], pad: int = 0, sizes: Sizes | None = None) -> Batch:
    """Rows one behind another in one sequence, filled up to `sizes` if given.

    Raises:
        ValueError: rows that do not fit `sizes`.
    """
    lengths = [len(r.ids) for r in rows]
    ends = np.cumsum(lengths)
    offsets = ends - lengths
    wanted, targets, counts = _answers(rows, offsets.tolist())
    tokens = int(ends[-1])
    sizes = sizes or Sizes(tokens, len(wanted), len(rows), max(lengths))
    more = sizes.tokens - tokens, sizes.wanted - len(wanted), sizes.rows - len(rows)
    if min(*more, sizes.longest - max(lengths)) < 0 or more[0] > sizes.longest:
        raise ValueError(f"{len(rows)} rows of {tokens} tokens do not fit {sizes}")
    ids = np.full((1, sizes.tokens), pad, np.int64)
    positions = np.zeros(sizes.tokens, np.int64)
    slots = np.full(sizes.tokens, sizes.rows * sizes.longest, np.int64)
    for i, (row, offset) in enumerate(zip(rows, offsets, strict=True)):
        at = slice(offset, offset + len(row.ids))
        ids[0, at] = row.ids
        positions[at] = np.arange(len(row.ids))
        slots[at] = positions[at] + i * sizes.longest
    positions[tokens:] = np.arange(more[0])
    starts = np.concatenate([[0], ends, np.full(more[2], tokens), [sizes.tokens]])
    return Batch(
        ids,
        np.concatenate([wanted, np.zeros(more[1], np.int64)]),
        np.concatenate([targets, np.full(more[1], IGNORED, np.int64)]),
        counts,
        RowBounds(positions, slots, starts.astype(np.int64), sizes.rows, sizes.longest),
    )
