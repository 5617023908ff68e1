"""Whether the audit's verdicts and its power line keep their promises, by simulation.

    python benchmarks/audit_simulation.py [--runs 2000] [--plants 5000] [--seed 0]

Right/wrong outcomes: rows, base score and share of changed rows are set; three truths
(equal models, worse by exactly the margin, worse by twice the margin) and families of 1, 10
and 30 tasks are drawn and judged by `metrics.verdict`. A verdict depends on the counts of
lost and gained rows alone, so each pair of counts is judged once. Beside the simulated
shares stand the exact ones, summed over all counts: 2000 runs wander by .005 on their own.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from functools import cache, partial

import numpy as np
from heading import heading
from numpy.typing import NDArray

from lori_manager.metrics.bounds import score_bounds
from lori_manager.metrics.multiple import holm
from lori_manager.metrics.paired import mcnemar_exact, sign_flip
from lori_manager.metrics.power import rows_to_decide, smallest_drop, smallest_mean_drop
from lori_manager.metrics.verdict import (
    REGRESSED,
    SAFE,
    UNDECIDED,
    Compared,
    Measured,
    decide,
    judge,
    measure,
)

ROWS = (50, 200, 1000)
SCORES = (0.6, 0.9, 0.98)
CHANGED = (0.02, 0.1, 0.3)
MARGINS = (0.02, 0.05)
TASKS = (1, 10, 30)
LEVEL = 0.05
RESAMPLES = 1000  # of the bootstrap, to be done in time


@cache
def measured(rows: int, lost: int, gained: int, margin: float) -> Measured:
    """A task with these counts, as the audit would measure it."""
    before, after = np.ones(rows), np.ones(rows)
    before[:gained] = 0.0
    after[gained : gained + lost] = 0.0
    return measure(Compared(before, after, margin))


def shares(changed: float, drop: float, score: float) -> tuple[float, float] | None:
    """Shares of lost and gained rows; None where the base score does not allow them.

    Where the drop is larger than the share of changed rows, all that change are lost.
    """
    changed = max(changed, drop)
    lost, gained = (changed + drop) / 2, (changed - drop) / 2
    return (lost, gained) if lost <= score and gained <= 1 - score else None


def right_wrong(runs: int, random: np.random.Generator) -> None:
    """The table of verdicts on right/wrong outcomes."""
    print(
        "| rows | score | changed | margin | equal: any `regressed` of 1, 10, 30 | exact | "
        "equal: safe | undecided | at margin: safe | exact | undecided | "
        "twice: regressed | safe | undecided |"
    )
    print("|---" * 14 + "|")
    worst = {"any": 0.0, "any exact": 0.0, "safe": 0.0, "safe exact": 0.0}
    for rows in ROWS:
        for score in SCORES:
            for changed in CHANGED:
                for margin in MARGINS:
                    row = _setting(rows, score, changed, margin, runs, random, worst)
                    if row:
                        print(row, flush=True)
    print(
        f"\nlargest: any `regressed` on equal models {worst['any']:.4f} simulated, "
        f"{worst['any exact']:.4f} exact; `safe` at the margin {worst['safe']:.4f} simulated, "
        f"{worst['safe exact']:.4f} exact"
    )


def _setting(
    rows: int, score: float, changed: float, margin: float, runs: int,
    random: np.random.Generator, worst: dict[str, float],
) -> str:  # fmt: skip
    """One line of the table, "" where the score allows no such pairs."""
    truths = [shares(changed, drop, score) for drop in (0.0, margin, 2 * margin)]
    if truths[0] is None or truths[1] is None:
        return ""
    equal = {tasks: _families(rows, truths[0], margin, tasks, runs, random) for tasks in TASKS}
    at_margin = _families(rows, truths[1], margin, 1, runs, random)
    twice = _families(rows, truths[2], margin, 1, runs, random) if truths[2] else {}
    any_regressed = [equal[tasks]["any"] for tasks in TASKS]
    exact_any = [1 - (1 - _exact_regressed(rows, truths[0], LEVEL / t)) ** t for t in TASKS]
    exact_safe = _exact_safe(rows, truths[1], margin)
    worst["any"] = max(worst["any"], *any_regressed)
    worst["any exact"] = max(worst["any exact"], *exact_any)
    worst["safe"] = max(worst["safe"], at_margin[SAFE])
    worst["safe exact"] = max(worst["safe exact"], exact_safe)
    three = ", ".join(f"{x:.3f}" for x in any_regressed)
    exact = ", ".join(f"{x:.3f}" for x in exact_any)
    last = [f"{twice[v]:.3f}" if twice else "-" for v in (REGRESSED, SAFE, UNDECIDED)]
    return (
        f"| {rows} | {score} | {changed} | {margin} | {three} | {exact} | {equal[1][SAFE]:.3f} | "
        f"{equal[1][UNDECIDED]:.3f} | {at_margin[SAFE]:.3f} | {exact_safe:.4f} | "
        f"{at_margin[UNDECIDED]:.3f} | {' | '.join(last)} |"
    )


def _families(
    rows: int, truth: tuple[float, float], margin: float, tasks: int, runs: int,
    random: np.random.Generator,
) -> dict[str, float]:  # fmt: skip
    """Shares of the three verdicts over all tasks, and of families with any `regressed`."""
    lost, gained = truth
    counts = random.multinomial(rows, [lost, gained, 1 - lost - gained], (runs, tasks))
    said = {SAFE: 0, REGRESSED: 0, UNDECIDED: 0, "any": 0}
    for family in counts.tolist():
        verdicts = [j.verdict for j in decide([measured(rows, b, c, margin) for b, c, _ in family])]
        for verdict in verdicts:
            said[verdict] += 1
        said["any"] += REGRESSED in verdicts
    return {k: n / (runs if k == "any" else runs * tasks) for k, n in said.items()}


def _likely_counts(
    rows: int, truth: tuple[float, float]
) -> Iterator[tuple[int, float, NDArray[np.int64], NDArray[np.float64]]]:
    """Gained rows, their chance, and the lost rows with their chances given those."""
    lost, gained = truth
    for c, chance in zip(*_binomial(rows, gained), strict=True):
        losses, chances = _binomial(rows - int(c), lost / (1 - gained))
        yield int(c), float(chance), losses, chances


def _binomial(n: int, share: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    if share <= 0:
        return np.zeros(1, dtype=np.int64), np.ones(1)
    spread = 7 * math.sqrt(n * share) + 7
    k = np.arange(max(0, int(n * share - spread)), min(n, int(n * share + spread)) + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    return k, np.exp(
        logs[n] - logs[k] - logs[n - k] + k * math.log(share) + (n - k) * math.log1p(-share)
    )


def _exact_safe(rows: int, truth: tuple[float, float], margin: float) -> float:
    """P(safe): for each number of gained rows, `safe` holds up to some number of lost ones."""
    total = 0.0
    for gained, chance, losses, chances in _likely_counts(rows, truth):
        low, high = 0, losses.size  # the first so many are safe
        while low < high:
            middle = (low + high) // 2
            if score_bounds(int(losses[middle]), gained, rows).lower > -margin:
                low = middle + 1
            else:
                high = middle
        total += chance * float(chances[:low].sum())
    return total


def _exact_regressed(rows: int, truth: tuple[float, float], level: float) -> float:
    """P(p <= level) of one task, an upper limit of P(regressed)."""
    total = 0.0
    for gained, chance, losses, chances in _likely_counts(rows, truth):
        low, high = 0, losses.size  # from which on p is small enough
        while low < high:
            middle = (low + high) // 2
            if mcnemar_exact(int(losses[middle]), gained, "less") <= level:
                high = middle
            else:
                low = middle + 1
        total += chance * float(chances[low:].sum())
    return total


def score_levels() -> None:
    """The largest chance, over all truths, that the score bound lies above the truth."""
    print("| rows | confidence | largest chance | nominal | at margin, gained share |")
    print("|---|---|---|---|---|")
    gained = np.concatenate([[0.0], np.geomspace(5e-4, 0.45, 25)])
    for rows in (20, 50, 200):
        for confidence in (0.9, 0.95, 0.99):
            found = []
            for margin in (0.005, 0.01, 0.02, 0.03, 0.05, 0.1):
                for c in gained[2 * gained + margin <= 0.9]:
                    truth = (float(c) + margin, float(c))
                    found.append((_level(rows, truth, margin, confidence), margin, float(c)))
            chance, margin, c = max(found)
            print(
                f"| {rows} | {confidence} | {chance:.4f} | {1 - confidence:.2f} | "
                f"{margin}, {c:.3f} |",
                flush=True,
            )


@cache
def _lower(rows: int, lost: int, gained: int, confidence: float) -> float:
    return score_bounds(lost, gained, rows, confidence).lower


def _level(rows: int, truth: tuple[float, float], margin: float, confidence: float) -> float:
    total = 0.0
    for gained, chance, losses, chances in _likely_counts(rows, truth):
        safe = 0
        while safe < losses.size and _lower(rows, int(losses[safe]), gained, confidence) > -margin:
            safe += 1
        total += chance * float(chances[:safe].sum())
    return total


# Before, after, weights of rows whose mean truly falls by `drop`.
Pairs = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]
Draw = Callable[[int, float, np.random.Generator], Pairs]


def _normal(rows: int, drop: float, random: np.random.Generator) -> Pairs:
    before = random.normal(size=rows)
    return before, before - drop + random.normal(0, 0.4, rows), None


def _heavy(rows: int, drop: float, random: np.random.Generator) -> Pairs:
    before = random.normal(size=rows)
    return before, before - drop + 0.25 * random.standard_t(3, rows), None


def _skewed(rows: int, drop: float, random: np.random.Generator) -> Pairs:
    before = random.normal(size=rows)
    return before, before - drop + 0.4 * (1 - random.exponential(size=rows)), None


def _levels(rows: int, drop: float, random: np.random.Generator) -> Pairs:
    """Scores of five levels, a fifth drawn anew; a drop is rows that fail altogether."""
    levels = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    before = random.choice(levels, rows)
    after = np.where(random.random(rows) < 0.2, random.choice(levels, rows), before)
    return before, np.where(random.random(rows) < 2 * drop, 0.0, after), None


def _tokens(rows: int, drop: float, random: np.random.Generator) -> Pairs:
    """Minus the mean negative log-likelihood of rows of 3 to 120 tokens, weighted by them."""
    count = random.integers(3, 121, rows).astype(np.float64)
    before = -random.gamma(4, 0.5, rows)
    return before, before - drop + 0.9 * random.standard_t(5, rows) / np.sqrt(count), count


KINDS: dict[str, Draw] = {
    "normal": _normal,
    "heavy tails (t, 3 degrees)": _heavy,
    "skewed to drops (exponential)": _skewed,
    "five levels, a fifth drawn anew": _levels,
    "perplexity, token weights": _tokens,
}


def _deviation(draw: Draw, drop: float, random: np.random.Generator) -> float:
    """Standard deviation of the rows' differences at that drop."""
    before, after, _ = draw(200_000, drop, random)
    return float(np.std(after - before))


def graded(runs: int, random: np.random.Generator) -> None:
    """`safe` at a drop of exactly the margin, for outcomes that are not right/wrong."""
    print(
        "| outcomes | rows | margin | at margin: safe | regressed | undecided | equal: safe | "
        "undecided |"
    )
    print("|---" * 8 + "|")
    for name, draw in KINDS.items():
        for rows in (50, 200):
            margin = 3 * _deviation(draw, 0.0, random) / math.sqrt(rows)
            said = {}
            for truth, drop in (("at margin", margin), ("equal", 0.0)):
                verdicts = []
                for run in range(runs if drop else runs // 4):
                    before, after, weights = draw(rows, drop, random)
                    judged = judge(
                        before, after, margin, weights=weights, resamples=RESAMPLES, seed=run
                    )
                    verdicts.append(judged.verdict)
                said[truth] = {
                    v: verdicts.count(v) / len(verdicts) for v in (SAFE, REGRESSED, UNDECIDED)
                }
            at, same = said["at margin"], said["equal"]
            print(
                f"| {name} | {rows} | {margin:.3f} | {at[SAFE]:.3f} | {at[REGRESSED]:.3f} | "
                f"{at[UNDECIDED]:.3f} | {same[SAFE]:.3f} | {same[UNDECIDED]:.3f} |",
                flush=True,
            )


def graded_families(runs: int, random: np.random.Generator) -> None:
    """Any p <= .05 after Holm among equal models: an upper limit of any `regressed`.

    A task whose sum is hardly below 0 cannot have such a p, and is not tested.
    """
    print("| outcomes | rows | any p <= .05 of 1, 10, 30 tasks |")
    print("|---|---|---|")
    for name, draw in KINDS.items():
        alarms = dict.fromkeys(TASKS, 0)
        for _ in range(runs):
            p = np.ones(max(TASKS))
            for task in range(max(TASKS)):
                before, after, weights = draw(50, 0.0, random)
                # Equal models: which of the two came first is a coin's toss.
                d = (after - before) * random.choice([-1.0, 1.0], 50)
                d = d if weights is None else weights * d
                if d.sum() < -1.2 * math.sqrt(float(np.sum(d**2))):
                    p[task] = sign_flip(d, "less")
            for tasks in TASKS:
                alarms[tasks] += bool(np.any(holm(p[:tasks]) <= LEVEL))
        print(
            f"| {name} | 50 | {', '.join(f'{alarms[t] / runs:.3f}' for t in TASKS)} |", flush=True
        )


def planted(plants: int, random: np.random.Generator) -> None:
    """How often a drop of the promised size is found."""
    print("| outcomes | rows | assumed | tasks | smallest drop | promised | found |")
    print("|---|---|---|---|---|---|---|")
    p_of = cache(partial(mcnemar_exact, alternative="less"))
    for rows in ROWS:
        for changed in (0.0, *CHANGED):
            for tasks in (1, 30):
                d = smallest_drop(rows, changed, alpha=LEVEL / tasks)
                if not math.isfinite(d.drop):
                    continue
                lost = (d.discordance + d.drop) / 2
                truth = [lost, d.discordance - lost, 1 - d.discordance]
                counts = random.multinomial(rows, np.clip(truth, 0, 1), plants).tolist()
                found = sum(p_of(b, c) <= d.alpha for b, c, _ in counts) / plants
                print(
                    f"| right/wrong | {rows} | {d.assumption} | {tasks} | {d.drop:.4f} | "
                    f"{d.power} | {found:.4f} |",
                    flush=True,
                )
    for name in ("normal", "heavy tails (t, 3 degrees)", "five levels, a fifth drawn anew"):
        for rows in (50, 200) if name == "normal" else (50,):
            draw, drop = KINDS[name], 0.0
            for _ in range(4):  # a drop may widen the differences
                d = smallest_mean_drop(rows, _deviation(draw, drop, random), alpha=LEVEL)
                drop = d.drop
            found = 0
            for _ in range(plants):
                before, after, _ = draw(rows, d.drop, random)
                found += sign_flip(after - before, "less") <= d.alpha
            print(
                f"| {name} | {rows} | deviation {d.deviation:.3f} | 1 | {d.drop:.4f} | {d.power} | "
                f"{found / plants:.4f} |",
                flush=True,
            )


def decided(plants: int, random: np.random.Generator) -> None:
    """How often a verdict falls with the rows that are said to decide it."""
    print("| true difference | changed | margin | rows said | promised | decided |")
    print("|---|---|---|---|---|---|")
    for difference, changed, margin in (
        (0.0, 0.02, 0.02), (0.0, 0.1, 0.02), (-0.01, 0.05, 0.03), (-0.02, 0.1, 0.03),
        (-0.04, 0.1, 0.02), (-0.02, 0.05, 0.02), (0.01, 0.3, 0.02),
    ):  # fmt: skip
        lost = (changed - difference) / 2
        rows = rows_to_decide(lost, changed - lost, margin)
        if rows is None:
            raise SystemExit(f"no rows would decide {difference}, {changed}, {margin}")
        truth = [lost, changed - lost, 1 - changed]
        verdicts = [
            decide([measured(rows, b, c, margin)])[0].verdict
            for b, c, _ in random.multinomial(rows, truth, plants).tolist()
        ]
        share = 1 - verdicts.count(UNDECIDED) / plants
        print(f"| {difference:+} | {changed} | {margin} | {rows} | 0.8 | {share:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--plants", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(heading(args.seed, libraries=("numpy",)))
    parts: dict[str, Callable[[np.random.Generator], None]] = {
        f"Right/wrong, {args.runs} families a cell": partial(right_wrong, args.runs),
        "Score bounds, all truths with at most nine rows in ten changed, exact": (
            lambda _: score_levels()
        ),
        f"Other outcomes, {args.runs} pairs of versions at the margin": partial(graded, args.runs),
        f"Other outcomes, equal models, {args.runs} families": partial(graded_families, args.runs),
        f"Planted drops, {args.plants} each": partial(planted, args.plants),
        f"Rows that decide, {args.plants} each": partial(decided, args.plants),
    }
    for i, (title, part) in enumerate(parts.items()):
        print(f"\n{title}\n")
        part(np.random.default_rng([args.seed, i]))


if __name__ == "__main__":
    main()
