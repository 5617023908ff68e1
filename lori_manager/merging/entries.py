"""What methods that look at single entries share: which entries, and the way back to factors.

An update has few numbers and many entries: B A of rank 32 at 4096 x 14336 has 0.6 million of
the one and 59 million of the other. `core` looks at the entries of the small matrices in the
members' shared frame; `full` makes the dense updates by row blocks of bounded memory, as many
times as it needs them, and keeps of the result the best factors of a given rank.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lori_manager.engine.core import Core, core_form
from lori_manager.engine.decompose import qr, svd
from lori_manager.engine.update import LowRankUpdate
from lori_manager.engine.weights import AdapterWeights
from lori_manager.merging.methods import MergeOptions, module_by_module

logger = logging.getLogger(__name__)

# The most that the dense row blocks of one module take together, in bytes.
BLOCK_BYTES = 256 * 2**20

# So many entries of a matrix are selected from in one go.
AT_ONCE = 2**22

# Weighted values that cancel to less than this share of their magnitudes elect no sign.
CANCELLED = 1e-6

# Each call goes over one matrix anew: its row blocks, from the first row on.
Blocks = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Matrix:
    """One member's entries in one module.

    Attributes:
        shape: (rows, columns) of the whole.
        blocks: its row blocks, all columns wide.
        key: for draws, made when one is; of the seed, the module and the member's own content,
            all of which is read for it.
    """

    shape: tuple[int, int]
    blocks: Blocks
    key: Callable[[], int]

    def draws(self) -> np.random.Generator:
        """The draws of this matrix, from the first: the same on every device."""
        return np.random.Generator(np.random.Philox(key=self.key()))


# A member's entries and the density -> what is left of them.
Prune = Callable[[Matrix, float], Blocks]
# The members' blocks, their weights and the sum of all members' |weight| -> the merged block.
Fuse = Callable[[Sequence[Tensor], Sequence[float], float], Tensor]


def merge_entries(
    name: str,
    members: Sequence[AdapterWeights],
    weights: Sequence[float],
    options: MergeOptions,
    prune: Prune,
    fuse: Fuse,
) -> AdapterWeights:
    """Prune each member's entries by themselves, then fuse them entry by entry.

    Members of weight 0 are left out, of the frame too. A member that does not update a
    module counts there as one whose update is zero.

    Args:
        name: of the method, for the log.
        members, weights, options: as the method was given them; `space`, `density`, `seed`
            and `max_rank` count.
        prune, fuse: the method.
    Returns:
        In `core` exactly what was fused. In `full` its factors of rank `max_rank`, by
        default the sum of the members' ranks; the relative error of that is logged.
    Raises:
        ValueError: no members, or not one weight per member.
    """
    whole = float(sum(abs(w) for w in weights))
    errors: list[tuple[float, float, str]] = []

    def merge(module: str, updates: list[LowRankUpdate], shares: list[float]) -> LowRankUpdate:
        keys = [partial(draw_key, options.seed, module, u) for u in updates]
        frame = shared_frame(updates) if options.space == "core" else None
        if frame is not None:
            matrices = [
                Matrix((core.shape[0], core.shape[1]), _one_block(core), key)
                for core, key in zip(frame.cores, keys, strict=True)
            ]
        else:
            rows = rows_at_once(updates[0].shape, len(updates))
            matrices = [
                Matrix(u.shape, dense_blocks(u, rows), key)
                for u, key in zip(updates, keys, strict=True)
            ]
        pruned = [prune(matrix, options.density) for matrix in matrices]

        def fused() -> Iterator[Tensor]:
            for parts in zip(*(blocks() for blocks in pruned), strict=True):
                yield fuse(parts, shares, whole)

        if frame is not None:
            return single(frame.update(torch.cat(list(fused()))))
        rank = options.max_rank or sum(u.rank for u in updates)
        found, lost, total = best_factors(fused, updates[0].shape, rank, updates[0].B.device)
        errors.append((lost, total, module))
        return found

    together = options.space == "core"  # the blocks of one full matrix are large enough
    merged = module_by_module(members, weights, merge, options.max_rank, together=together)
    if errors:
        lost, total = sum(e[0] for e in errors), sum(e[1] for e in errors)
        worst, module = max((_relative(e[0], e[1]), e[2]) for e in errors)
        logger.info(
            "%s in full space: kept at rank %d, relative error %.2g, at most %.2g (%s)",
            *(name, merged.rank, _relative(lost, total), worst, module),
        )
    return merged


def _relative(lost: float, total: float) -> float:
    return float((lost / total) ** 0.5) if total else 0.0


# ---- the shared frame


def shared_frame(updates: Sequence[LowRankUpdate]) -> Core:
    """The updates in the frame of the singular vectors of their stacked A and stacked B.

    Unlike a QR's, these axes do not depend on the order of the updates (but for signs, and
    where singular values are equal). Axes that no update uses are left out, so that members
    which share one A have as many rows of A as one has. Float64. Source: Core Space,
    arXiv:2509.17786. Differs: the scaling belongs to B.
    """
    core = core_form(updates, torch.float64)
    B = torch.cat([u.B.double() * u.scaling for u in updates], dim=1)
    A = torch.cat([u.A.double() for u in updates])
    left, right = _axes(core.U.t() @ B), _axes(core.V @ A.t())
    return Core(core.U @ left, right.t() @ core.V, left.t() @ core.cores @ right)


def _axes(stacked: Tensor) -> Tensor:
    """The left singular vectors that count, at least one."""
    vectors: Tensor
    vectors, values, _ = svd(stacked)
    count = int((values > 1e-10 * values[0]).sum())  # the factors are float32
    return vectors[:, : max(count, 1)]


def single(update: LowRankUpdate) -> LowRankUpdate:
    """The update in float32."""
    return LowRankUpdate(update.A.float(), update.B.float(), update.scaling)


def _one_block(core: Tensor) -> Blocks:
    return lambda: iter([core])


# ---- the dense updates


def rows_at_once(shape: tuple[int, int], members: int) -> int:
    """How many rows of every member's dense update are in memory at one time."""
    return max(1, BLOCK_BYTES // (shape[1] * entry_bytes(members)))


def entry_bytes(members: int) -> int:
    """What one entry of a block takes at most while a merge of so many members goes on."""
    # A sort with its ranks and draws, or a histogram's keys, of one member at a time; and for
    # each member its block, what tells the entries to keep, and two pruned blocks.
    return 128 + 32 * members


def dense_blocks(update: LowRankUpdate, rows: int) -> Blocks:
    """scaling * B @ A by blocks of that many rows."""
    A, B = update.A, update.B * update.scaling

    def blocks() -> Iterator[Tensor]:
        for start in range(0, B.shape[0], rows):
            yield B[start : start + rows] @ A

    return blocks


def best_factors(
    blocks: Blocks, shape: tuple[int, int], rank: int, device: torch.device
) -> tuple[LowRankUpdate, float, float]:
    """Factors of about the best rank-`rank` approximation of a matrix seen by row blocks.

    A randomised range finder with one power iteration: four passes, and no memory but that
    of a block and of matrices `rank` and a half wide. Exact where the rank is the matrix's.

    Returns:
        The update, what it misses and the whole, both as squared Frobenius norms (the
        first to about 1e-7 of the second).
    Source: Halko, Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4.
    """
    rank = min(rank, *shape)
    size = min(rank + max(10, rank // 2), *shape)
    random = torch.randn(shape[1], size, generator=torch.Generator().manual_seed(0))

    def times(right: Tensor) -> Tensor:
        return torch.cat([block @ right for block in blocks()])

    def transposed_times(left: Tensor) -> tuple[Tensor, float]:
        out, total, start = left.new_zeros(shape[1], left.shape[1]), 0.0, 0
        for block in blocks():
            out += block.t() @ left[start : start + len(block)]
            total += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
            start += len(block)
        return out, total

    along, _ = transposed_times(qr(times(random.to(device)))[0])
    Q = qr(times(qr(along)[0]))[0]
    projected, total = transposed_times(Q)
    left, values, right = svd(projected.t())
    root = values[:rank].sqrt()
    kept = float(values[:rank].double().square().sum())
    update = LowRankUpdate(root[:, None] * right[:rank], (Q @ left[:, :rank]) * root)
    return update, max(0.0, total - kept), total


# ---- pruning


def draw_key(seed: int, module: str, update: LowRankUpdate) -> int:
    """The key of a member's draws: of its own content, not of its place among the members."""
    h = hashlib.sha256(f"{seed}\0{module}\0".encode())
    h.update(struct.pack("<d", update.scaling))
    for factor in (update.A, update.B):
        h.update(np.ascontiguousarray(factor.detach().float().cpu().numpy()).tobytes())
    return int.from_bytes(h.digest()[:16], "little")


def keep_largest(matrix: Matrix, density: float) -> Blocks:
    """The round(density * n) entries of largest magnitude, at least one; the rest are zero.

    Entries of equal magnitude are kept from the first row on.
    """
    size = matrix.shape[0] * matrix.shape[1]
    count = max(1, round(density * size))
    if count >= size:
        return matrix.blocks
    least, equals = _least_kept(matrix.blocks, count, size)

    def blocks() -> Iterator[Tensor]:
        left = equals
        for block in matrix.blocks():
            keys = _keys(block)
            keep = keys > least
            if left:
                found = (keys == least).flatten().nonzero().flatten()[:left]
                keep.view(-1)[found] = True
                left -= len(found)
            del keys
            yield block.masked_fill(~keep, 0.0)

    return blocks


def _keys(block: Tensor) -> Tensor:
    """Magnitudes as integers: floats of 0 or more are ordered as their bits are."""
    return block.abs().view(torch.int64 if block.dtype == torch.float64 else torch.int32)


def _least_kept(blocks: Blocks, count: int, size: int) -> tuple[int, int]:
    """The key of the `count`-th largest of `size` magnitudes, and how many equal to it count.

    Of one small block by selection, else by one pass and one histogram for every 16 bits of
    the key, from the uppermost down.
    """
    first = next(blocks())
    if first.numel() == size <= AT_ONCE:
        keys = _keys(first).flatten()
        least = int(keys.kthvalue(size - count + 1).values)
        return least, count - int((keys > least).sum())
    bits = 8 * first.element_size()
    found = 0
    for shift in range(bits - 16, -1, -16):
        histogram = torch.zeros(1 << 16, dtype=torch.int64)
        for block in blocks():
            keys = _keys(block).flatten()
            if shift + 16 < bits:
                keys = keys[keys >> (shift + 16) == found]
            histogram += torch.bincount((keys >> shift) & 0xFFFF, minlength=1 << 16).cpu()
        at_least = histogram.flip(0).cumsum(0)  # 0xFFFF first
        above = int((at_least < count).sum())
        count -= int(at_least[above - 1]) if above else 0
        found = found << 16 | (0xFFFF - above)
    return found, count


# ---- fusing


def weighted_sum(parts: Sequence[Tensor], weights: Sequence[float], _: float) -> Tensor:
    """sum_t weights[t] * parts[t]."""
    out = parts[0] * weights[0]
    for part, w in zip(parts[1:], weights[1:], strict=True):
        out.add_(part, alpha=w)
    return out


def elected_mean(parts: Sequence[Tensor], weights: Sequence[float], whole: float) -> Tensor:
    """whole * sum of w_t x_t / sum of |w_t|, over the members whose w_t x_t has the elected sign.

    The elected sign is that of sum_t w_t x_t; where they cancel, none is and the entry is 0.
    """
    total = weighted_sum(parts, weights, whole)
    mass = parts[0].abs() * abs(weights[0])
    for part, w in zip(parts[1:], weights[1:], strict=True):
        mass += part.abs().mul_(abs(w))
    sign = total.sign().masked_fill_(total.abs() <= CANCELLED * mass, 0.0)
    del total, mass
    above, below = torch.zeros_like(sign), torch.zeros_like(sign)
    for part, w in zip(parts, weights, strict=True):
        agrees = part * (sign * w) > 0
        above += (part * w).masked_fill_(~agrees, 0.0)
        below += agrees * abs(w)
    return above.mul_(whole).div_(below.masked_fill_(below == 0, 1.0))
