"""The figures of continual learning over a line of merges, each version with other members.

A sequence teaches one task a stage, so its figures speak of R[i, i]. A line of merges may
bring in several tasks at once, or none (other weights, another method). Here s(j) is the
version that first held task j, V the last one, J the tasks that V holds, K those of J that
an earlier version held, and R[i, j], b[j] as in `continual`. With one new task a version
these are `continual`'s own figures. A figure is NaN where anything that it needs was not
measured and where it is not defined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lori_manager.metrics.continual import Figure


def merge_line_figures(
    R: ArrayLike,
    introduced: Sequence[int],
    base: ArrayLike,
    reference: ArrayLike,
    *,
    higher_is_better: bool = True,
) -> tuple[Figure, ...]:
    """ACC, LA, BWT, BWT_TRACE, FWT, F, I, and DELTA where there are tasks that are only scored.

    Args:
        R: (versions, tasks); the first `len(introduced)` columns are J, the others tasks
            that no version holds.
        introduced: for each of J, the row of R that first held it, from 0.
        base: (tasks,) scores of the untrained base.
        reference: (J,) scores of the tasks' own adapters.
        higher_is_better: False turns every difference.
    Raises:
        ValueError: shapes that do not fit, or a row that R does not have.
    Source: GEM, arXiv:1706.08840, MER, arXiv:1810.11910, TRACE, arXiv:2310.06762, RWalk,
    arXiv:1801.10112, with s(j) for the stage that trained task j.

    >>> figures = merge_line_figures([[0.8, 0.3], [0.6, 0.9]], [0, 1], [0.0, 0.1], [0.8, 0.9])
    >>> {f.symbol: round(f.value, 6) for f in figures}["BWT"]
    -0.2
    """
    M = np.asarray(R, dtype=np.float64)
    b, a = np.asarray(base, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    s = np.asarray(introduced, dtype=np.int64)
    if M.ndim != 2 or not 0 < s.size <= M.shape[1] or s.min() < 0 or s.max() >= len(M):
        raise ValueError(
            "`R` must be (versions, tasks) with a column for each task in `introduced` and a row "
            f"for each of its entries, got shape {M.shape} and {list(introduced)}"
        )
    if b.shape != (M.shape[1],) or a.shape != (s.size,):
        raise ValueError(
            f"expected {M.shape[1]} scores in `base` and {s.size} in `reference`, got shapes "
            f"{b.shape} and {a.shape}"
        )
    sign = 1.0 if higher_is_better else -1.0
    J = np.arange(s.size)
    K, L = J[s < len(M) - 1], J[s > 0]
    last, learned = M[-1, J], M[s, J]
    change = sign * (last - learned)
    earlier = sign * M[:-1, K]
    return (
        _figure("average accuracy", "ACC", last, higher_is_better, "1/|J| sum_J R[V,j]"),
        _figure("learning accuracy", "LA", learned, higher_is_better, "1/|J| sum_J R[s(j),j]"),
        _figure("backward transfer", "BWT", change[K], True, "1/|K| sum_K (R[V,j] - R[s(j),j])"),
        _figure(
            "backward transfer (TRACE)",
            "BWT_TRACE",
            change if K.size else change[K],
            True,
            "1/|J| sum_J (R[V,j] - R[s(j),j])",
        ),
        _figure(
            "forward transfer",
            "FWT",
            sign * (M[s[L] - 1, L] - b[L]),
            True,
            "1/|L| sum_{s(j)>1} (R[s(j)-1,j] - b[j])",
        ),
        _figure(
            "forgetting",
            "F",
            earlier.max(axis=0) - sign * last[K] if K.size else earlier[:0].reshape(-1),
            False,
            "1/|K| sum_K (max_{l<V} R[l,j] - R[V,j])",
        ),
        _figure(
            "intransigence", "I", sign * (a - learned), False, "1/|J| sum_J (a*[j] - R[s(j),j])"
        ),
        *_outside(sign * (M[-1, s.size :] - b[s.size :])),
    )


_SOURCES = {
    "LA": "MER, arXiv:1810.11910",
    "BWT_TRACE": "TRACE, arXiv:2310.06762",
    "F": "RWalk, arXiv:1801.10112",
    "I": "RWalk, arXiv:1801.10112",
    "DELTA": "TRACE, arXiv:2310.06762",
}


def _figure(
    name: str, symbol: str, terms: NDArray[np.float64], higher_is_better: bool, formula: str
) -> Figure:
    value = float(terms.mean()) if terms.size else math.nan
    source = _SOURCES.get(symbol, "GEM, arXiv:1706.08840") + ", over versions"
    return Figure(name, symbol, value, int(terms.size), higher_is_better, formula, source)


def _outside(change: NDArray[np.float64]) -> tuple[Figure, ...]:
    if not change.size:
        return ()
    formula = "1/M sum_{j not in J} (R[V,j] - b[j])"
    return (_figure("delta outside the merges", "DELTA", change, True, formula),)
