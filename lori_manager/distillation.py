"""Rows as a teacher would answer them: what training on an adapter's own words needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lori_manager.engine.head import SoftTargets
from lori_manager.engine.layers import attached, low_rank_layers
from lori_manager.engine.update import LowRankUpdate
from lori_manager.forward import Forward, place
from lori_manager.models import BaseModel
from lori_manager.tasks.batches import length_batches
from lori_manager.tasks.encoding import Encoded

LIKELIEST = 32  # tokens that a teacher names at each place


@dataclass(frozen=True)
class Words:
    """What is right after each token of some rows' completions.

    Shapes: ids (places, k) int64, probabilities (places, k) float32 with rows of sum 1,
    row after row; on the CPU.
    """

    rows: Sequence[Encoded]
    ids: Tensor
    probabilities: Tensor


def teacher_words(
    base: BaseModel,
    updates: Mapping[str, LowRankUpdate],
    rows: Sequence[Encoded],
    batch: int,
    *,
    labels: float = 0.0,
) -> Words:
    """What an adapter says at each place of the rows' completions, given what is before it.

    Args:
        base: the model; the adapter is put in and taken out again.
        updates: the teacher's, module name -> update.
        rows: with completions.
        batch: rows a forward.
        labels: share of the completion's own token; the rest is the teacher's `LIKELIEST`
            tokens, scaled to sum to 1.
    """
    ids: list[Tensor | None] = [None] * len(rows)
    probabilities: list[Tensor | None] = [None] * len(rows)
    forward = Forward(base)
    with (
        attached(base.model, low_rank_layers(base.model, updates)),
        torch.no_grad(),
        forward.ready(),
    ):
        for numbers in length_batches([len(r.ids) for r in rows], batch):
            given = forward.batch([rows[i] for i in numbers])
            said, likely = (
                t.cpu() for t in forward.likeliest(place(given, base.device), LIKELIEST)
            )
            likely = likely / likely.sum(1, keepdim=True)
            truth = torch.from_numpy(given.targets)[:, None]
            said = torch.cat([said, truth], 1)
            share = torch.full_like(likely[:, :1], labels)
            likely = torch.cat([likely * (1 - labels), share], 1)
            ends = np.cumsum(given.counts)[:-1].tolist()
            for i, one, p in zip(
                numbers,
                torch.tensor_split(said, ends),
                torch.tensor_split(likely, ends),
                strict=True,
            ):
                ids[i], probabilities[i] = one, p
    return Words(
        rows,
        torch.cat([i for i in ids if i is not None]),
        torch.cat([p for p in probabilities if p is not None]),
    )


def own_words(rows: Sequence[Encoded]) -> Words:
    """The rows' completions themselves, as if a teacher were sure of them."""
    ids = np.concatenate([np.asarray(r.ids[max(r.prompt_length, 1) :], np.int64) for r in rows])
    told = torch.from_numpy(ids)[:, None]
    return Words(rows, told, torch.ones(told.shape))


def taught_rows(parts: Sequence[Words], device: torch.device) -> tuple[list[Encoded], SoftTargets]:
    """All parts' rows, each knowing its places in one table on the device."""
    width = max(part.ids.shape[1] for part in parts)
    pad = torch.nn.functional.pad
    table = SoftTargets(
        torch.cat([pad(p.ids, (0, width - p.ids.shape[1])) for p in parts]).to(device),
        torch.cat([pad(p.probabilities, (0, width - p.ids.shape[1])) for p in parts]).to(device),
    )
    rows, begin = [], 0
    for part in parts:
        for row in part.rows:
            count = len(row.ids) - max(row.prompt_length, 1)
            rows.append(replace(row, taught=np.arange(begin, begin + count)))
            begin += count
    return rows, table
