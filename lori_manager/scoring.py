"""One model, one task's rows -> one outcome per row."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from lori_manager.errors import BadData
from lori_manager.forward import Forward, place
from lori_manager.generation import completions
from lori_manager.harness.answering import answered
from lori_manager.models import BaseModel
from lori_manager.tasks.batches import length_batches
from lori_manager.tasks.encoding import Encoded
from lori_manager.tasks.rows import Row
from lori_manager.tasks.scorers import Scorer, TextScorer, TokenStats


def token_stats(
    base: BaseModel,
    sequences: Sequence[Encoded],
    batch: int,
    on_batch: Callable[[int, int], None] | None = None,
    packing: str = "auto",
) -> list[TokenStats]:
    """Hits and negative log-likelihoods of every sequence's completion tokens.

    Args:
        base: the model as it now is, adapter layers included.
        sequences: encoded rows; order is kept in the result.
        batch: sequences a forward.
        on_batch: called with (sequences done, sequences in all).
        packing: see `Forward`.
    """
    out: list[TokenStats | None] = [None] * len(sequences)
    done = 0
    forward = Forward(base, packing=packing)
    with torch.inference_mode(), forward.ready():
        for numbers in length_batches([len(s.ids) for s in sequences], batch):
            rows = forward.batch([sequences[i] for i in numbers])
            hits, nll = (t.cpu().numpy() for t in forward.scores(place(rows, base.device)))
            ends = np.cumsum(rows.counts)[:-1]
            for i, h, n in zip(numbers, np.split(hits, ends), np.split(nll, ends), strict=True):
                out[i] = TokenStats(h, n)
            done += len(numbers)
            if on_batch:
                on_batch(done, len(sequences))
    return [s for s in out if s is not None]


def cut_alike(sequences: list[Encoded], context: int | None) -> list[Encoded]:
    """A row's sequences, their prompts cut alike, so that the longest fits the model.

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


def _judged(
    scorer: TextScorer, said: Sequence[tuple[str, str]], rows: Sequence[Row]
) -> list[tuple[float, float]]:
    """The outcome of every text, as many at a time as the scorer has workers."""

    def judge(texts: tuple[str, str], row: Row) -> tuple[float, float]:
        text, completion = texts
        return scorer.outcome(text, completion, row)

    if len(said) != len(rows):
        raise ValueError(f"got {len(said)} texts for {len(rows)} rows")
    if scorer.workers == 1:
        return list(map(judge, said, rows))
    with ThreadPoolExecutor(scorer.workers) as pool:
        return list(pool.map(judge, said, rows))


def score_rows(
    base: BaseModel,
    rows: Sequence[Row],
    encoded: Sequence[Encoded],
    scorer: Scorer,
    batch: int,
    on_batch: Callable[[int, int], None] | None = None,
    packing: str = "auto",
    *,
    among: Sequence[Encoded] | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Outcomes in the rows' order, and weights where they are not all one.

    Args:
        base: the model as it now is, adapter layers included.
        rows, encoded: a task's rows and their tokens.
        scorer: what to run for them and how to read it.
        batch: sequences a forward, or rows that generate together.
        on_batch: called with (sequences or rows done, those in all).
        packing: see `Forward`; generated text is always padded.
        among: all of the task's rows, where these are some of them: how long a generated text
            may be hangs on all, so that a share of them is scored as the whole is.
    Returns:
        float32 (rows,) outcomes; float32 (rows,) weights or None.
    Raises:
        ValueError: a scorer of labels.
    """
    if scorer.reads == "noise":
        raise ValueError("images are scored by `held_out_losses`")
    if scorer.reads == "text":
        room = scorer.new_tokens(encoded if among is None else among)
        said = completions(base, encoded, room, batch, on_batch)
        found = _judged(scorer, said, rows)
    elif scorer.reads == "labels":
        raise ValueError("labels are told by an encoder and its head: see `classification`")
    elif scorer.reads == "requests":
        found = answered(base, rows, scorer, batch, on_batch)
    else:
        sequences: list[Encoded] = []
        spans = []
        for row, e in zip(rows, encoded, strict=True):
            own = cut_alike(scorer.sequences(base.tokenizer, row, e), base.context)
            spans.append((len(sequences), len(sequences) + len(own)))
            sequences.extend(own)
        stats = token_stats(base, sequences, batch, on_batch, packing)
        found = [scorer.outcome(stats[a:b]) for a, b in spans]
    pairs = np.array(found, np.float32).reshape(len(rows), 2)
    weights = None if (pairs[:, 1] == 1).all() else pairs[:, 1]
    return pairs[:, 0], weights
