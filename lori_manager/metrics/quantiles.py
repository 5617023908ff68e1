"""Quantiles of the normal and of Student's distribution, without scipy."""

from __future__ import annotations

import math
from statistics import NormalDist

_NORMAL = NormalDist()


def normal_quantile(level: float) -> float:
    """z with P(Z <= z) = level, for level in (0, 1).

    >>> round(normal_quantile(0.975), 6)
    1.959964
    """
    return _NORMAL.inv_cdf(level)


def normal_below(z: float) -> float:
    """P(Z <= z).

    >>> normal_below(0.0)
    0.5
    """
    return 0.5 * math.erfc(-z / math.sqrt(2.0))  # keeps its digits far below 0


def student_quantile(level: float, degrees: int) -> float:
    """t with P(T <= t) = level, for `degrees` degrees of freedom.

    The expansion around the normal quantile: within 1% from 3 degrees at levels between
    .01 and .99, within .0001 from 15.
    Raises:
        ValueError: no degrees of freedom.
    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.

    >>> round(student_quantile(0.95, 20), 4)
    1.7247
    """
    if degrees < 1:
        raise ValueError(f"`degrees` must be at least 1, got {degrees}")
    z = normal_quantile(level)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / float(degrees) ** i for i, term in enumerate(terms, 1))


def student_two_sided(t: float, degrees: int) -> float:
    """P(|T| >= |t|) for Student's T with a whole number of degrees of freedom, exactly.

    Not resolved below about 1e-15.
    Raises:
        ValueError: no degrees of freedom.
    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.

    >>> round(student_two_sided(4.302653, 2), 6)
    0.05
    """
    if degrees < 1:
        raise ValueError(f"`degrees` must be at least 1, got {degrees}")
    angle = math.atan(abs(t) / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for i in range(2 + odd, degrees - 1, 2):
        term *= square * (i - 1) / i
        total += term
    within = (2 / math.pi) * (angle + sine * total) if odd else sine * total
    return min(1.0, max(0.0, 1.0 - within))


def student_two_sided_quantile(confidence: float, degrees: int) -> float:
    """t with P(|T| <= t) = confidence, by bisection.

    >>> round(student_two_sided_quantile(0.95, 2), 4)
    4.3027
    """
    low, high = 0.0, 1.0
    while student_two_sided(high, degrees) > 1 - confidence:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        if student_two_sided(middle, degrees) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high
