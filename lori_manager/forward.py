"""Rows through a model, on the fastest path that gives the same result."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lori_manager.engine.fp8 import inputs_unrounded
from lori_manager.engine.head import (
    SoftTargets,
    head_loss,
    head_scores,
    logits_loss,
    logits_scores,
    widened,
)
from lori_manager.errors import InvalidInput, first_line
from lori_manager.models import BaseModel
from lori_manager.packing import Bounds, Unsupported, attention_packed
from lori_manager.tasks.batches import Batch, Sizes, collate, pack
from lori_manager.tasks.encoding import Encoded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceBatch:
    """A batch's tensors where the model is; `bounds` and `positions` of packed ones alone."""

    ids: Tensor
    wanted: Tensor
    targets: Tensor
    positions: Tensor | None = None
    bounds: Bounds | None = None


def flatten(batch: Batch) -> Tensor:
    """All of a batch's numbers in one int64 tensor on the CPU."""
    arrays = [batch.ids, batch.wanted, batch.targets]
    if batch.bounds is not None:
        arrays += [batch.bounds.positions, batch.bounds.slots, batch.bounds.starts]
    return torch.from_numpy(np.concatenate([a.ravel() for a in arrays]))


def place(batch: Batch, device: torch.device) -> DeviceBatch:
    """The batch's tensors on the device, by one copy."""
    flat = flatten(batch)
    if device.type == "cuda":
        flat = flat.pin_memory()
    return as_batch(flat.to(device, non_blocking=True), batch)


def as_batch(flat: Tensor, like: Batch) -> DeviceBatch:
    """The parts of a flat int64 tensor that holds a batch of the sizes of `like`."""
    n = len(like.wanted)
    tokens = like.ids.size
    if like.bounds is None:
        ids, wanted, targets = torch.split(flat, [tokens, n, n])
        return DeviceBatch(ids.view(like.ids.shape), wanted, targets)
    ids, wanted, targets, positions, slots, starts = torch.split(
        flat, [tokens, n, n, tokens, tokens, len(like.bounds.starts)]
    )
    bounds = Bounds(starts.int(), slots, like.bounds.rows, like.bounds.longest)
    return DeviceBatch(ids[None], wanted, targets, positions[None], bounds)


class Forward:
    """Runs rows through a model as it now is, adapter layers included.

    Use `ready()` around a series of calls.
    """

    def __init__(
        self, base: BaseModel, *, packing: str = "auto", soft: SoftTargets | None = None
    ) -> None:
        """Decide how.

        Args:
            base: the model.
            packing: "on" packs rows into one sequence where the model gives the same logits
                that way; "off" pads them; "auto" packs on a GPU alone: on a CPU putting rows
                apart again for the attention costs more than padding does (measured).
            soft: the table that the rows' `taught` name places of; then the loss is the
                cross-entropy against it.
        """
        self._soft = soft
        self.base = base
        self._split = base.head() is not None
        wanted = packing == "on" or (packing == "auto" and base.device.type != "cpu")
        self.packed = wanted and can_pack(base)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The model's attention takes packed rows inside, where they are packed."""
        with attention_packed(self.base.model) if self.packed else nullcontext():
            yield

    def batch(self, rows: Sequence[Encoded], sizes: Sizes | None = None) -> Batch:
        """The rows in the form that this runs."""
        return pack(rows, sizes=sizes) if self.packed else collate(rows)

    def place(self, batch: Batch) -> DeviceBatch:
        """The batch's tensors where the model is."""
        return place(batch, self.base.device)

    def real(self, batch: Batch, rows: Sequence[Encoded]) -> Tensor | None:
        """Which of the flattened ids are the rows' own, bool; None where all are."""
        if batch.bounds is not None:
            return None
        lengths = torch.tensor([len(r.ids) for r in rows])
        places = torch.arange(batch.ids.shape[1])
        return (places < lengths[:, None]).flatten().to(self.base.device)

    def loss(self, batch: DeviceBatch) -> Tensor:
        """Sum of the cross-entropy over completion tokens, a scalar in nats, with gradient."""
        if not self._split:
            return logits_loss(self._logits(batch), batch.targets, self._soft)
        hidden = self._hidden(batch)
        W, b = self._head()
        if W.requires_grad or (b is not None and b.requires_grad):  # it trains, too
            return logits_loss(nn.functional.linear(hidden, W, b), batch.targets, self._soft)
        return head_loss(hidden, W, b, batch.targets, self._soft)

    def run(self, batch: DeviceBatch) -> None:
        """The decoder alone, for what hooks see in it."""
        self.base.decoder(**_inputs(batch))

    def scores(self, batch: DeviceBatch) -> tuple[Tensor, Tensor]:
        """(hits, nll) of every wanted place, without gradients; see `head_scores`."""
        if not self._split:
            return logits_scores(self._logits(batch), batch.targets)
        return head_scores(self._hidden(batch), *self._head(), batch.targets)

    def likeliest(self, batch: DeviceBatch, count: int) -> tuple[Tensor, Tensor]:
        """Without gradients: the likeliest next tokens at every wanted place.

        Returns:
            ids (n, count) int64 and their probabilities (n, count) float32, of all tokens.
        """
        if not self._split:
            logits = widened(self._logits(batch))
        else:
            logits = widened(nn.functional.linear(self._hidden(batch), *self._head()))
        found = logits.topk(min(count, logits.shape[1]), dim=1)
        return found.indices, (found.values - logits.logsumexp(1, keepdim=True)).exp().float()

    def _head(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as they are after the decoder has run: they may train."""
        head = self.base.head()
        if head is None:
            raise ValueError("the model's head is not apart from it")
        return head

    def _hidden(self, batch: DeviceBatch) -> Tensor:
        out: Tensor = self.base.decoder(**_inputs(batch)).last_hidden_state
        return out.reshape(-1, out.shape[-1]).index_select(0, batch.wanted)

    def _logits(self, batch: DeviceBatch) -> Tensor:
        logits: Tensor = self.base.model(**_inputs(batch)).logits
        return logits.reshape(-1, logits.shape[-1]).index_select(0, batch.wanted)


def real_tokens(x: Tensor, real: Tensor | None) -> Tensor:
    """x (..., d) by tokens, (tokens, d), without those that fill up; see `Forward.real`.

    Raises:
        InvalidInput: x is no row a token, as with what reads relative positions.
    """
    flat = x.reshape(-1, x.shape[-1])
    if real is not None and len(flat) != len(real):
        raise InvalidInput(
            "this model has linear layers that read something else than its tokens, which no "
            "merge by inputs can take: use `--method concat`"
        )
    return flat if real is None else flat[real]


def _inputs(batch: DeviceBatch) -> Mapping[str, object]:
    if batch.bounds is None:  # causal: what pads a row at its end cannot reach it
        return {"input_ids": batch.ids, "use_cache": False}
    return {
        "input_ids": batch.ids,
        "position_ids": batch.positions,
        "use_cache": False,
        "bounds": batch.bounds,
    }


def can_pack(base: BaseModel) -> bool:
    """Whether the model gives rows the same logits packed as alone; asked once a model."""
    found = getattr(base.model, "_lori_packs", None)
    if found is None:
        found = _try_packing(base)
        base.model._lori_packs = found
    return bool(found)


def _try_packing(base: BaseModel) -> bool:
    """Packed logits against those of each row alone, and with other neighbours."""
    draw = np.random.default_rng(0)
    words = [draw.integers(0, 1 << 30, n) for n in (5, 3, 7, 5, 5)]

    def logits(batch: Batch) -> Tensor:
        inputs = _inputs(place(batch, base.device))
        return widened(base.model(**inputs).logits[0])

    try:
        vocabulary = base.model.config.get_text_config().vocab_size
        *rows, other = [Encoded(w % vocabulary, 1) for w in words]
        with torch.no_grad(), inputs_unrounded():
            alone = torch.cat([logits(collate([row])) for row in rows])
            with attention_packed(base.model):
                packed, changed = logits(pack(rows)), logits(pack([other, *rows[1:]]))
    except (Unsupported, TypeError, ValueError, RuntimeError, AttributeError) as e:
        logger.info("rows are padded, not packed: %s", first_line(e))
        return False
    spread = float(alone.std())
    rounding = (0.02 if base.precision in ("bf16", "fp8") else 1e-4) * spread
    off = float((packed - alone).abs().mean())
    leak = float((packed[5:] - changed[5:]).abs().mean())  # of the rows that stayed
    if not (off <= rounding and leak <= rounding / 20):
        logger.info("rows are padded, not packed: packing moves logits by %.2g", max(off, leak))
        return False
    return True
