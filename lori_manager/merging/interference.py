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
        rows: tuple[list[list[float]], ...] = ([[] for _ in updates], [[] for _ in updates])
        pairs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in updates]
        found = []
        for name, gram in grams[t].items():  # each is read once: it may have to be collected
            if name not in own or (whole := energy(own[name], gram)) <= 0:
                continue
            for s, other in enumerate(updates):
                if name in other:
                    shared = bases[t][name].t() @ bases[s][name]
                    rows[0][s].append(energy(other[name], gram) / whole)
                    rows[1][s].append(float(shared.square().sum()) / max(shared.shape[1], 1))
                    pairs[s].append((used[t][name], used[s][name]))
            having = [(u[name], w) for u, w in zip(updates, weights, strict=True) if name in u]
            parts = [*(u for u, _ in having), own[name]]
            off = concat_updates(parts, [*(w for _, w in having), -1.0])
            found.append(energy(off, gram) / whole)
        response.append(tuple(map(_mean, rows[0])))
        directions.append(tuple(map(_mean, rows[1])))
        entries.append(tuple(map(_overlap, pairs)))
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
