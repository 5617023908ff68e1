"""Rows one behind another in one sequence, each attending to itself alone.

transformers hands every attention to a function that is registered by name. Ours gets
the rows' bounds as a keyword argument of the model's forward and needs no mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAME = "lori_packed"


@dataclass(frozen=True)
class Bounds:
    """Where the rows of a packed sequence are.

    Attributes:
        starts: int32 (rows + 1,), where each row begins, the length at the end.
        slots: int64 (tokens,), each token's place in a padded (rows, longest).
        rows, longest: how many rows, and no row has more tokens.
    """

    starts: Tensor
    slots: Tensor
    rows: int
    longest: int


class Unsupported(Exception):
    """This attention does something that packing cannot do."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    bounds: Bounds | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within the rows of a packed sequence.

    Shapes: query (1, heads, tokens, size), key and value (1, their heads, tokens, size);
    gives (1, tokens, heads, size). Signature: transformers' attention functions.
    Raises:
        Unsupported: capped logits, sinks, position biases, dropout, two directions.
    """
    extra = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    causal = others.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    if bounds is None or attention_mask is not None or extra or dropout or not causal:
        raise Unsupported(f"{type(module).__name__}: {extra or 'not plain causal attention'}")
    window = sliding_window if sliding_window and sliding_window < bounds.longest else None
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256:
        return _flash(q, k, v, bounds, scaling, window)[None], None
    return _padded(q, k, v, bounds, scaling, window)[None], None


def _flash(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, scaling: float | None, window: int | None
) -> Tensor:
    """(tokens, heads, size) each; no padding at all."""
    from torch.nn.attention.varlen import varlen_attn

    # The kernel takes fewer heads of k and v as they are; newer versions want to be told.
    told = "enable_gqa" in inspect.signature(varlen_attn).parameters
    grouped: dict[str, Any] = {"enable_gqa": True} if told and q.shape[1] != k.shape[1] else {}
    left = -1 if window is None else window - 1
    out = varlen_attn(
        q, k, v, bounds.starts, bounds.starts, bounds.longest, bounds.longest,
        scale=scaling, window_size=(left, 0), **grouped,
    )  # fmt: skip
    return out if isinstance(out, Tensor) else out[0]


def _padded(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, scaling: float | None, window: int | None
) -> Tensor:
    """The same where there is no such kernel: rows side by side for the attention alone."""
    length, size = bounds.longest, bounds.rows * bounds.longest

    def spread(t: Tensor) -> Tensor:
        # One slot more takes what only fills the sequence up.
        wide = t.new_zeros(size + 1, *t.shape[1:]).index_copy(0, bounds.slots, t)
        return wide[:size].view(bounds.rows, length, *t.shape[1:]).transpose(1, 2)

    mask = None
    if window is not None:
        at = torch.arange(length, device=q.device)
        back = at[:, None] - at
        mask = (back >= 0) & (back < window)
    out = F.scaled_dot_product_attention(
        spread(q), spread(k), spread(v), mask, is_causal=mask is None, scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    flat = out.transpose(1, 2).reshape(size, *q.shape[1:])
    return torch.cat([flat, flat.new_zeros(1, *q.shape[1:])]).index_select(0, bounds.slots)


@contextmanager
def attention_packed(model: Any) -> Iterator[None]:
    """All of the model's forwards inside must give `bounds`; as it was afterwards."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
