"""Several tests at once: p-values that hold for all of them together."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down p-values: the chance of any false alarm is at most the level compared with.

    The i-th smallest of m becomes max over j <= i of (m - j + 1) p_(j), at most 1. Valid
    however the tests depend on one another.

    Args:
        p_values: (tests,) in [0, 1]; NaN where nothing could be tested. Not modified.
    Returns:
        (tests,) in the order given. A NaN stays NaN and does not count among the tests.
    Raises:
        ValueError: not one-dimensional, or a number outside [0, 1].
    Source: Holm 1979, Scandinavian Journal of Statistics 6, 65-70.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1:
        raise ValueError(f"`p_values` must be one number per test, got shape {p.shape}")
    tested = ~np.isnan(p)
    if np.any((p[tested] < 0) | (p[tested] > 1)):
        raise ValueError("`p_values` must be in [0, 1], or NaN where nothing was tested")
    found = p[tested]
    order = np.argsort(found, kind="stable")
    left = np.arange(found.size, 0, -1)
    adjusted = np.empty_like(found)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(left * found[order]))
    result = np.full_like(p, np.nan)
    result[tested] = adjusted
    return result
