"""Cross-entropy behind a frozen vocabulary head, a slice of positions at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORED = -100  # a target of this value counts nothing, as in torch
_FEW = 16  # rows of a product that is exact on every CPU seen
_CHUNK = 1 << 26  # logits held at once: 256 MiB of float32


def widened(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _slices(rows: int, vocabulary: int) -> list[slice]:
    step = max(1, _CHUNK // vocabulary)
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def head_loss(
    h: Tensor, W: Tensor, b: Tensor | None, targets: Tensor, soft: SoftTargets | None = None
) -> Tensor:
    """Sum of the cross-entropy of softmax(h W' + b) over the positions that count.

    The truth is one token, or with `soft` what a teacher says at the place of its table
    that `targets` names.

    The gradient for h is made in the forward, slice by slice, so that the logits of
    all positions never exist at once. W and b are frozen.
    Shapes: h (n, d), W (vocabulary, d), b (vocabulary,) or None, targets (n,) int64;
    gives a scalar in nats, float32 (float64 for float64 input).
    """
    out: Tensor = _HeadLoss.apply(h, W, b, targets, soft)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True)
class SoftTargets:
    """What a teacher would say at each place of a table: a few tokens, and how likely each is.

    Shapes: ids (places, k) int64, probabilities (places, k) float32 with rows of sum 1;
    what has probability 0 only fills up.
    """

    ids: Tensor
    probabilities: Tensor

    def of(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """ids and probabilities (n, k) of the places `targets` (n,); all 0 for `IGNORED`."""
        places = targets.clamp(min=0)
        counts = (targets != IGNORED)[:, None]
        return self.ids[places], self.probabilities[places] * counts


def _words(targets: Tensor, soft: SoftTargets | None) -> tuple[Tensor, Tensor]:
    """ids (n, k) and how much each counts, (n, k)."""
    if soft is not None:
        return soft.of(targets)
    return targets.clamp(min=0)[:, None], (targets != IGNORED)[:, None].float()


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        W: Tensor,
        b: Tensor | None,
        targets: Tensor,
        soft: SoftTargets | None,
    ) -> Tensor:
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=h.device)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        for rows in _slices(len(h), len(W)):
            logits = widened(F.linear(h[rows], W, b))
            truth, weight = _words(targets[rows], soft)
            weight = weight.to(wide)
            counts = (targets[rows] != IGNORED)[:, None]
            scale = logits.logsumexp(1, keepdim=True)
            total += ((scale - logits.gather(1, truth)) * weight).sum()
            if dh is not None:
                p = (logits - scale).exp_()
                p *= counts
                p.scatter_add_(1, truth, -weight)
                # A CPU's product of few rows with so long a sum loses three digits.
                p = F.pad(p.to(h.dtype), (0, 0, 0, max(0, _FEW - len(p))))
                dh[rows] = p.mm(W)[: len(truth)]
        ctx.save_for_backward(*([] if dh is None else [dh]))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        (dh,) = ctx.saved_tensors
        return dh * dtotal.to(dh.dtype), None, None, None, None


def logits_loss(logits: Tensor, targets: Tensor, soft: SoftTargets | None = None) -> Tensor:
    """The loss of `head_loss`, from logits (n, vocabulary)."""
    logits = widened(logits)
    if soft is None:
        return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    truth, weight = _words(targets, soft)
    return ((logits.logsumexp(1, keepdim=True) - logits.gather(1, truth)) * weight).sum()


def head_scores(h: Tensor, W: Tensor, b: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Without gradients: (hits, nll) of every position.

    Shapes: as in `head_loss`; hits bool (n,), whether the target is the most likely
    token; nll (n,) in nats, 0 where the target is `IGNORED`.
    """
    hits, nll = [], []
    for rows in _slices(len(h), len(W)):
        got = logits_scores(F.linear(h[rows], W, b), targets[rows])
        hits.append(got[0])
        nll.append(got[1])
    return torch.cat(hits), torch.cat(nll)


def logits_scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(hits, nll) from logits (n, vocabulary); see `head_scores`."""
    logits = widened(logits)
    nll = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
    return logits.argmax(1) == targets, nll
