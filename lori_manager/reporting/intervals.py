"""95% intervals of scores and paired changes, and Holm's correction, for the report.

Source: Wilson 1927 for one share of rows; Agresti and Min 2005 (Statistics in Medicine 24)
for the paired difference of two; Holm 1979.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def change_interval(
    change: float, error: float, rows: int, lost: int | None, gained: int | None
) -> tuple[float, float]:
    """The interval of one paired change.

    Args:
        change, error: the mean difference and its standard error.
        rows: measured on both sides.
        lost, gained: discordant rows; None unless outcomes are right/wrong.
    Returns:
        Right/wrong: half a row added to each of the four counts, so that it is not empty
        where no row differs, and always holds `change`. Else change +- 1.96 errors.

    >>> low, high = change_interval(0.0, 0.0, 200, 0, 0)
    >>> round(high, 4)
    0.0097
    """
    if lost is None or gained is None or not rows:
        return change - Z * error, change + Z * error
    n = rows + 2
    middle = (gained - lost) / n
    half = Z * math.sqrt((gained + lost + 1) / n - middle * middle) / math.sqrt(n)
    return max(-1.0, min(change, middle - half)), min(1.0, max(change, middle + half))


def holm(p: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number; NaN stays NaN and is not counted.

    >>> holm([0.01, 0.04, float("nan"), 0.03])
    [0.03, 0.06, nan, 0.06]
    """
    order = sorted((i for i, x in enumerate(p) if not math.isnan(x)), key=lambda i: p[i])
    adjusted, least = [math.nan] * len(p), 0.0
    for position, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - position) * p[i]))
        adjusted[i] = least
    return adjusted
