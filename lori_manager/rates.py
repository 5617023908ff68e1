"""Which learning rate to try next: a small search on a geometric grid.

Short trainings find where to look, and favour rates that are too high for a long one: what
learns fastest is ahead when they end. So the last word is that of trainings of full length.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

FACTOR = 3.0
DIGITS = (3, 6, 12)  # of a rate: the fewest that tell it from those tried


def next_rate(tried: Mapping[float, float], usual: float, factor: float = FACTOR) -> float:
    """The rate to measure next.

    First the usual one, then `factor` times more and less. After that the search goes on past
    the best where it is the largest or smallest tried, and else halves, in logarithms, the
    gap between it and its better neighbour.

    Args:
        tried: rate -> loss, lower is better; not finite where training diverged.
        usual: where to begin, above 0.
        factor: between neighbours, above 1.
    Raises:
        ValueError: `usual` or `factor` out of range, or so many tried that no further rate can
            be told from them (more than twenty).

    >>> next_rate({1.0: 0.5, 3.0: 0.4, 0.333: 0.7}, 1.0)
    9.0
    """
    if usual <= 0 or factor <= 1:
        raise ValueError(f"`usual` must be above 0 and `factor` above 1, got {usual}, {factor}")
    for first in (_told(usual), _told(usual * factor), _told(usual / factor)):
        if first not in tried:
            return first
    best, ordered = best_rate(tried), sorted(tried)
    at = ordered.index(best)
    if at == len(ordered) - 1:
        return _told(best * factor, tried)
    if at == 0:
        return _told(best / factor, tried)
    neighbour = best_rate({rate: tried[rate] for rate in (ordered[at - 1], ordered[at + 1])})
    return _told(math.sqrt(best * neighbour), tried)


def next_full_rate(
    tried: Mapping[float, float], start: float, most: int, factor: float = FACTOR
) -> float | None:
    """The rate to measure next at full length: from `start` down for as long as that helps.

    Args:
        tried: rate -> loss at full length.
        start: the best of short trainings.
        most: measurements.
        factor: between neighbours, above 1.
    Returns:
        None once a lower rate was worse, or `most` are measured.

    >>> next_full_rate({3.0: 0.5}, 3.0, 3)
    1.0
    >>> next_full_rate({3.0: 0.5, 1.0: 0.6}, 3.0, 3) is None
    True
    """
    if len(tried) >= most:
        return None
    if not tried:
        return start
    lowest = min(tried)
    return _told(lowest / factor, tried) if best_rate(tried) == lowest else None


def best_rate(tried: Mapping[float, float]) -> float:
    """The rate of the lowest loss; the lowest rate of equal ones, or where all diverged.

    >>> best_rate({1e-3: 0.5, 3e-3: 0.5, 1e-2: float("inf")})
    0.001
    """
    return min(tried, key=lambda rate: (_finite(tried[rate]), rate))


def at_edge(tried: Mapping[float, float], full: Mapping[float, float] | None = None) -> bool:
    """Whether the best is the largest or smallest tried, so that a better one may lie beyond.

    Args:
        tried: rate -> loss of short trainings.
        full: the same at full length, where there are any: the best is theirs.
    """
    if full:
        return best_rate(full) in (min(full), max(tried))
    return len(tried) > 0 and best_rate(tried) in (min(tried), max(tried))


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _told(rate: float, tried: Collection[float] = ()) -> float:
    for digits in DIGITS:
        told = float(f"{rate:.{digits}g}")
        if told not in tried:
            return told
    raise ValueError(f"rates near {rate:g} cannot be told apart any more")
