"""95% intervals of scores, for the report. Source: Wilson 1927 for a share of rows."""

from __future__ import annotations

import math

Z = 1.959963984540054  # the normal quantile of .975


def score_interval(value: float, error: float, rows: int) -> tuple[float, float]:
    """The interval of one score.

    Right/wrong outcomes, known by their error of sqrt(p (1 - p) / n), have Wilson's, which
    is not empty where all rows agree; all else value +- 1.96 errors.

    >>> low, high = score_interval(1.0, 0.0, 100)
    >>> round(low, 3), high
    (0.963, 1.0)
    """
    if rows and 0 <= value <= 1 and math.isclose(
        error, math.sqrt(value * (1 - value) / rows), abs_tol=1e-9
    ):  # fmt: skip
        share = Z * Z / rows
        middle = (value + share / 2) / (1 + share)
        half = Z * math.sqrt(value * (1 - value) / rows + share / (4 * rows)) / (1 + share)
        low = 0.0 if value == 0 else middle - half
        return low, 1.0 if value == 1 else middle + half
    return value - Z * error, value + Z * error
