"""Scores of one group compared row by row, many pairs at a time.

Right/wrong outcomes are held as bits, so that the discordant rows of five hundred pairs
are a few operations on whole arrays; everything else is compared pair by pair.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lori_manager.auditing.groups import Group, Ranking
from lori_manager.auditing.reading import AuditStore, Outcomes
from lori_manager.auditing.results import Comparison
from lori_manager.comparing import ONE_SIDED, graded_change
from lori_manager.metrics.bounds import Bounds, score_bounds
from lori_manager.metrics.paired import MCNEMAR, PairedDifference, mcnemar_exact, paired_difference
from lori_manager.records import Score, Task

Pair = tuple[Score, Score]  # before, after
# Few counts are met again and again.
_mcnemar = lru_cache(maxsize=65536)(mcnemar_exact)
_score_bounds = lru_cache(maxsize=65536)(score_bounds)


@dataclass(frozen=True, slots=True)
class _Bits:
    """Right/wrong outcomes: (rows / 8,) uint8, a bit a row; 0 in both where not measured."""

    right: NDArray[np.uint8]
    measured: NDArray[np.uint8]


class Loaded:
    """Outcomes of scores, each read once, in bulk."""

    def __init__(self, store: AuditStore) -> None:
        self._store = store
        self._outcomes: dict[int, Outcomes] = {}
        self._bits: dict[int, _Bits] = {}

    def load(self, scores: Iterable[Score]) -> None:
        """Read those that are not here yet."""
        missing = list({s.id: s for s in scores if s.id not in self._outcomes}.values())
        if not missing:
            return
        found = self._store.outcomes_of(missing)
        by_size: dict[int, list[int]] = {}
        for score, own in zip(missing, found, strict=True):
            self._outcomes[score.id] = own
            if own[1] is None:
                by_size.setdefault(len(own[0]), []).append(score.id)
        for ids in by_size.values():
            X = np.stack([self._outcomes[i][0] for i in ids])
            measured, right = ~np.isnan(X), X == 1
            binary = (right | (X == 0) | ~measured).all(axis=1)
            right_bits, measured_bits = np.packbits(right, axis=1), np.packbits(measured, axis=1)
            for row in np.flatnonzero(binary).tolist():
                self._bits[ids[row]] = _Bits(right_bits[row], measured_bits[row])

    def of(self, score: Score) -> Outcomes:
        """Outcomes and weights, each (rows,)."""
        return self._outcomes[score.id]

    def bits(self, score: Score) -> _Bits | None:
        """The outcomes as bits; None unless right/wrong and without weights."""
        return self._bits.get(score.id)


class Comparer(Ranking):
    """Compares scores of one group."""

    def __init__(self, loaded: Loaded, group: Group, task: Task) -> None:
        """`task` is the revision that the group is on."""
        super().__init__(group, task)
        self._loaded = loaded
        self._differences: dict[tuple[int, int], PairedDifference | str] = {}

    def worse(self, d: PairedDifference) -> bool:
        """Whether a difference is to the worse."""
        return d.difference < 0 if self.higher_is_better else d.difference > 0

    def differences(self, pairs: Sequence[Pair]) -> list[PairedDifference | str]:
        """How far each pair's second is from its first; a reason where that cannot be said."""
        new = {(a.id, b.id): (a, b) for a, b in pairs if (a.id, b.id) not in self._differences}
        found = differences(self._loaded, list(new.values()))
        self._differences |= zip(new, found, strict=True)
        return [self._differences[a.id, b.id] for a, b in pairs]

    def compare(self, pairs: Sequence[Pair]) -> list[Comparison]:
        """The paired comparisons of each pair's second against its first, p not corrected."""
        found = self.differences(pairs)
        return [self._comparison(a, b, d) for (a, b), d in zip(pairs, found, strict=True)]

    def _comparison(self, before: Score, after: Score, d: PairedDifference | str) -> Comparison:
        notes = []
        if before.precision != after.precision and before.precision and after.precision:
            notes.append(f"in {after.precision}, {before.subject} in {before.precision}")
        if before.origin != after.origin:
            notes.append(f"{after.origin}, {before.subject} {before.origin}")
        if before.encoding != after.encoding and before.encoding and after.encoding:
            notes.append(f"{before.subject}'s rows were cut or made into tokens in another way")
        if isinstance(d, str):
            note = "; ".join([*notes, d])
            return Comparison(before.subject, note=note, precision=before.precision)
        if d.rows == 0:
            notes.append("no row was measured in both")
        bounds = self._bounds(before, after, d)
        if bounds is not None and math.isinf(bounds.lower):
            notes.append(f"interval: {bounds.note}")
        return Comparison(
            before.subject,
            d.difference,
            d.error,
            d.p,
            d.test,
            d.rows,
            d.rows_only_a,
            d.rows_only_b,
            gained=d.only_b_right,
            lost=d.only_a_right,
            worse=self.worse(d),
            note="; ".join(notes),
            low=bounds.lower if bounds is not None else math.nan,
            high=bounds.upper if bounds is not None else math.nan,
            interval=bounds.method if bounds is not None else "",
            precision=before.precision,
        )

    def _bounds(self, before: Score, after: Score, d: PairedDifference) -> Bounds | None:
        """The 95% interval of the change: two one-sided bounds, 2.5% on either side."""
        if d.rows == 0:
            return None
        if d.only_a_right is not None and d.only_b_right is not None:
            return _score_bounds(d.only_a_right, d.only_b_right, d.rows, ONE_SIDED)
        (a, weights_a), (b, weights_b) = self._loaded.of(before), self._loaded.of(after)
        w = weights_a if weights_b is None else weights_b
        return graded_change(a, b, w, self.higher_is_better)


def differences(loaded: Loaded, pairs: Sequence[Pair]) -> list[PairedDifference | str]:
    """How far each pair's second is from its first; a reason where that cannot be said.

    The two of a pair are on the same rows; other pairs may be on other tasks.
    """
    loaded.load(score for pair in pairs for score in pair)
    found: dict[int, PairedDifference | str] = {}
    binary: dict[int, list[tuple[int, _Bits, _Bits]]] = defaultdict(list)  # by their size
    for i, (a, b) in enumerate(pairs):
        bits_a, bits_b = loaded.bits(a), loaded.bits(b)
        if bits_a is None or bits_b is None:
            found[i] = _difference(loaded.of(a), loaded.of(b))
        else:
            binary[bits_a.right.size].append((i, bits_a, bits_b))
    for own in binary.values():
        places, before, after = zip(*own, strict=True)
        found |= zip(places, _of_bits(before, after), strict=True)
    return [found[i] for i in range(len(pairs))]


def _difference(before: Outcomes, after: Outcomes) -> PairedDifference | str:
    (a, weights_a), (b, weights_b) = before, after
    if weights_a is not None and weights_b is not None and a.shape == b.shape:
        common = ~(np.isnan(a) | np.isnan(b))
        if not np.array_equal(weights_a[common], weights_b[common]):
            return "the rows are weighted differently, so nothing can be compared"
    return paired_difference(a, b, weights_a if weights_b is None else weights_b)


def _of_bits(before: Sequence[_Bits], after: Sequence[_Bits]) -> list[PairedDifference]:
    """`paired_difference` of right/wrong outcomes, for all pairs at once."""
    A, B = np.stack([x.right for x in before]), np.stack([x.right for x in after])
    MA, MB = np.stack([x.measured for x in before]), np.stack([x.measured for x in after])
    both_measured = MA & MB
    counts = [
        np.bitwise_count(bits).sum(axis=1, dtype=np.int64).tolist()
        for bits in (
            both_measured,
            MA & ~MB,
            MB & ~MA,
            A & B & both_measured,
            A & ~B & both_measured,
            B & ~A & both_measured,
        )
    ]
    return [_of_counts(*own) for own in zip(*counts, strict=True)]


def _of_counts(
    rows: int, rows_only_a: int, rows_only_b: int, both: int, only_a: int, only_b: int
) -> PairedDifference:
    if rows == 0:
        return PairedDifference(math.nan, math.nan, math.nan, "", 0, rows_only_a, rows_only_b)
    change = (only_b - only_a) / rows
    variance = max(0.0, (only_a + only_b) / rows - change**2)
    return PairedDifference(
        change,
        math.sqrt(variance / rows),
        _mcnemar(only_a, only_b),
        MCNEMAR,
        rows,
        rows_only_a,
        rows_only_b,
        both,
        only_a,
        only_b,
    )
