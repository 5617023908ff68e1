"""Which entries of B may train: magnitude masks, their overlap, the capacity left."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

SCOPES = ("model", "layer", "projection", "matrix")


def calibrate_mask(
    B: Mapping[str, Tensor],
    sparsity: float,
    scope: str = "model",
    exclude: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Keep the largest-magnitude entries of B, ranked within each group of the scope.

    Args:
        B: module name -> (out_features, rank). Not modified.
        sparsity: fraction frozen at zero, in [0, 1).
        scope: "model" ranks all modules at once (the paper's choice), "layer" the
            modules of one layer, "projection" the modules of one type over all
            layers, "matrix" each module alone.
        exclude: module name -> bool like B; True entries are never kept.
    Returns:
        Boolean masks of the same shapes. Of a group of n entries exactly
        round((1 - sparsity) * n) are True, ties resolved by position in the
        sorted module order; fewer only where `exclude` leaves fewer.
    Raises:
        ValueError: sparsity outside [0, 1), unknown scope, B empty or not finite.
    Source: LoRI, arXiv:2504.07448, section 3. Differs: an exact count on ties.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"`sparsity` must be in [0, 1), got {sparsity}")
    if not B:
        raise ValueError("`B` is empty: expected at least one module")
    masks: dict[str, Tensor] = {}
    for names in group_modules(B, scope).values():
        magnitude = torch.cat([B[n].detach().float().flatten() for n in names]).abs_()
        if magnitude.numel() and not math.isfinite(magnitude.max()):  # NaN is the largest
            raise ValueError("`B` holds values that are not finite; the calibration diverged")
        keep = round((1 - sparsity) * magnitude.numel())
        keys = magnitude.view(torch.int32)  # floats of 0 or more are ordered as their bits are
        if exclude is not None:
            barred = torch.cat([exclude[n].to(keys.device).flatten() for n in names])
            keys.add_(1).masked_fill_(barred, 0)
            keep = min(keep, int(keys.count_nonzero()))
        flat = _largest(keys, keep)
        for name, part in zip(names, torch.split(flat, [B[n].numel() for n in names]), strict=True):
            masks[name] = part.view(B[name].shape)
    return masks


def _largest(keys: Tensor, keep: int) -> Tensor:
    """Bool mask of the `keep` largest of a 1-D tensor, earlier positions first on ties.

    Two histograms find the least key to keep, of the upper 16 bits and of the lower ones
    where the upper are those found: a fraction of a selection's time, on a GPU too.

    Args:
        keys: int32, 0 or more. Not modified.
        keep: from 0 to their number.
    """
    if keep == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    upper, keep_there = _kth_largest(keys >> 16, keep)
    lower, keep_equal = _kth_largest(keys[keys >> 16 == upper] & 0xFFFF, keep_there)
    least = upper << 16 | lower
    mask = keys > least
    mask[(keys == least).nonzero().flatten()[:keep_equal]] = True
    return mask


def _kth_largest(halves: Tensor, k: int) -> tuple[int, int]:
    """The k-th largest of integers in [0, 2^16), and how many equal to it are of the k largest."""
    at_least = torch.bincount(halves, minlength=1 << 16).flip(0).cumsum(0)  # 0xFFFF first
    above = int((at_least < k).sum())
    return 0xFFFF - above, k - (int(at_least[above - 1]) if above else 0)


def group_modules(names: Iterable[str], scope: str) -> dict[str, list[str]]:
    """Sorted module names by group: "model", "layer", "projection" or "matrix".

    A layer is the first number among a name's dotted parts; a module without one
    is a group of its own. A projection is the last part of the name.
    """
    if scope not in SCOPES:
        raise ValueError(f"`scope` must be one of {', '.join(SCOPES)}, got {scope!r}")

    def key(name: str) -> str:
        if scope == "model":
            return ""
        if scope == "layer":
            number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
            return number.group(1) if number else name
        return name.rsplit(".", 1)[-1] if scope == "projection" else name

    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(key(name), []).append(name)
    return groups


def count(mask: Mapping[str, Tensor]) -> int:
    """How many entries are True."""
    return sum(int(m.sum()) for m in mask.values())


def size(mask: Mapping[str, Tensor]) -> int:
    """How many entries there are."""
    return sum(m.numel() for m in mask.values())


def union(masks: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Entries that any of the masks holds; masks of the same modules and shapes."""
    out: dict[str, Tensor] = {}
    for mask in masks:
        for name, m in mask.items():
            out[name] = out[name] | m if name in out else m.clone()
    return out


def overlap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Share of the smaller mask's entries that the other holds too; 0 if one is empty."""
    both = sum(int((a[n] & b[n]).sum()) for n in a.keys() & b.keys())
    smaller = min(count(a), count(b))
    return both / smaller if smaller else 0.0


def capacity(used: Mapping[str, Tensor]) -> dict[str, float]:
    """Module name -> share of its entries that no mask has taken yet."""
    return {name: 1 - float(m.float().mean()) for name, m in sorted(used.items())}


def support(B: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries of B that are not zero."""
    return {name: b != 0 for name, b in B.items()}
