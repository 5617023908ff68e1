"""How much members get in each other's way, from their factors and their tasks' inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from lori_manager.engine.mask import support
from lori_manager.engine.update import LowRankUpdate, concat_updates
from lori_manager.engine.weights import AdapterWeights
from lori_manager.merging.methods import Grams

Table = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Interference:
    """Means over modules; row t, column s.

    Attributes:
        response: E ||D_s x_t||^2 / E ||D_t x_t||^2 on member t's own inputs: how loud s speaks
            where t is asked. 1 on the diagonal.
        directions: share of the directions of s's outputs (the columns of its B) that lie in
            those of t's.
        entries: entries of B that both use, of those that either does; NaN where shapes differ.
        error: for each member E ||(sum_s w_s D_s - D_t) x_t||^2 / E ||D_t x_t||^2: what the
            weighted sum gets wrong of its own update, on its own inputs; 0 is nothing, at 1 it
            is as wrong as having none.
    """

    response: Table
    directions: Table
    entries: Table
    error: tuple[float, ...]


def interference(
    members: Sequence[AdapterWeights], weights: Sequence[float], grams: Grams
) -> Interference:
    """Look at every pair of members in every module that both update.

    Args:
        members, weights: as of a merge. Not modified.
        grams: for each member module -> E[x x'] of its own task's inputs.
    Raises:
        ValueError: unequal counts.
    """
    if not len(members) == len(weights) == len(grams):
        raise ValueError(f"got {len(members)} members, {len(weights)} weights, {len(grams)} grams")
    updates = [member.updates() for member in members]
    used = [support({n: u.B for n, u in one.items()}) for one in updates]
    bases = [{name: _directions(u.B) for name, u in one.items()} for one in updates]
    response: list[tuple[float, ...]] = []
    directions: list[tuple[float, ...]] = []
    entries: list[tuple[float, ...]] = []
    errors: list[float] = []
    for t, own in enumerate(updates):
        whole = {name: energy(u, grams[t][name]) for name, u in own.items()}
        rows: tuple[list[float], list[float], list[float]] = ([], [], [])
        for s, other in enumerate(updates):
            both = [name for name in own if name in other and whole[name] > 0]
            rows[0].append(_mean([energy(other[n], grams[t][n]) / whole[n] for n in both]))
            shared = [bases[t][n].t() @ bases[s][n] for n in both]
            rows[1].append(_mean([float(m.square().sum()) / max(m.shape[1], 1) for m in shared]))
            rows[2].append(_overlap([(used[t][n], used[s][n]) for n in both]))
        for table, row in zip((response, directions, entries), rows, strict=True):
            table.append(tuple(row))
        found = []
        for name, update in own.items():
            having = [(u[name], w) for u, w in zip(updates, weights, strict=True) if name in u]
            parts = [*(u for u, _ in having), update]
            off = concat_updates(parts, [*(w for _, w in having), -1.0])
            if whole[name] > 0:
                found.append(energy(off, grams[t][name]) / whole[name])
        errors.append(_mean(found))
    return Interference(tuple(response), tuple(directions), tuple(entries), tuple(errors))


def energy(update: LowRankUpdate, gram: Tensor) -> float:
    """E ||D x||^2 of inputs with these second moments, by factors alone."""
    A = update.A.to(gram.device, torch.float64)
    B = update.B.to(gram.device, torch.float64)
    inner = A @ gram.double() @ A.t()
    return float((inner * (B.t() @ B)).sum()) * update.scaling**2


def _directions(B: Tensor) -> Tensor:
    """An orthonormal basis of B's columns, (out_features, k)."""
    left, values, _ = torch.linalg.svd(B.double(), full_matrices=False)
    basis: Tensor = left[:, values > 1e-6 * values[0]] if float(values[0]) > 0 else left[:, :0]
    return basis


def _overlap(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    if not pairs or any(a.shape != b.shape for a, b in pairs):
        return float("nan")
    either = sum(int((a | b).sum()) for a, b in pairs)
    return sum(int((a & b).sum()) for a, b in pairs) / either if either else float("nan")


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else float("nan")


def worst_pair(names: Sequence[str], found: Interference) -> tuple[str, str, float] | None:
    """The two members that speak loudest into each other, and how loud; None for one member."""
    pairs: Mapping[tuple[int, int], float] = {
        (t, s): max(found.response[t][s], found.response[s][t])
        for t in range(len(names))
        for s in range(t)
    }
    if not pairs:
        return None
    t, s = max(pairs, key=pairs.__getitem__)
    return names[s], names[t], pairs[t, s]
