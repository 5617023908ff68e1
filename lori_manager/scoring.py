"""One model, one task's rows -> one outcome per row."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from lori_manager.errors import BadData
from lori_manager.models import BaseModel
from lori_manager.tasks.batches import collate, length_batches
from lori_manager.tasks.encoding import Encoded
from lori_manager.tasks.rows import Row
from lori_manager.tasks.scorers import Scorer, TokenStats


def token_stats(
    base: BaseModel,
    sequences: Sequence[Encoded],
    batch: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[TokenStats]:
    """Hits and negative log-likelihoods of every sequence's completion tokens.

    Args:
        base: the model as it now is, adapter layers included.
        sequences: encoded rows; order is kept in the result.
        batch: sequences a forward.
        on_batch: called with (sequences done, sequences in all).
    """
    out: list[TokenStats | None] = [None] * len(sequences)
    pad = int(base.tokenizer.pad_token_id or 0)
    done = 0
    with torch.inference_mode():
        for numbers in length_batches([len(s.ids) for s in sequences], batch):
            chosen = [sequences[i] for i in numbers]
            ids, wanted, targets = (
                torch.from_numpy(a).to(base.device) for a in collate(chosen, pad)
            )
            logits = base.token_logits(ids, wanted)
            nll = F.cross_entropy(logits, targets, reduction="none").cpu().numpy()
            hits = (logits.argmax(-1) == targets).cpu().numpy()
            ends = np.cumsum(wanted.sum(1).cpu().numpy())[:-1]
            for i, h, n in zip(numbers, np.split(hits, ends), np.split(nll, ends), strict=True):
                out[i] = TokenStats(h, n)
            done += len(numbers)
            if on_batch:
                on_batch(done, len(sequences))
    return [s for s in out if s is not None]


def _within(sequences: list[Encoded], context: int | None) -> list[Encoded]:
    """Cut all of a row's prompts alike, so that its longest sequence fits the model.

    Raises:
        BadData: a completion alone is longer than the context.
    """
    over = max(len(s.ids) for s in sequences) - (context or sys.maxsize)
    if over <= 0:
        return sequences
    if over >= min(s.prompt_length for s in sequences):
        raise BadData(
            f"a choice is longer than the model's context of {context} tokens: shorten it"
        )
    return [
        Encoded(list(s.ids[over:]), s.prompt_length - over, s.truncated + over) for s in sequences
    ]


def score_rows(
    base: BaseModel,
    rows: Sequence[Row],
    encoded: Sequence[Encoded],
    scorer: Scorer,
    batch: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Outcomes in the rows' order, and weights where they are not all one.

    Returns:
        float32 (rows,) outcomes; float32 (rows,) weights or None.
    """
    sequences: list[Encoded] = []
    spans = []
    for row, e in zip(rows, encoded, strict=True):
        own = _within(scorer.sequences(base.tokenizer, row, e), base.context)
        spans.append((len(sequences), len(sequences) + len(own)))
        sequences.extend(own)
    stats = token_stats(base, sequences, batch, on_batch)
    pairs = np.array([scorer.outcome(stats[a:b]) for a, b in spans], np.float32)
    pairs = pairs.reshape(len(spans), 2)
    weights = None if (pairs[:, 1] == 1).all() else pairs[:, 1]
    return pairs[:, 0], weights
