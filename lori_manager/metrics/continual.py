"""The figures of continual learning, each by name, denominator and sign.

Libraries mean different things by the same word, so every figure carries its formula.

Symbols: R[i, j] is the score of task j after training stage i, NaN where not measured;
stage i trains task i, for i = 1..T; b[j] is the score of the untrained base. R is
(T, tasks) with tasks >= T: further columns are tasks that are never trained, which only
`outside_delta` reads. A figure is NaN where anything that it needs was not measured, and
where it is not defined (most of them for T = 1): never 0 for want of a number.

Scores where lower is better (perplexity in nats) go in as they are, with
`higher_is_better=False`: means stay in their own units, and every difference is turned,
so that its sign keeps its meaning. R must not mix the two kinds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Figure:
    """One named figure."""

    name: str
    symbol: str
    value: float  # NaN where not measured or not defined
    denominator: int  # how many terms are averaged; 0 where not defined
    higher_is_better: bool
    formula: str
    source: str


def _matrix(R: ArrayLike) -> NDArray[np.float64]:
    M = np.asarray(R, dtype=np.float64)
    if M.ndim != 2 or M.shape[0] < 1 or M.shape[1] < M.shape[0]:
        raise ValueError(
            "`R` must be (stages, tasks) with at least one stage and a column for each stage's "
            f"task, got shape {M.shape}"
        )
    return M


def _vector(values: ArrayLike, length: int, name: str) -> NDArray[np.float64]:
    v = np.asarray(values, dtype=np.float64)
    if v.shape != (length,):
        raise ValueError(f"`{name}` must have one score per task, {length}, got shape {v.shape}")
    return v


def _mean(terms: NDArray[np.float64]) -> float:
    return float(terms.mean()) if terms.size else math.nan


def _sign(higher_is_better: bool) -> float:
    return 1.0 if higher_is_better else -1.0


def average_accuracy(R: ArrayLike, *, higher_is_better: bool = True) -> Figure:
    """ACC = 1/T sum_j R[T, j]: the mean over the taught tasks after the last stage.

    Args:
        R: (T, tasks).
    Source: GEM, arXiv:1706.08840. TRACE calls it overall performance (OP).

    >>> average_accuracy([[0.8, 0.1], [0.6, 0.9]]).value
    0.75
    """
    M = _matrix(R)
    T = len(M)
    return Figure(
        "average accuracy",
        "ACC",
        _mean(M[-1, :T]),
        T,
        higher_is_better,
        "1/T sum_j R[T,j]",
        "GEM, arXiv:1706.08840",
    )


def learning_accuracy(R: ArrayLike, *, higher_is_better: bool = True) -> Figure:
    """LA = 1/T sum_j R[j, j]: the mean of each task just after its own stage.

    Args:
        R: (T, tasks).
    Source: MER, arXiv:1810.11910.

    >>> round(learning_accuracy([[0.8, 0.1], [0.6, 0.9]]).value, 6)
    0.85
    """
    M = _matrix(R)
    T = len(M)
    return Figure(
        "learning accuracy",
        "LA",
        _mean(np.diagonal(M[:, :T])),
        T,
        higher_is_better,
        "1/T sum_j R[j,j]",
        "MER, arXiv:1810.11910",
    )


def backward_transfer(R: ArrayLike, *, higher_is_better: bool = True) -> Figure:
    """BWT = 1/(T-1) sum_{i<T} (R[T, i] - R[i, i]): negative means forgotten. T = 1: NaN.

    Args:
        R: (T, tasks).
    Source: GEM, arXiv:1706.08840; avalanche's and Mammoth's are the same. Others differ:
    `trace_backward_transfer` divides by T, `all_stage_backward_transfer` takes every stage.

    >>> round(backward_transfer([[0.8, 0.1], [0.6, 0.9]]).value, 6)
    -0.2
    """
    M = _matrix(R)
    T = len(M)
    change = _sign(higher_is_better) * (M[-1, : T - 1] - np.diagonal(M[:, :T])[:-1])
    return Figure(
        "backward transfer",
        "BWT",
        _mean(change),
        T - 1,
        True,
        "1/(T-1) sum_{i<T} (R[T,i] - R[i,i])",
        "GEM, arXiv:1706.08840",
    )


def trace_backward_transfer(R: ArrayLike, *, higher_is_better: bool = True) -> Figure:
    """TRACE's BWT = 1/T sum_{i<=T} (R[T, i] - R[i, i]) = (T-1)/T of GEM's. T = 1: NaN.

    The term of the last task is always 0 and counts in the denominator, so one task
    would say 0 whatever happened: it is undefined here.

    Args:
        R: (T, tasks).
    Source: TRACE, arXiv:2310.06762; CoIN's (arXiv:2403.08350) and FusionBench's
    (`compute_backward_transfer` over all tasks) are the same, but 0 for T = 1.

    >>> round(trace_backward_transfer([[0.8, 0.1], [0.6, 0.9]]).value, 6)
    -0.1
    """
    M = _matrix(R)
    T = len(M)
    change = _sign(higher_is_better) * (M[-1, :T] - np.diagonal(M[:, :T]))
    return Figure(
        "backward transfer (TRACE)",
        "BWT_TRACE",
        _mean(change) if T > 1 else math.nan,
        T if T > 1 else 0,
        True,
        "1/T sum_{i<=T} (R[T,i] - R[i,i])",
        "TRACE, arXiv:2310.06762",
    )


def forward_transfer(R: ArrayLike, base: ArrayLike, *, higher_is_better: bool = True) -> Figure:
    """FWT = 1/(T-1) sum_{i>=2} (R[i-1, i] - b[i]): what earlier stages gave a coming task.

    T = 1: NaN.

    Args:
        R: (T, tasks), with the scores above the diagonal.
        base: (tasks,) scores of the untrained base.
    Source: GEM, arXiv:1706.08840; its b is a random initialisation, here it is the base model.

    >>> round(forward_transfer([[0.8, 0.3], [0.6, 0.9]], [0.0, 0.1]).value, 6)
    0.2
    """
    M = _matrix(R)
    b = _vector(base, M.shape[1], "base")
    T = len(M)
    change = _sign(higher_is_better) * (np.diagonal(M[:, :T], offset=1) - b[1:T])
    return Figure(
        "forward transfer",
        "FWT",
        _mean(change),
        T - 1,
        True,
        "1/(T-1) sum_{i>=2} (R[i-1,i] - b[i])",
        "GEM, arXiv:1706.08840",
    )


def forgetting(R: ArrayLike, *, higher_is_better: bool = True) -> Figure:
    """F = 1/(T-1) sum_{j<T} (max_{l<T} R[l, j] - R[T, j]): positive means forgotten. T = 1: NaN.

    The maximum runs over every stage before the last, also those before task j's own:
    a score missing there makes F NaN, because it might have been the best.

    Args:
        R: (T, tasks).
    Source: RWalk, arXiv:1801.10112. Others differ: `first_last_forgetting` (avalanche),
    `best_seen_forgetting` (Mammoth).

    >>> round(forgetting([[0.8, 0.1], [0.6, 0.9]]).value, 6)
    0.2
    """
    M = _sign(higher_is_better) * _matrix(R)
    T = len(M)
    drop = M[:-1, : T - 1].max(axis=0) - M[-1, : T - 1] if T > 1 else np.empty(0)
    return Figure(
        "forgetting",
        "F",
        _mean(drop),
        T - 1,
        False,
        "1/(T-1) sum_{j<T} (max_{l<T} R[l,j] - R[T,j])",
        "RWalk, arXiv:1801.10112",
    )


def intransigence(R: ArrayLike, reference: ArrayLike, *, higher_is_better: bool = True) -> Figure:
    """I = 1/T sum_k (a*[k] - R[k, k]): what each task lost by being learned in sequence.

    Args:
        R: (T, tasks).
        reference: (T,) a*, the scores of models trained jointly or on each task alone:
            say which beside the figure.
    Source: RWalk, arXiv:1801.10112, whose a* is joint training and which reports each
    I_k = a*[k] - R[k, k]. Differs: this is their mean over the taught tasks.

    >>> round(intransigence([[0.8, 0.1], [0.6, 0.7]], [0.9, 0.9]).value, 6)
    0.15
    """
    M = _matrix(R)
    T = len(M)
    a = _vector(reference, T, "reference")
    return Figure(
        "intransigence",
        "I",
        _mean(_sign(higher_is_better) * (a - np.diagonal(M[:, :T]))),
        T,
        False,
        "1/T sum_k (a*[k] - R[k,k])",
        "RWalk, arXiv:1801.10112, averaged",
    )


def outside_delta(R: ArrayLike, base: ArrayLike, *, higher_is_better: bool = True) -> Figure:
    """Delta = 1/M sum_{j>T} (R[T, j] - b[j]) over the M tasks that are never trained.

    TRACE's General, Instruction and Safety Delta are this over three sets of suites.

    Args:
        R: (T, tasks); the columns after the first T are the suites. None: NaN.
        base: (tasks,) scores of the untrained base.
    Source: TRACE, arXiv:2310.06762.

    >>> round(outside_delta([[0.8, 0.5]], [0.0, 0.6]).value, 6)
    -0.1
    """
    M = _matrix(R)
    b = _vector(base, M.shape[1], "base")
    T = len(M)
    return Figure(
        "delta outside the sequence",
        "DELTA",
        _mean(_sign(higher_is_better) * (M[-1, T:] - b[T:])),
        M.shape[1] - T,
        True,
        "1/M sum_{j>T} (R[T,j] - b[j])",
        "TRACE, arXiv:2310.06762",
    )


def first_last_forgetting(R: ArrayLike, *, higher_is_better: bool = True) -> Figure:
    """F_FIRST = 1/(T-1) sum_{j<T} (R[j, j] - R[T, j]): positive means forgotten. T = 1: NaN.

    The negative of GEM's backward transfer: a gain in between that was lost again does
    not count.

    Args:
        R: (T, tasks).
    Source: avalanche, `StreamForgetting` (its BWT is the negative of it).

    >>> round(first_last_forgetting([[0.8, 0.1], [0.6, 0.9]]).value, 6)
    0.2
    """
    bwt = backward_transfer(R, higher_is_better=higher_is_better)
    return Figure(
        "forgetting, first minus last",
        "F_FIRST",
        -bwt.value,
        bwt.denominator,
        False,
        "1/(T-1) sum_{j<T} (R[j,j] - R[T,j])",
        "avalanche",
    )


def best_seen_forgetting(R: ArrayLike, *, higher_is_better: bool = True) -> Figure:
    """F_SEEN = 1/(T-1) sum_{j<T} (max_{j<=l<=T} R[l, j] - R[T, j]), never below 0. T = 1: NaN.

    The maximum starts at task j's own stage and takes in the last one, so a task that
    gained counts as 0 and does not make up for another.

    Args:
        R: (T, tasks); nothing above the diagonal is read.
    Source: Mammoth, `utils/metrics.py`, whose rows hold only the tasks seen so far.

    >>> round(best_seen_forgetting([[0.8, 0.9], [0.6, 0.9]]).value, 6)
    0.2
    """
    M = _sign(higher_is_better) * _matrix(R)
    T = len(M)
    drops = [M[j:, j].max() - M[-1, j] for j in range(T - 1)]
    return Figure(
        "forgetting, best seen minus last",
        "F_SEEN",
        _mean(np.array(drops)),
        T - 1,
        False,
        "1/(T-1) sum_{j<T} (max_{j<=l<=T} R[l,j] - R[T,j])",
        "Mammoth",
    )


def mean_average_accuracy(R: ArrayLike, *, higher_is_better: bool = True) -> Figure:
    """MAA = 1/T sum_k (1/k sum_{j<=k} R[k, j]): ACC after every stage, averaged.

    Args:
        R: (T, tasks); nothing above the diagonal is read.
    Source: CoIN, arXiv:2403.08350; iCaRL's average incremental accuracy, arXiv:1611.07725.

    >>> round(mean_average_accuracy([[0.8, 0.1], [0.6, 0.9]]).value, 6)
    0.775
    """
    M = _matrix(R)
    T = len(M)
    stages = [M[k, : k + 1].mean() for k in range(T)]
    return Figure(
        "mean average accuracy",
        "MAA",
        _mean(np.array(stages)),
        T,
        higher_is_better,
        "1/T sum_k (1/k sum_{j<=k} R[k,j])",
        "CoIN, arXiv:2403.08350",
    )


def all_stage_accuracy(R: ArrayLike, *, higher_is_better: bool = True) -> Figure:
    """A = 2/(T(T+1)) sum_{i>=j} R[i, j]: the mean of everything on and below the diagonal.

    Args:
        R: (T, tasks).
    Source: Diaz-Rodriguez et al. 2018, arXiv:1810.13166.

    >>> round(all_stage_accuracy([[0.8, 0.1], [0.6, 0.9]]).value, 6)
    0.766667
    """
    M = _matrix(R)
    T = len(M)
    return Figure(
        "accuracy over all stages",
        "A",
        _mean(M[np.tril_indices(T)]),
        T * (T + 1) // 2,
        higher_is_better,
        "2/(T(T+1)) sum_{i>=j} R[i,j]",
        "Diaz-Rodriguez, arXiv:1810.13166",
    )


def all_stage_backward_transfer(R: ArrayLike, *, higher_is_better: bool = True) -> Figure:
    """BWT_ALL = 2/(T(T-1)) sum_{i>j} (R[i, j] - R[j, j]): over every later stage. T = 1: NaN.

    Its two halves, with scores in [0, 1]: remembering REM = 1 - |min(BWT_ALL, 0)| and
    positive backward transfer BWT+ = max(BWT_ALL, 0).

    Args:
        R: (T, tasks).
    Source: Diaz-Rodriguez et al. 2018, arXiv:1810.13166.

    >>> round(all_stage_backward_transfer([[0.8, 0.1], [0.6, 0.9]]).value, 6)
    -0.2
    """
    M = _matrix(R)
    T = len(M)
    i, j = np.tril_indices(T, -1)
    return Figure(
        "backward transfer over all stages",
        "BWT_ALL",
        _mean(_sign(higher_is_better) * (M[i, j] - M[j, j])),
        T * (T - 1) // 2,
        True,
        "2/(T(T-1)) sum_{i>j} (R[i,j] - R[j,j])",
        "Diaz-Rodriguez, arXiv:1810.13166",
    )


def all_stage_forward_transfer(R: ArrayLike, *, higher_is_better: bool = True) -> Figure:
    """FWT_ALL = 2/(T(T-1)) sum_{i<j} R[i, j]: the mean above the diagonal. T = 1: NaN.

    A mean of scores, not of differences: it says nothing without the base's beside it.

    Args:
        R: (T, tasks), with the scores above the diagonal.
    Source: Diaz-Rodriguez et al. 2018, arXiv:1810.13166.

    >>> round(all_stage_forward_transfer([[0.8, 0.1], [0.6, 0.9]]).value, 6)
    0.1
    """
    M = _matrix(R)
    T = len(M)
    return Figure(
        "forward transfer over all stages",
        "FWT_ALL",
        _mean(M[:, :T][np.triu_indices(T, 1)]),
        T * (T - 1) // 2,
        higher_is_better,
        "2/(T(T-1)) sum_{i<j} R[i,j]",
        "Diaz-Rodriguez, arXiv:1810.13166",
    )


def other_figures(R: ArrayLike, *, higher_is_better: bool = True) -> tuple[Figure, ...]:
    """What other libraries and papers report under the same names, in the order of a report.

    Args:
        R: (T, tasks).
    Returns:
        MAA, A, F_FIRST, F_SEEN, BWT_ALL, FWT_ALL.
    """
    M = _matrix(R)
    return (
        mean_average_accuracy(M, higher_is_better=higher_is_better),
        all_stage_accuracy(M, higher_is_better=higher_is_better),
        first_last_forgetting(M, higher_is_better=higher_is_better),
        best_seen_forgetting(M, higher_is_better=higher_is_better),
        all_stage_backward_transfer(M, higher_is_better=higher_is_better),
        all_stage_forward_transfer(M, higher_is_better=higher_is_better),
    )


def continual_figures(
    R: ArrayLike,
    base: ArrayLike,
    reference: ArrayLike | None = None,
    *,
    higher_is_better: bool = True,
) -> tuple[Figure, ...]:
    """Every figure of this module that its inputs allow, in the order of a report.

    Args:
        R: (T, tasks).
        base: (tasks,).
        reference: (T,) for intransigence; without it that figure is NaN.
    Returns:
        ACC, LA, BWT, BWT_TRACE, FWT, F, I, and DELTA where there are untrained columns.
    """
    M = _matrix(R)
    a = np.full(len(M), np.nan) if reference is None else reference
    figures = (
        average_accuracy(M, higher_is_better=higher_is_better),
        learning_accuracy(M, higher_is_better=higher_is_better),
        backward_transfer(M, higher_is_better=higher_is_better),
        trace_backward_transfer(M, higher_is_better=higher_is_better),
        forward_transfer(M, base, higher_is_better=higher_is_better),
        forgetting(M, higher_is_better=higher_is_better),
        intransigence(M, a, higher_is_better=higher_is_better),
    )
    if M.shape[1] == len(M):
        return figures
    return (*figures, outside_delta(M, base, higher_is_better=higher_is_better))
