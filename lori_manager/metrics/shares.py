"""The share of right rows and its error, without numpy: what a list of scores needs."""

from __future__ import annotations

import math


def share_and_error(right: int, rows: int) -> tuple[float, float]:
    """The share p of right rows and its standard error sqrt(p (1 - p) / n); n is at least 1.

    >>> share_and_error(3, 4)
    (0.75, 0.21650635094610965)
    """
    p = right / rows
    return p, math.sqrt(p * (1 - p) / rows)
