"""How well `lori merge --dry-run` tells what a merge will lose.

    python benchmarks/forecast_quality.py LOG [LOG ...]

Reads "forecast" and "train" rows of `merge_quality.py`: merges of random subsets of tasks by
several methods, each with the share of 32 prompts of a task, which no method was fitted to, on
which the merge says what the task's own adapter says. The forecast of a merge's loss on a task is
the own score times the share that disagrees; nothing in it is fitted. Beside it the error of the
merged update on the task's own inputs, mean of logarithms over modules, by rank correlation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr


def main() -> None:
    rows = [json.loads(line) for log in sys.argv[1:] for line in Path(log).read_text().splitlines()]
    own = {
        (r["kind"], r["task"], r["seed"]): r["eval"]["score"] for r in rows if r["what"] == "train"
    }
    found: dict[str, list[tuple[float, float, float]]] = {}
    merges: dict[str, int] = {}
    for r in rows:
        if r["what"] != "forecast":
            continue
        for name in (r["method"], "all"):
            merges[name] = merges.get(name, 0) + 1
            for task, told in r["told"].items():
                mine = own[r["kind"], task, r["seed"]]
                loss = mine - r["scores"][task]["score"]
                expected = mine * (1 - told["agrees"][0])
                found.setdefault(name, []).append((expected, loss, told["log_error"]))
    print("| method | merges | losses | mean loss | off by | R^2 | rank correlation of the error |")
    print("|---|---|---|---|---|---|---|")
    for name in sorted(found, key=lambda n: (n == "all", n)):
        expected, loss, error = np.array(found[name]).T
        r2 = 1 - np.square(expected - loss).sum() / np.square(loss - loss.mean()).sum()
        cells = (name, merges[name], len(loss), f"{loss.mean():.3f}",
                 f"{np.abs(expected - loss).mean():.3f}", f"{r2:.3f}",
                 f"{spearmanr(error, loss).statistic:.2f}")  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
