"""Which entries of B may train: magnitude masks, their overlap, the capacity left."""

from __future__ import annotations

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
        magnitude = torch.cat([B[n].detach().abs().float().flatten() for n in names])
        if not bool(torch.isfinite(magnitude).all()):
            raise ValueError("`B` holds values that are not finite; the calibration diverged")
        keep = round((1 - sparsity) * magnitude.numel())
        if exclude is not None:
            barred = torch.cat([exclude[n].to(magnitude.device).flatten() for n in names])
            magnitude = magnitude.masked_fill(barred, -1.0)
            keep = min(keep, int((~barred).sum()))
        flat = _largest(magnitude, keep)
        for name, part in zip(names, torch.split(flat, [B[n].numel() for n in names]), strict=True):
            masks[name] = part.view(B[name].shape)
    return masks


def _largest(magnitude: Tensor, keep: int) -> Tensor:
    """Bool mask of the `keep` largest of a 1-D tensor, earlier positions first on ties."""
    if keep == 0:
        return torch.zeros_like(magnitude, dtype=torch.bool)
    if keep == magnitude.numel():
        return torch.ones_like(magnitude, dtype=torch.bool)
    # Selecting the smaller side's boundary costs less memory than sorting everything.
    threshold = magnitude.kthvalue(magnitude.numel() - keep + 1).values
    mask = magnitude > threshold
    ties = (magnitude == threshold).nonzero().flatten()
    mask[ties[: keep - int(mask.sum())]] = True
    return mask


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
