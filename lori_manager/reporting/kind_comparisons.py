"""What a comparison of kinds has come to: its stored steps as a table's rows.

A score is the mean over seeds and eval rows. Every kind is compared with the first on the
same rows and the same seeds. With several seeds the 95% intervals and p are for other rows
and other seeds (`metrics.crossed`), and no interval is narrower, no p smaller, than that of
the rows alone with the seeds' outcomes averaged; with one seed they are those of the rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from lori_manager.comparing import ONE_SIDED, difference_of, graded_change
from lori_manager.metrics.bounds import score_bounds
from lori_manager.metrics.crossed import crossed_mean
from lori_manager.metrics.multiple import holm
from lori_manager.metrics.paired import sign_flip
from lori_manager.metrics.summary import is_binary, summarize
from lori_manager.rates import at_edge, best_rate, next_full_rate
from lori_manager.records import JSON, Adapter, KindComparison, KindStep, Score
from lori_manager.refs import parse_adapter_ref, parse_mask_ref
from lori_manager.reporting.intervals import score_interval
from lori_manager.store.store import Store

SEARCH, SETTLE, TRAIN = "search", "settle", "train"
SIGNIFICANCE = 0.05
BEATS, TIES, LOSES = "beats", "ties", "loses to"


@dataclass(frozen=True)
class Against:
    """How a kind differs from the first on the seeds and rows of both.

    Attributes:
        change: in the score's own units.
        low, high: its 95% interval.
        p: two-sided, of this comparison alone; corrected: by Holm over all kinds.
        seeds: how many both have.
        verdict: "beats", "ties" (no difference shown) or "loses to", by the corrected p.
    """

    change: float
    low: float
    high: float
    p: float
    corrected: float
    seeds: int
    verdict: str


@dataclass(frozen=True)
class KindResult:
    """One kind in a comparison; what is not done or not known is None, NaN or empty.

    Attributes:
        entry: the kind, or `lori-d` for LoRI without a mask.
        tried: (rate, held-out loss, see `probing.Probe`) of short trainings; infinite where
            one diverged.
        full: the same of trainings of full length.
        rate: the best of those of full length, or of the short ones where the plan has no
            others; once all are done.
        edge: a better one may lie beyond those tried, see `rates.at_edge`.
        search_seconds: what the search took.
        seeds, adapters, scores: of every training, in the order of the seeds.
        value, low, high: mean score and its 95% interval.
        against: compared with the first; None for the first itself.
        parameters: trained; bytes: stored; both of the last seed's adapter.
        step_seconds, peak_bytes: medians over seeds, see `metering`.
        seconds: of all steps of a training, those that made its mask too; the median.
        diverged: seeds whose training diverged.
    """

    entry: str
    tried: tuple[tuple[float, float], ...]
    full: tuple[tuple[float, float], ...]
    rate: float | None
    edge: bool
    search_seconds: float
    seeds: tuple[int, ...]
    adapters: tuple[str, ...]
    scores: tuple[float, ...]
    value: float
    low: float
    high: float
    against: Against | None
    parameters: int | None
    bytes: int | None
    step_seconds: float | None
    peak_bytes: int | None
    seconds: float | None
    diverged: tuple[int, ...] = ()


@dataclass(frozen=True)
class KindsCompared:
    """A comparison as far as it is done."""

    digest: str
    task: str  # "safety#2"
    scorer: str
    higher_is_better: bool
    rows: int
    steps: int  # of the optimizer, of every full training
    search_steps: int
    points: int  # rates tried, of every kind
    full: int  # at most tried again, or below, with all of the steps
    kinds: tuple[KindResult, ...]
    devices: tuple[str, ...]
    missing: tuple[str, ...]  # what is asked for and not done, a line each
    created_at: datetime

    @property
    def first(self) -> str:
        """What all others are compared with."""
        return self.kinds[0].entry if self.kinds else ""


def kinds_compared(
    store: Store,
    comparison: KindComparison,
    entries: Sequence[str] | None = None,
    seeds: int | None = None,
) -> KindsCompared:
    """What the store holds of a comparison.

    Args:
        entries: in this order; None: all that were begun, as they were begun.
        seeds: how many are asked for; None: as many as any kind has.
    """
    done = store.kind_steps(comparison.digest)
    if entries is None:
        entries = list(dict.fromkeys(step.entry for step in done))
    plan = comparison.plan
    first_seed = int(plan["config"]["seed"])
    trained = {int(s.point) for s in done if s.step == TRAIN and s.entry in entries}
    wanted = sorted(trained) if seeds is None else [first_seed + i for i in range(seeds)]
    task = store.task(comparison.task, comparison.task_revision)
    search = plan["search"]
    found, missing, outcomes, higher = [], [], {}, True
    for entry in entries:
        own = [s for s in done if s.entry == entry]
        scores = _scores(store, comparison, own, wanted)
        if scores:
            facts = next(iter(scores.values())).facts
            higher = bool(facts.get("higher_is_better", True))
        outcomes[entry] = _outcomes(store, scores)
        found.append(_result(store, entry, own, scores, outcomes[entry], search))
        missing += _missing(found[-1], wanted, search["points"])
    if entries:
        found = _with_verdicts(found, outcomes, higher)
    return KindsCompared(
        comparison.digest,
        task.ref,
        task.scorer,
        higher,
        task.splits["eval"].rows,
        plan["steps"],
        search["steps"],
        search["points"],
        search.get("full", 0),
        tuple(found),
        tuple(dict.fromkeys(str(s.facts["device"]) for s in done if "device" in s.facts)),
        tuple(missing),
        comparison.created_at,
    )


@dataclass(frozen=True)
class _Outcomes:
    """By seed, (rows,) each, and weights by row where they are not all one."""

    by_seed: Mapping[int, NDArray[np.float64]]
    weights: NDArray[np.float64] | None

    def of(self, seeds: Sequence[int]) -> NDArray[np.float64]:
        """(seeds, rows)."""
        return np.stack([self.by_seed[seed] for seed in seeds])


def _scores(
    store: Store, comparison: KindComparison, steps: Sequence[KindStep], wanted: Sequence[int]
) -> dict[int, Score]:
    """The newest measured score of each seed's adapter on the comparison's task."""
    task = store.task(comparison.task, comparison.task_revision)
    found = {}
    for step in sorted(steps, key=lambda s: s.point):
        if step.step != TRAIN or step.adapter is None or int(step.point) not in wanted:
            continue
        scores = [
            s
            for s in store.scores(subject=step.adapter, task=task.name, revision=task.revision)
            if s.origin == "measured" and s.scorer_version == task.scorer_version
        ]
        if scores:
            found[int(step.point)] = scores[-1]
    return dict(sorted(found.items()))


def _outcomes(store: Store, scores: Mapping[int, Score]) -> _Outcomes:
    arrays = store.outcomes_of(list(scores.values())) if scores else []
    weights = next((w for _, w in arrays if w is not None), None)
    return _Outcomes(
        {seed: x.astype(np.float64) for seed, (x, _) in zip(scores, arrays, strict=True)},
        None if weights is None else weights.astype(np.float64),
    )


def _result(
    store: Store,
    entry: str,
    steps: Sequence[KindStep],
    scores: Mapping[int, Score],
    outcomes: _Outcomes,
    search: JSON,
) -> KindResult:
    tried, full = losses(steps, SEARCH), losses(steps, SETTLE)
    ready = len(tried) >= search["points"] and (
        next_full_rate(full, best_rate(tried), search.get("full", 0), search["factor"]) is None
    )
    trained = {int(s.point): s for s in steps if s.step == TRAIN}
    kept = [trained[seed] for seed in scores]
    adapters = [_adapter(store, step) for step in kept]
    value = low = high = math.nan
    if scores:
        value, low, high = mean_score(outcomes.of(list(scores)), outcomes.weights)
    return KindResult(
        entry,
        tuple(sorted(tried.items())),
        tuple(sorted(full.items())),
        best_rate(full or tried) if ready else None,
        ready and at_edge(tried, full),
        sum(float(s.facts["seconds"]) for s in steps if s.step in (SEARCH, SETTLE)),
        tuple(scores),
        tuple(a.ref for a in adapters),
        tuple(s.value for s in scores.values()),
        value,
        low,
        high,
        None,
        adapters[-1].facts.get("parameters") if adapters else None,
        adapters[-1].bytes if adapters else None,
        _median(step.facts.get("step_seconds") for step in kept),
        _whole(_median(step.facts.get("peak_bytes") for step in kept)),
        _median(_seconds(store, a) for a in adapters),
        tuple(sorted(seed for seed, step in trained.items() if step.adapter is None)),
    )


def losses(steps: Iterable[KindStep], step: str) -> dict[float, float]:
    """Rate -> held-out loss of one sort of step; infinite where it diverged."""
    return {
        float(s.point): math.inf if s.facts["loss"] is None else float(s.facts["loss"])
        for s in steps
        if s.step == step
    }


def _adapter(store: Store, step: KindStep) -> Adapter:
    parsed = parse_adapter_ref(step.adapter or "")
    if parsed is None:
        raise ValueError(f"step {step} has no adapter")
    return store.adapter(parsed)


def _seconds(store: Store, adapter: Adapter) -> float | None:
    """Of its training's steps and its mask's, over all calls that it took."""
    own = adapter.facts.get("seconds")
    if own is None or adapter.mask is None:
        return own
    mask = store.mask(*parse_mask_ref(adapter.mask))
    return float(own + mask.config.get("seconds", 0.0))


def _median(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _missing(result: KindResult, wanted: Sequence[int], points: int) -> list[str]:
    if len(result.tried) < points:
        return [f"{result.entry}: {len(result.tried)} of {points} rates tried, nothing trained"]
    if result.rate is None:
        return [f"{result.entry}: its rate not yet tried with all steps, nothing trained"]
    left = [str(s) for s in wanted if s not in result.seeds and s not in result.diverged]
    return [f"{result.entry}: seed {', '.join(left)} not trained"] if left else []


def mean_score(
    outcomes: NDArray[np.float64], weights: NDArray[np.float64] | None = None
) -> tuple[float, float, float]:
    """The mean score over seeds and rows, and its 95% interval.

    Args:
        outcomes: (seeds, rows). Not modified.
        weights: (rows,) or None.
    """
    rows = summarize(outcomes.mean(0), weights)
    low, high = score_interval(rows.value, rows.error, rows.rows)
    if len(outcomes) > 1:
        both = crossed_mean(outcomes, weights)
        if not math.isnan(both.low):
            low, high = min(low, both.low), max(high, both.high)
    if is_binary(outcomes):
        low, high = max(low, 0.0), min(high, 1.0)
    return rows.value, low, high


def change_between(
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    weights: NDArray[np.float64] | None = None,
    *,
    higher_is_better: bool = True,
) -> tuple[float, float, float, float]:
    """The mean difference of outcomes of two kinds, its 95% interval, and p.

    Args:
        before, after: (seeds, rows) of the same seeds and rows. Not modified.
        weights: (rows,) or None.
        higher_is_better: which of the bounds is the careful one.
    """
    if len(before) == 1:
        one = difference_of(before[0], after[0], weights, weights,
                            higher_is_better=higher_is_better)  # fmt: skip
        if one is None:
            raise ValueError("the two weigh their rows differently")
        return one.change, one.low, one.high, one.p
    both = crossed_mean(after - before, weights)
    if np.array_equal(before, after) and is_binary(before):
        rows = score_bounds(0, 0, before.shape[1], ONE_SIDED)
        return 0.0, rows.lower, rows.upper, 1.0
    rows = graded_change(before.mean(0), after.mean(0), weights, higher_is_better)
    d = (after - before).mean(0)
    p = max(both.p, sign_flip(d if weights is None else d * weights))
    return both.mean, min(both.low, rows.lower), max(both.high, rows.upper), p


def _with_verdicts(
    found: Sequence[KindResult], outcomes: Mapping[str, _Outcomes], higher: bool
) -> list[KindResult]:
    first, out = found[0], [found[0]]
    for result in found[1:]:
        common = [s for s in result.seeds if s in first.seeds]
        if common:
            before, after = outcomes[first.entry], outcomes[result.entry]
            told = change_between(before.of(common), after.of(common), after.weights,
                                  higher_is_better=higher)  # fmt: skip
            against = Against(*told, math.nan, len(common), "")
            result = replace(result, against=against)
        out.append(result)
    told_of = [i for i, result in enumerate(out) if result.against is not None]
    corrected = holm([out[i].against.p for i in told_of]).tolist()  # type: ignore[union-attr]
    for i, p in zip(told_of, corrected, strict=True):
        out[i] = replace(out[i], against=_judged(out[i].against, p, higher))
    return out


def _judged(found: Against | None, p: float, higher: bool) -> Against | None:
    if found is None:
        return None
    better = found.change > 0 if higher else found.change < 0
    verdict = (BEATS if better else LOSES) if p < SIGNIFICANCE else TIES
    return replace(found, corrected=p, verdict=verdict)
