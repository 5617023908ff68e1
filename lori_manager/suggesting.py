"""Settings for a task out of a few short trainings within a time that is told beforehand.

    time of a step -> learning rate -> layers -> rank and sparsity -> steps

Every probe trains on a part of the task's training rows and is judged by the loss on
another part; eval rows are never looked at. Of sizes and of lengths the smallest is taken
that is shown to keep all but `TOLERATED` of what the best gains over no training
(`probing.untaught_loss`): the paired upper bound of the difference over the held-out rows.
How long probes can be hangs on the machine, and so does what comes out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from lori_manager.by_base import check_fits
from lori_manager.config import Config
from lori_manager.context import Context
from lori_manager.errors import InvalidInput
from lori_manager.kinds import LORI, kind_of, resolved
from lori_manager.metrics.bounds import graded_bounds
from lori_manager.placing import place, placed
from lori_manager.plain import counted
from lori_manager.probing import Halves, Probe, halves, probe, probing_mask, untaught_loss
from lori_manager.rates import best_rate, next_rate
from lori_manager.records import Task
from lori_manager.trials import CONFIDENCE, TOLERATED

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

FIRST = 8  # steps of the probe that finds how long a step takes
LEAST = 10  # steps below which a probe tells nothing
RATES = 4  # tried, the best two of them again twice as long
RATE_SHARE, LAYER_SHARE, SIZE_SHARE = 0.4, 0.2, 0.6  # of the time that is left then
RATE_MOST = 0.85  # the share of the rates where less would tell nothing: they matter most
TOP = 3  # types of layers that PLoP chooses
SPARE = 1.1  # by how much a probe may take longer than those before


@dataclass(frozen=True)
class Tried:
    """One probe: what for, with what, and how it went."""

    what: str  # "time", "rate", "layers", "size" or "steps"
    settings: Mapping[str, Any]
    steps: int
    loss: float  # held-out, see `probing.Probe`; infinite where it diverged
    parameters: int
    seconds: float


@dataclass(frozen=True)
class Choice:
    """One setting, and why."""

    setting: str
    value: Any
    why: str


@dataclass(frozen=True)
class Suggestion:
    """What to train a task with.

    Attributes:
        changes: what `lori train` is to be given: what was chosen, and where the settings to start
            from differ from the workspace's.
        base_loss: without training, see `probing.untaught_loss`.
        untaught: what that is the loss of, in words.
        held: rows that judged.
        step_seconds: of a step on this machine.
    """

    task: str
    kind: str
    changes: Mapping[str, Any]
    choices: tuple[Choice, ...]
    probes: tuple[Tried, ...]
    base_loss: float
    untaught: str
    held: int
    step_seconds: float
    seconds: float
    budget: float
    device: str

    @property
    def command(self) -> str:
        """The training that it comes to."""
        flags = [_flag(key, value) for key, value in self.changes.items()]
        return " ".join(["lori train", self.task, *flags])


def suggest(
    ws: Context, name: str, *, budget: float = 300.0, config: Config | None = None
) -> Suggestion:
    """Probe learning rates, ranks, sparsities and lengths, and choose.

    Args:
        name: a task with training rows.
        budget: seconds for all of it; no probe is begun that would end later.
        config: settings to start from, the kind among them; the workspace's own where None.
    Raises:
        InvalidInput: too little time for probes that tell anything, too few rows, a kind that
            does not train on such a base.
    """
    from lori_manager.metering import device_name
    from lori_manager.training import steps_for

    clock = _Clock(budget)
    own = ws.settings.config
    given = {} if config is None else _differing(config, own)
    config = resolved(config or own)
    check_fits(ws, config)
    task = ws.trainable(name)
    config = placed(ws, task, config).config
    parts = halves(ws, task, config)
    full = steps_for(task.splits["train"].rows, config)
    work = _Prober(ws, task, parts, clock)
    base_loss = work.base_loss(config)
    work.time(config, 1)  # libraries are loaded in it
    work.time(config, min(FIRST, full))
    choices: list[Choice] = []
    config = _rate(work, config, full, choices)
    config = _layers(work, config, full, base_loss, choices)
    config = _size(work, config, full, base_loss, choices)
    config = _length(work, config, full, base_loss, choices)
    keys = ["kind", *(("rank", "alpha") if _ranked(config) else ()), "learning_rate", "steps"]
    if config.kind == LORI:
        keys.insert(3, "sparsity")
    if config.targets != Config().targets:
        keys.append("targets")
    return Suggestion(
        task.name,
        config.kind,
        {key: getattr(config, key) for key in keys}
        | {key: value for key, value in given.items() if key not in keys},
        tuple(choices),
        tuple(work.done),
        base_loss,
        work.untaught,
        len(parts.held),
        clock.step,
        clock.spent(),
        budget,
        device_name(ws.model(config).device),
    )


def smallest_that_keeps(
    by_row: Sequence[NDArray[np.float64]],
    weights: NDArray[np.float64],
    base_loss: float,
    tolerated: float = TOLERATED,
) -> int:
    """The first of some probes that is shown to be about as good as the best of them.

    Args:
        by_row: for each, the losses (rows,) it leaves, the simplest first; empty arrays for
            those that diverged.
        weights: (rows,) completion tokens, 1 of labels and images.
        base_loss: without any training, the weighted mean as well.
        tolerated: share of the best one's gain over that which may be missing.
    Returns:
        Its number: the mean loss above the best one's is, at the one-sided upper bound of
        the paired difference, at most `tolerated` of that gain; else the best's number.
    Raises:
        ValueError: all diverged.
    """
    means = [float(x @ weights / weights.sum()) if len(x) else math.inf for x in by_row]
    best = min(range(len(means)), key=lambda i: (means[i], i))
    if not math.isfinite(means[best]):
        raise ValueError("every probe diverged")
    room = tolerated * max(0.0, base_loss - means[best])
    for number in range(best):
        if not len(by_row[number]):
            continue
        bounds = graded_bounds(by_row[best], by_row[number], weights, confidence=1 - CONFIDENCE)
        if bounds.upper <= room:
            return number
    return best


def sizes(config: Config, narrowest: int) -> list[Config]:
    """Settings of fewer and more trained values around those given, the fewest first.

    Ranks from a quarter to twice the rank (to the rank itself for LoRI), alpha / rank kept;
    for LoRI a mask of half and of four times the entries, too.

    Args:
        narrowest: the smallest side of any target: no rank is above it.
    """
    rank, share = config.rank, 1 - config.sparsity
    if config.kind == LORI:
        pairs = {(max(1, rank // 4), share), (max(1, rank // 2), share), (rank, share),
                 (rank, share / 2), (rank, min(1.0, 4 * share))}  # fmt: skip
    else:
        pairs = {(max(1, r), share) for r in (rank // 4, rank // 2, rank, 2 * rank)}
    kept = sorted((p for p in pairs if p[0] <= narrowest), key=lambda p: (p[0] * p[1], p[0]))
    scaling = config.scaling
    return [
        config.replace(rank=r, alpha=scaling * r, sparsity=round(1 - density, 6))
        for r, density in kept
    ]


def steps_within(seconds: float, probes: float, units: float, fixed: float, step: float) -> int:
    """Steps a unit, where so many probes of together so many units fit into the seconds.

    >>> steps_within(10.0, probes=4, units=4, fixed=0.5, step=0.1)
    20
    """
    return max(0, math.floor((seconds - probes * fixed) / (units * step)))


class _Clock:
    """The time there is, and what a probe of so many steps takes of it."""

    def __init__(self, budget: float) -> None:
        if not 0 < budget < math.inf:
            raise InvalidInput(f"the budget must be above 0, got {budget / 60:g} minutes")
        self.budget = budget
        self.step = self.fixed = 0.0  # seconds a step, and a probe without its steps
        self._measured = False
        self._began = time.monotonic()

    def spent(self) -> float:
        return time.monotonic() - self._began

    def left(self) -> float:
        return self.budget - self.spent()

    def learn(self, found: Probe, steps: int) -> None:
        step = found.step_seconds
        if step is None:  # too few steps to tell them from what is beside them
            if not self._measured:
                self.step = found.seconds / steps
            return
        # One quick probe does not promise the next.
        self.step = max(step, self.step * 0.9) if self._measured else step
        self.fixed = max(0.0, found.seconds - steps * step)
        self._measured = True

    def fits(self, steps: int) -> bool:
        return SPARE * (self.fixed + steps * self.step) <= self.left()


class _Prober:
    """Makes probes while there is time, and keeps what came of them."""

    def __init__(self, ws: Context, task: Task, parts: Halves, clock: _Clock) -> None:
        self.ws, self.task, self.parts, self.clock = ws, task, parts, clock
        self.done: list[Tried] = []
        self._masks: dict[object, dict[str, Tensor]] = {}
        self._known: dict[tuple[str, int], Probe] = {}

    def base_loss(self, config: Config) -> float:
        """Without any training."""
        return untaught_loss(self.ws, self.task, self.parts, config)

    @property
    def untaught(self) -> str:
        """What `base_loss` is the loss of."""
        return "the labels' shares alone" if self.ws.architecture.encoder else "the base"

    def time(self, config: Config, steps: int) -> None:
        """A probe that only tells how long one takes; its mask is as short as it."""
        if config.kind == LORI:
            config = config.replace(calibration_steps=steps)
        self.probe("time", config, steps)

    def probe(self, what: str, config: Config, steps: int, dense: int = 0) -> Probe:
        """One probe, whatever time there is; made before, it is what came of it then.

        LoRI's mask is as a training of `dense` steps would make it, 0: of as many as the probe.
        """
        config = _calibrated(config, dense or steps)
        known = self._known.get((repr(config), steps))
        if known is not None:
            return known
        told: dict[str, Any] = {"learning_rate": config.learning_rate}
        if _ranked(config):
            told["rank"] = config.rank
        if config.kind == LORI:
            told["sparsity"] = config.sparsity
        words = ", ".join(f"{key} {value:g}" for key, value in told.items())
        if what == "layers":
            told["targets"] = list(config.targets)
            words = ", ".join(config.targets)
        mask = self._mask(config) if config.kind == LORI else None
        phase = f"probing {words}"
        found = probe(self.ws, self.task, config, self.parts, steps=steps, mask=mask, phase=phase)
        self.clock.learn(found, steps)
        self._known[repr(config), steps] = found
        self.done.append(Tried(what, told, steps, found.loss, found.parameters, found.seconds))
        self.ws.on_message(
            f"{words}: held-out loss {found.loss:.4f} after {counted(steps, 'step')}"
        )
        return found

    def _mask(self, config: Config) -> dict[str, Tensor]:
        """Of LoRI; no learning rate is part of it."""
        key = _mask_key(config)
        if key not in self._masks:
            length = config.calibration_steps
            self._masks[key] = probing_mask(self.ws, self.task, config, self.parts, length)
        return self._masks[key]

    def fits(self, config: Config, steps: int, dense: int = 0) -> bool:
        """Whether there is time for a probe."""
        config = _calibrated(config, dense or steps)
        if (repr(config), steps) in self._known:
            return True
        new = config.kind == LORI and _mask_key(config) not in self._masks
        return self.clock.fits(steps + config.calibration_steps * new)

    def within(
        self, what: str, settings: Sequence[Config], steps: int, dense: int = 0
    ) -> list[Probe]:
        """Probes of these settings, as many of the first as there is time for."""
        found = []
        for config in settings:
            if not self.fits(config, steps, dense):
                break
            found.append(self.probe(what, config, steps, dense))
        return found

    def mask_steps(self, planned: Sequence[tuple[Config, float]]) -> tuple[int, float]:
        """Steps of LoRI's masks that some probes still want, and units of steps.

        Args:
            planned: settings and length of each, in units of equally many steps. A mask takes
                as long as its probe, unless the settings say how many steps.
        """
        lori = [(config, length) for config, length in planned if config.kind == LORI]
        units = sum(length for config, length in lori if not config.calibration_steps)
        given = {_mask_key(c): c.calibration_steps for c, _ in lori if c.calibration_steps}
        return sum(n for key, n in given.items() if key not in self._masks), units

    def steps(
        self,
        share: float,
        probes: Sequence[tuple[Config, float]],
        full: int,
        masks: Sequence[tuple[Config, float]] | None = None,
    ) -> int:
        """Steps a unit for probes that may take that share of what is left; at most `full`.

        Args:
            probes: settings and length of each, in units.
            masks: those of them that may want a mask, see `mask_steps`; None for all.
        """
        clock = self.clock
        fixed, units = self.mask_steps(probes if masks is None else masks)
        units += sum(length for _, length in probes)
        time_there = share * clock.left() / SPARE - fixed * clock.step
        return min(full, steps_within(time_there, len(probes), units, clock.fixed, clock.step))

    def kept(
        self, found: Sequence[Probe], base_loss: float, steps: int | None, what: str
    ) -> tuple[int, str]:
        """Which of the probes to take, the simplest first, and why."""
        tokens = next(p.tokens for p in found if len(p.tokens))
        chosen = smallest_that_keeps([p.by_row for p in found], tokens, base_loss)
        best = min(range(len(found)), key=lambda i: (found[i].loss, i))
        after = "" if steps is None else f" after {counted(steps, 'step')}"
        losses = f"held-out loss {found[chosen].loss:.4f}"
        if chosen == best == 0:
            return chosen, f"the best of {len(found)}{after}, and the fewest {what} ({losses})"
        if chosen == best:
            return chosen, (
                f"the best of {len(found)}{after} ({losses}); none with fewer {what} is shown to "
                f"keep {1 - TOLERATED:.0%} of its gain"
            )
        return chosen, (
            f"the fewest {what} of {len(found)} shown to keep {1 - TOLERATED:.0%} of what the best "
            f"gains over {self.untaught}{after} ({losses}, best {found[best].loss:.4f})"
        )


def _rate(work: _Prober, config: Config, full: int, choices: list[Choice]) -> Config:
    """The learning rate: a few, the best two of them again twice as long.

    Short trainings favour rates that are too high for long ones, see `rates`; that is told.
    """
    usual = config.learning_rate
    first, again, masks = [(config, 1.0)] * RATES, [(config, 2.0)] * 2, [(config, 1.0)]
    least = min(LEAST, full)
    steps = work.steps(RATE_SHARE, first + again, _short(full), masks)
    if steps < least:  # the best two again only if there is time left then
        steps = work.steps(RATE_MOST, first, least, masks)
    if steps < least:
        clock = work.clock
        fixed, units = work.mask_steps(masks)
        every = fixed + (units + len(first)) * LEAST
        need = (clock.fixed * len(first) + every * clock.step) * SPARE / RATE_MOST
        raise InvalidInput(
            f"a step takes {clock.step:.3g} s here and a probe {clock.fixed:.3g} s beside them: "
            f"{clock.budget / 60:g} minutes allow probes of {counted(steps, 'step')}, and fewer "
            f"than {LEAST} tell nothing; give {math.ceil((clock.spent() + need) / 6) / 10:g} "
            "minutes or more"
        )
    tried: dict[float, float] = {}
    while len(tried) < RATES and work.fits(config, steps):
        rate = next_rate(tried, usual)
        tried[rate] = work.probe("rate", config.replace(learning_rate=rate), steps).loss
    if not any(map(math.isfinite, tried.values())):
        raise InvalidInput(f"training diverged at every rate tried ({', '.join(map(str, tried))}): "
                           "check the rows")  # fmt: skip
    pair = sorted(tried, key=lambda rate: (tried[rate], rate))[:2]
    twice = work.within("rate", [config.replace(learning_rate=r) for r in pair], 2 * steps, steps)
    best, length = best_rate(tried), steps
    if len(twice) == len(pair) == 2:
        best = best_rate(dict(zip(pair, (p.loss for p in twice), strict=True)))
        length = 2 * steps
    edge = ""
    if best in (min(tried), max(tried)):
        edge = ", the largest or smallest of them: a better one may lie beyond"
    why = f"lowest held-out loss of {len(tried)} rates after {counted(length, 'step')}{edge}"
    if length < full:
        why += f"; a training of all {full} may want a lower one, which `lori compare` would try"
    choices.append(Choice("learning_rate", best, why))
    return config.replace(learning_rate=best)


def _short(full: int) -> int:
    """The most steps that a probe of a rate or a size is worth."""
    return max(full // 2, min(LEAST, full))


def _calibrated(config: Config, steps: int) -> Config:
    """With the steps of LoRI's mask, unless the settings have them."""
    if config.kind != LORI or config.calibration_steps:
        return config
    return config.replace(calibration_steps=steps)


def _mask_key(config: Config) -> object:
    return config.rank, config.sparsity, config.targets, config.calibration_steps


def _ranked(config: Config) -> bool:
    return "rank" in kind_of(config.kind).settings


def _layers(
    work: _Prober, config: Config, full: int, base_loss: float, choices: list[Choice]
) -> Config:
    """The layers that PLoP chooses, where they are shown to keep what the configured ones gain."""
    if "targets" not in kind_of(config.kind).settings:
        return config
    try:
        chosen = place(work.ws, work.task.name, config).targets(TOP)
    except InvalidInput as e:
        why = f"as configured: PLoP has no choice here ({e})"
        choices.append(Choice("targets", list(config.targets), why))
        return config
    candidates = [config.replace(targets=chosen), config]
    steps = work.steps(LAYER_SHARE, [(c, 1.0) for c in candidates], _short(full))
    found = work.within("layers", candidates, steps) if steps >= min(LEAST, full) else []
    if len(found) < len(candidates) or not any(len(p.by_row) for p in found):
        why = "as configured: no time was left to probe others"
        choices.append(Choice("targets", list(config.targets), why))
        return config
    number, why = work.kept(found, base_loss, steps, "values trained")
    best = candidates[number]
    against = f"PLoP's {', '.join(chosen)} against {', '.join(config.targets)}: {why}"
    choices.append(Choice("targets", list(best.targets), against))
    return best


def _size(
    work: _Prober, config: Config, full: int, base_loss: float, choices: list[Choice]
) -> Config:
    """Rank and, for LoRI, sparsity: the fewest values that keep what the best gains."""
    from lori_manager.models import resolve_targets

    if not _ranked(config):
        return config
    names = ["rank", *(["sparsity"] if config.kind == LORI else [])]
    shapes = work.ws.model(config).linear_shapes
    narrowest = min(min(shapes[name]) for name in resolve_targets(shapes, config.targets))
    candidates = sizes(config, narrowest)
    steps = work.steps(SIZE_SHARE, [(c, 1.0) for c in candidates], _short(full))
    found = work.within("size", candidates, steps) if steps >= min(LEAST, full) else []
    if len(found) < len(candidates) or not any(len(p.by_row) for p in found):
        why = "as configured: no time was left to probe others"
        choices.extend(Choice(name, getattr(config, name), why) for name in names)
        return config
    chosen, why = work.kept(found, base_loss, steps, "values trained")
    best = candidates[chosen]
    choices.extend(Choice(name, getattr(best, name), why) for name in names)
    return best


def _length(
    work: _Prober, config: Config, full: int, base_loss: float, choices: list[Choice]
) -> Config:
    """Steps: the shortest of three lengths that keeps what the longest gains, else all."""
    longest = work.steps(1.0, [(config, length) for length in (0.25, 0.5, 1.0)], full)
    lengths = sorted({max(1, longest // 4), max(1, longest // 2), longest})
    if longest < min(4 * LEAST, full):
        why = "as configured: no time was left to probe lengths"
        choices.append(Choice("steps", full, why))
        return config.replace(steps=full)
    # The longest first: where its time has been told too short, the others are known to fit.
    found: dict[int, Probe] = {}
    for length in reversed(lengths):
        if work.fits(config, length):
            found[length] = work.probe("steps", config, length)
    ready = [length for length in lengths if length in found]
    if len(ready) < 2 or not any(len(found[length].by_row) for length in ready):
        why = "as configured: too little time was left to compare lengths"
        choices.append(Choice("steps", full, why))
        return config.replace(steps=full)
    chosen, why = work.kept([found[length] for length in ready], base_loss, None, "steps")
    steps = ready[chosen]
    if steps == ready[-1] < full:
        why = (f"the held-out loss still falls at {counted(steps, 'step')}, the most that there "
               f"was time for: all {full} that the settings give")  # fmt: skip
        steps = full
    choices.append(Choice("steps", steps, why))
    return config.replace(steps=steps)


def _differing(config: Config, own: Config) -> dict[str, Any]:
    """Settings that are not the workspace's; options of a kind are not among them."""
    names = [f.name for f in fields(config) if f.name != "kind_options"]
    return {n: getattr(config, n) for n in names if getattr(config, n) != getattr(own, n)}


def _flag(key: str, value: Any) -> str:
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {_told(value)}"


def _told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(value) if isinstance(value, tuple | list) else str(value)
