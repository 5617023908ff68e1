"""What a merge would lose, told before it is made: by interference and by a rehearsal."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lori_manager.combining import (
    AUTO,
    check_options,
    members_of,
    method_of,
    shares_of,
    usual_method,
)
from lori_manager.config import Config
from lori_manager.context import Context
from lori_manager.errors import InvalidInput
from lori_manager.records import Adapter, Expected, Forecasted, Parent
from lori_manager.store.tables import canonical

if TYPE_CHECKING:
    from lori_manager.merging.interference import Interference


@dataclass(frozen=True)
class Past:
    """How earlier forecasts of this workspace compare with what the merges then lost."""

    merges: int
    forecasts: int  # one a task
    off_by: float  # mean absolute error, in the scores' unit; NaN without any
    r_squared: float  # of the losses against the own adapters; NaN under three forecasts


@dataclass(frozen=True)
class Forecast:
    """What is known of members before they are merged."""

    members: tuple[Adapter, ...]
    weights: tuple[float, ...]
    method: str
    interference: Interference
    loudest: tuple[str, str, float] | None
    expected: tuple[Expected, ...]
    past: Past


def forecast(
    ws: Context,
    refs: Sequence[str],
    *,
    names: Sequence[str] = (),
    method: str | None = None,
    weights: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    probe_rows: int = 32,
    config: Config | None = None,
) -> Forecast:
    """How much members would get in each other's way, and what each task would lose.

    The members are merged in memory by the method; on further probe prompts that it was not
    fitted to, the share on which the merge says what the task's own adapter says is counted.
    No labels are read. Nothing is stored but the expectations, so that the next forecast can
    tell how good this one was.

    Args: as of `combining.merge`.
    Raises:
        NotFound, InvalidInput: also for members without probe rows, and for methods that
            choose for themselves (`auto`) or keep members whole (`routed`).
    """
    from lori_manager.merge_inputs import MergeInputs
    from lori_manager.merging.interference import interference, worst_pair
    from lori_manager.merging.methods import MergeOptions
    from lori_manager.rehearsal import rehearsed

    ws.check_language("a dry run reads probe prompts and")
    config = config or ws.settings.config
    told = MergeOptions(**dict(options or {}))
    if probe_rows < 1:
        raise InvalidInput(f"`probe_rows` must be at least 1, got {probe_rows}")
    if method in (AUTO, "routed"):
        raise InvalidInput(
            f"a dry run forecasts one merge: {method!r} tries or keeps several, name another method"
        )
    members = members_of(ws, refs, names)
    shares = shares_of(members, weights)
    entry = method_of(method or usual_method(ws, members))
    check_options(entry.name, options or {})
    inputs = MergeInputs(ws, members, config, probe_rows)
    found = interference(inputs.weights, shares, inputs.grams())
    loudest = worst_pair([member.ref for member in members], found)
    past = _past(ws)
    expected = rehearsed(inputs, entry, shares, told)
    if expected:
        key = merge_key(members, shares, entry.name, told.settings())
        precision = ws.score_precision(config)
        ws.store.add_forecasts([Forecasted(key, precision, ws.encoding, e) for e in expected])
    return Forecast(
        tuple(members), tuple(shares), entry.name, found, loudest, tuple(expected), past
    )


def merge_key(
    members: Sequence[Adapter | Parent],
    weights: Sequence[float],
    method: str,
    settings: Mapping[str, Any],
) -> str:
    """What makes two merges the same: digests and weights of the members, method, settings."""
    parts = [[m.digest, w] for m, w in zip(members, weights, strict=True)]
    told = canonical({"members": parts, "method": method, "settings": dict(settings)})
    return hashlib.sha256(told.encode()).hexdigest()


def _past(ws: Context) -> Past:
    """Every stored expectation beside what the merge scored that was made after it."""
    told_of: dict[str, dict[str, Forecasted]] = defaultdict(dict)
    for forecasted in ws.store.forecasts():
        told_of[forecasted.merge][forecasted.expected.task] = forecasted  # the latest stays
    merges = set()
    pairs: list[tuple[float, float]] = []
    for adapter in ws.store.adapters() if told_of else ():
        settings = adapter.config.get("settings")
        if adapter.origin != "merged" or settings is None:
            continue
        shares = [float(parent.weight or 0.0) for parent in adapter.parents]
        key = merge_key(adapter.parents, shares, adapter.method, settings)
        if key not in told_of or key in merges:
            continue
        for score in ws.store.scores(subject=adapter.ref):
            told = told_of[key].get(score.task)
            if told is None or not told.comparable(score) or math.isnan(told.expected.score):
                continue
            own = told.expected.own
            pairs.append((own - told.expected.score, own - score.value))
            merges.add(key)
    if not pairs:
        return Past(0, 0, math.nan, math.nan)
    losses = [loss for _, loss in pairs]
    spread = sum((loss - fmean(losses)) ** 2 for loss in losses)
    missed = sum((told - loss) ** 2 for told, loss in pairs)
    return Past(
        len(merges),
        len(pairs),
        fmean(abs(told - loss) for told, loss in pairs),
        1 - missed / spread if len(pairs) >= 3 and spread > 0 else math.nan,
    )
