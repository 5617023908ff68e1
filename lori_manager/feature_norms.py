"""How strongly a frozen model's linear layers answer the inputs of a task.

PLoP, arXiv:2506.20629: the normalised feature norm (NFN) of a layer W is the mean over tokens
of ||W z|| for its inputs z of length 1, divided by what Gaussian z of length 1 would give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lori_manager.engine.layers import linear_shape, linear_weight
from lori_manager.errors import InvalidInput
from lori_manager.forward import real_tokens
from lori_manager.labelling import runner
from lori_manager.models import BaseModel
from lori_manager.tasks.batches import length_batches

_PLAIN = (torch.float32, torch.bfloat16, torch.float16)
_CHUNK = 512  # unit vectors through a packed layer at once


def feature_norms(
    base: BaseModel,
    rows: Sequence[Any],
    batch: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """The NFN of every linear layer but the head that the rows pass through.

    The bias is no part of W z, padding is no token, and every token counts once, whatever
    batch it is in. Of an encoder a token is every place of the sequence: those that its tokenizer
    puts around a text, patches of an image and the class token; where an image model reads patches
    in several sizes (Swin), each layer's own. A token whose input is all zeros has no direction
    and is left out. For Gaussian z the mean is taken to be ||W||_F / sqrt(in_features), the
    root of the mean square, which is within 2% of a sampled mean.

    Args:
        base: with no adapter in it; not changed.
        rows: as `labelling.runner` takes them. Token ids of each count, all of them; labels
            do not.
        batch: rows a forward.
        on_progress: called with (rows done, rows in all).
    Returns:
        Full module name -> NFN. Layers of which the rows reach none are not there.
    Raises:
        ValueError: no rows.
        InvalidInput: a layer of zeros or of what is not finite, one that is called on some
            of the tokens only, or nothing that was called at all.
    Source: PLoP, arXiv:2506.20629. Differs: its code samples the denominator. It scores causal
        language models alone, on prompts without their answers: an encoder's input has no
        answer in it and is read whole.
    """
    if not rows:
        raise ValueError("`rows` is empty: expected at least one")
    forward, done = runner(base), 0  # tries the model out: before anything is watched
    seen = _Seen(every=base.architecture.encoder)
    modules = {name: base.model.get_submodule(name) for name in base.linear_shapes}
    hooks: list[Any] = [m.register_forward_hook(seen.hook(n, m)) for n, m in modules.items()]
    try:
        with torch.no_grad(), forward.ready():
            for numbers in length_batches([row.length for row in rows], batch):
                chosen = [rows[i] for i in numbers]
                given = forward.batch(chosen)
                seen.begin(forward.real(given, chosen))
                forward.run(forward.place(given))
                done += len(chosen)
                if on_progress:
                    on_progress(done, len(rows))
    finally:
        for one in hooks:
            one.remove()
    found = {}
    for name in modules:
        mean = seen.mean(name)
        if mean is None:
            continue
        norm = weight_norm(modules[name], seen.dtypes[name])
        found[name] = mean / norm * math.sqrt(base.linear_shapes[name][1]) if norm else math.nan
        if not math.isfinite(found[name]):
            raise InvalidInput(
                f"{name} has no feature norm: its weights or its inputs are all zeros or not "
                "finite; check the base model"
            )
    if not found:
        raise InvalidInput(f"no linear layer of {type(base.model).__name__} is called on the rows")
    return found


def weight_norm(layer: nn.Module, dtype: torch.dtype) -> float:
    """||W||_F of a linear layer.

    Packed weights (fp8, 4 and 8 bits) are read as what they multiply with: unit vectors go
    through the layer, and its bias is taken off.

    Args:
        layer: any that `linear_shape` knows.
        dtype: of the inputs that it takes.
    """
    if _plain(layer):
        return float(torch.linalg.vector_norm(linear_weight(layer).detach(), dtype=torch.float32))
    device, size = next(layer.parameters()).device, (linear_shape(layer) or (0, 0))[1]
    total = 0.0
    with torch.no_grad():
        for start in range(0, size, _CHUNK):
            count = min(_CHUNK, size - start)
            units = torch.zeros(count, size, dtype=dtype, device=device)
            units[torch.arange(count), torch.arange(start, start + count)] = 1.0
            columns = _without_bias(layer, units, layer(units))
            total += float(columns.float().square().sum())
    return math.sqrt(total)


def _plain(layer: nn.Module) -> bool:
    """Whether the weight is a matrix of numbers, not something packed."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.dtype in _PLAIN


def _without_bias(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """W x (n, out) of x (n, in), where the layer gave y.

    A plain layer with a bias is multiplied again: y is rounded, and a bias may be far larger
    than W x (Qwen2's keys).
    """
    bias: Tensor | None = getattr(layer, "bias", None)
    if bias is None:
        return y
    return F.linear(x, linear_weight(layer)) if _plain(layer) else y - bias


class _Seen:
    """Sums over tokens of ||W z||, by module, as the hooks see them."""

    def __init__(self, every: bool) -> None:
        """
        Args:
            every: each layer must be called on every token, in batches without padding too:
                what is called on something else (DeBERTa's relative positions) has no score.
        """
        self._every = every
        self.dtypes: dict[str, torch.dtype] = {}
        self._sums: dict[str, list[Tensor]] = {}  # left on the device until all is done
        self._counts: dict[str, list[Tensor]] = {}
        self._real: Tensor | None = None
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def begin(self, real: Tensor | None) -> None:
        """A batch comes, with these real tokens; see `Forward.real`."""
        needed = real is not None and (self._every or not bool(real.all()))
        self._real, self._last = real if needed else None, None

    def hook(self, name: str, layer: nn.Module) -> Callable[..., None]:
        """To be called after the layer's forward."""

        def see(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0]
            tokens = x.numel() // x.shape[-1]
            if self._real is not None and tokens != len(self._real):
                raise InvalidInput(
                    f"{name} is called on {tokens} of {len(self._real)} tokens, so padding cannot "
                    "be told from text: choose `targets` by hand"
                )
            flat, lengths = self._input(x)
            y = real_tokens(output, self._real)
            answers = _lengths(_without_bias(layer, flat, y))
            ratios = torch.where(lengths == 0, 0.0, answers / lengths)
            self.dtypes[name] = x.dtype
            self._sums.setdefault(name, []).append(ratios.sum())
            self._counts.setdefault(name, []).append((lengths != 0).sum())

        return see

    def mean(self, name: str) -> float | None:
        """Over all tokens; None where there was none."""
        count = sum(int(n) for n in self._counts.get(name, ()))
        return math.fsum(float(s) for s in self._sums[name]) / count if count else None

    def _input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The real tokens' inputs and their lengths, once for layers that share an input."""
        if self._last is None or self._last[0] is not x:
            flat = real_tokens(x, self._real)
            self._last = (x, flat, _lengths(flat))
        return self._last[1], self._last[2]


def _lengths(rows: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    return lengths
