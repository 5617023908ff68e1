"""Several kinds of adapters on one task: equal data and steps, each at a rate of its own.

    search a rate for every kind -> train every kind with the first seed, the second, ...

A rate is searched by short trainings on a part of the task's training rows, then settled by a
few of full length, and judged by the loss on another part; eval rows are scored once, at the
end. Every step is noted when it is done, so that the same call goes on; kinds and seeds may
be added later. Adapters are ordinary versions on lines of their own, `TASK.KIND`, so that the
task's own line and what its name means stay as they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lori_manager.by_base import check_fits
from lori_manager.config import Config
from lori_manager.context import Context
from lori_manager.errors import Diverged, InvalidInput
from lori_manager.evaluation import ready_to_score, score_missing
from lori_manager.kinds import KINDS, LORI, kind_of, resolved
from lori_manager.placing import placed
from lori_manager.plain import counted
from lori_manager.probing import Halves, halves, modules_in, probe, probing_mask, with_rate
from lori_manager.rates import best_rate, next_full_rate, next_rate
from lori_manager.records import Adapter, KindComparison, KindStep, Task
from lori_manager.reporting.kind_comparisons import (
    SEARCH,
    SETTLE,
    TRAIN,
    KindsCompared,
    kinds_compared,
    losses,
)
from lori_manager.teaching import NOT_DECIDING, TrainOptions, held_lock, train

if TYPE_CHECKING:
    from torch import Tensor

DENSE = "lori-d"  # LoRI without a mask
MOST_RATES, LEAST_FACTOR = 20, 1.05  # beyond, rates differ by less than means anything
ENTRIES = (LORI, DENSE, *(name for name in KINDS if name != LORI))


@dataclass(frozen=True)
class RateSearch:
    """How learning rates are searched, alike for every kind.

    Attributes:
        points: rates to try.
        factor: between the first three, see `rates.next_rate`.
        share: of the steps of a full training.
        full: trainings of full length at most, which begin at the best of those rates and go
            down by `factor` while that helps, see `rates.next_full_rate`; 0 for none.
    """

    points: int = 5
    factor: float = 3.0
    share: float = 0.25
    full: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.points <= MOST_RATES:
            raise InvalidInput(f"rates to try must be from 1 to {MOST_RATES}, got {self.points}")
        if not LEAST_FACTOR <= self.factor < math.inf:
            raise InvalidInput(
                f"the factor between rates must be at least {LEAST_FACTOR}, got {self.factor}"
            )
        if not 0 < self.share <= 1:
            raise InvalidInput(
                f"the search's share of the steps must be above 0, at most 1, got {self.share}"
            )
        if not 2 <= self.full <= MOST_RATES and self.full != 0:
            raise InvalidInput(
                f"rates to try at full length must be 0 or from 2 to {MOST_RATES}, got {self.full}"
            )


def compare_kinds(
    ws: Context,
    name: str,
    kinds: Sequence[str],
    *,
    seeds: int = 3,
    budget: float | None = None,
    config: Config | None = None,
    search: RateSearch | None = None,
) -> KindsCompared:
    """Search rates, train and score what is not done yet, and say what all of it shows.

    Args:
        name: a task with training rows.
        kinds: names of `KINDS`, or `lori-d`; the others are compared with the first.
        seeds: trainings of each, with the config's seed and those after it.
        budget: seconds after which nothing new is begun; what runs is finished.
        config: settings; the workspace's own where None. Its kind and learning rate do not
            count, its kind's own options count for that kind.
        search: how rates are searched.
    Raises:
        InvalidInput: unknown or repeated kinds, one that does not train on such a base, no
            seed, too few training rows, settings that a kind cannot have.
        Conflict: another process is at the same comparison, or a line's name is a task's.
    """
    began = time.monotonic()
    config, search = config or ws.settings.config, search or RateSearch()
    check_entries(kinds)
    for entry in kinds:
        check_fits(ws, settings(config, entry))
    if seeds < 1:
        raise InvalidInput(f"`seeds` must be at least 1, got {seeds}")
    if budget is not None and not 0 < budget < math.inf:
        raise InvalidInput(f"the budget must be above 0, got {budget / 60:g} minutes")
    (task,) = ready_to_score(ws, [ws.trainable(name)], config)
    for entry in kinds:
        ws.check_line(line_of(task.name, entry))
    parts = halves(ws, task, config)
    comparison = ws.store.open_kind_comparison(task, plan_of(ws, task, config, search))
    locks = ws.store.root / "locks"
    locks.mkdir(mode=0o700, exist_ok=True)
    lock = held_lock(locks / f"compare-{comparison.digest[:16]}.lock", "the same comparison")

    def in_time() -> bool:
        return budget is None or time.monotonic() - began < budget

    try:
        work = Work(ws, task, config, comparison, parts, in_time)
        for entry in kinds:
            work.check(entry)
        if all(work.search(entry) for entry in kinds):
            for seed in range(config.seed, config.seed + seeds):
                for entry in kinds:
                    if in_time():
                        work.train(entry, seed)
    finally:
        lock.release()
    return kinds_compared(ws.store, comparison, kinds, seeds)


def check_entries(kinds: Sequence[str]) -> None:
    """Refuse kinds that there are not, or that are named twice.

    Raises:
        InvalidInput.
    """
    if not kinds:
        raise InvalidInput(f"name at least one kind to compare; there are: {', '.join(ENTRIES)}")
    for entry in kinds:
        if entry not in ENTRIES:
            raise InvalidInput(f"no kind is called {entry!r}; there are: {', '.join(ENTRIES)}")
    if len(set(kinds)) != len(kinds):
        raise InvalidInput("a kind is named twice; name each once")


def line_of(task: str, entry: str) -> str:
    """The line of a kind's adapters for a task."""
    return f"{task}.{entry}"


def settings(config: Config, entry: str) -> Config:
    """The settings of one kind, at its usual rate."""
    kind = LORI if entry == DENSE else entry
    own = config.kind_options if config.kind == kind else {}
    usual = kind_of(kind).rate
    return resolved(config.replace(kind=kind, kind_options=own, learning_rate=usual))


def usual_rate(config: Config, entry: str) -> float:
    """Where the search of a kind's rate begins."""
    return Config().dense_learning_rate if entry == DENSE else settings(config, entry).learning_rate


def plan_of(ws: Context, task: Task, config: Config, search: RateSearch) -> dict[str, Any]:
    """All that is equal for every kind: with the task, what a comparison is known by."""
    from lori_manager.training import steps_for

    told = {k: v for k, v in config.to_json().items() if k not in NOT_DECIDING}
    del told["learning_rate"]
    if not config.kind_options:
        del told["kind"]
    steps = steps_for(task.splits["train"].rows, config)
    short = max(1, round(search.share * steps))
    full = search.full if short < steps else 0
    return {
        "task": task.ref,
        "config": told,
        "steps": steps,
        "search": asdict(search) | {"full": full, "steps": short},
        "base": ws.store.base().fingerprint,
        "precision": ws.score_precision(config),
    }


@dataclass
class _Start:
    """What the trainings of one kind's search begin with; the mask's time is told once."""

    config: Config
    mask: dict[str, Tensor] | None = None
    seconds: float = 0.0


class Work:
    """The steps of one comparison: each is done once and noted."""

    def __init__(
        self,
        ws: Context,
        task: Task,
        config: Config,
        comparison: KindComparison,
        parts: Halves,
        in_time: Callable[[], bool] = lambda: True,
    ) -> None:
        """
        Args:
            ws, task, config: as resolved by `compare_kinds`.
            comparison: whose plan says what to do.
            parts: of the training rows, for the search.
            in_time: whether something new may be begun.
        """
        self._ws, self._task, self._config = ws, task, config
        self._comparison, self._parts, self._in_time = comparison, parts, in_time
        self._placed: dict[str, Config] = {}

    def _done(self, entry: str, step: str) -> dict[str, KindStep]:
        steps = self._ws.store.kind_steps(self._comparison.digest)
        return {s.point: s for s in steps if (s.entry, s.step) == (entry, step)}

    def tried(self, entry: str, step: str = SEARCH) -> dict[float, float]:
        """Rate -> held-out loss, of the short trainings or of those of full length."""
        return losses(self._done(entry, step).values(), step)

    def check(self, entry: str) -> None:
        """Put what trains into the model and take it out again, unless that has trained before.

        Raises:
            InvalidInput: settings that the kind cannot have on this base, or for so many steps.
        """
        if self._done(entry, SEARCH):
            return
        plan = self._comparison.plan
        for steps in {plan["search"]["steps"], plan["steps"]}:
            line = line_of(self._task.name, entry)
            with modules_in(self._ws, self._task, self._settings(entry), steps, line):
                pass

    def _settings(self, entry: str) -> Config:
        if entry not in self._placed:
            found = placed(self._ws, self._task, settings(self._config, entry))
            self._placed[entry] = found.config
        return self._placed[entry]

    def search(self, entry: str) -> bool:
        """Try rates until one is found; False where the time is over before."""
        start: _Start | None = None
        while (todo := self._untried(entry)) is not None:
            if not self._in_time():
                return False
            start = start or self._start(entry)
            self._try(entry, start, *todo)
        return True

    def _untried(self, entry: str) -> tuple[str, float, int] | None:
        """What kind of step, the rate and the optimizer steps to try next; None: it is over."""
        plan = self._comparison.plan
        search, tried = plan["search"], self.tried(entry)
        if len(tried) < search["points"]:
            rate = next_rate(tried, usual_rate(self._config, entry), search["factor"])
            return SEARCH, rate, search["steps"]
        full = self.tried(entry, SETTLE)
        lower = next_full_rate(full, best_rate(tried), search.get("full", 0), search["factor"])
        return None if lower is None else (SETTLE, lower, plan["steps"])

    def _start(self, entry: str) -> _Start:
        config = self._settings(entry)
        if entry != LORI:
            return _Start(config)
        begin = time.perf_counter()
        steps, line = self._comparison.plan["steps"], line_of(self._task.name, entry)
        mask = probing_mask(self._ws, self._task, config, self._parts, steps, line)
        return _Start(config, mask, time.perf_counter() - begin)

    def _try(self, entry: str, start: _Start, step: str, rate: float, steps: int) -> None:
        found = probe(
            self._ws,
            self._task,
            with_rate(start.config, rate, entry == DENSE),
            self._parts,
            steps=steps,
            dense=entry == DENSE,
            line=line_of(self._task.name, entry),
            mask=start.mask,
            phase=f"{entry} at rate {rate:g}" + ", all steps" * (step == SETTLE),
        )
        finite = math.isfinite(found.loss)
        self._note(entry, step, repr(rate), None, {
            "loss": found.loss if finite else None,
            "seconds": round(found.seconds + start.seconds, 3),
            "steps": steps,
            "rows": len(self._parts.rows),
            "held": len(self._parts.held),
        })  # fmt: skip
        start.seconds = 0.0
        told = f"held-out loss {found.loss:.4f}" if finite else "diverged"
        self._ws.on_message(f"{entry} at rate {rate:g}: {told} after {counted(steps, 'step')}")

    def train(self, entry: str, seed: int) -> None:
        """One full training at the best rate, stored and scored."""
        ws, task = self._ws, self._task
        if str(seed) in self._done(entry, TRAIN):
            return
        rate = best_rate(self.tried(entry, SETTLE) or self.tried(entry))
        config = with_rate(settings(self._config, entry), rate, entry == DENSE).replace(seed=seed)
        measured: dict[str, Any] = {}
        adapter = self._stored(entry, seed)
        if adapter is None:
            adapter, measured = self._trained(entry, config)
        if adapter is not None:
            score_missing(ws, adapter.ref, [task], config)
        facts = {"rate": rate} | measured
        self._note(entry, TRAIN, str(seed), None if adapter is None else adapter.ref, facts)

    def _trained(self, entry: str, config: Config) -> tuple[Adapter | None, dict[str, Any]]:
        from lori_manager.metering import Meter, device_name

        ws, told = self._ws, self._ws.on_progress
        base = ws.model(config)
        meter = Meter(f"training {self._task.name}", base.device)

        def progress(state: Any) -> None:
            meter.told(state.phase)
            told(state)

        options = TrainOptions(
            line=line_of(self._task.name, entry),
            dense=entry == DENSE,
            compared=self._comparison.digest,
        )
        ws.on_progress = progress
        try:
            adapter: Adapter | None = train(ws, [self._task.name], config, options)[0].adapter
        except Diverged as e:
            ws.on_message(f"{entry}, seed {config.seed}: {e}")
            adapter = None
        finally:
            ws.on_progress = told
        return adapter, {
            "step_seconds": meter.step_seconds,
            "peak_bytes": meter.peak_bytes,
            "device": device_name(base.device),
        }

    def _stored(self, entry: str, seed: int) -> Adapter | None:
        """What an interrupted call has trained and not noted."""
        line = line_of(self._task.name, entry)
        if not any(known.name == line for known in self._ws.store.lines()):
            return None
        for adapter in self._ws.store.adapters(line):
            if (adapter.compared, adapter.config.get("seed")) == (self._comparison.digest, seed):
                return adapter
        return None

    def _note(
        self, entry: str, step: str, point: str, adapter: str | None, facts: dict[str, Any]
    ) -> None:
        done = KindStep(entry, step, point, adapter, facts)
        self._ws.store.add_kind_step(self._comparison.digest, done)
