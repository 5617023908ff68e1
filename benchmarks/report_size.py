"""How large the page of a long history is, how long it takes to write, and how fast it opens.

    python benchmarks/report_size.py [--tasks 200] [--versions 500] [--rows 1000] [--runs 5]
    python benchmarks/report_size.py --workspace DIR

Without a workspace, the outcomes of every row are drawn: each version changes a few rows of
each task. `ready` is from the start of navigation until headline, summary and whatever is in
the window are drawn; `complete` until every part is. Chromium is started once, a new page a run.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from heading import heading

from lori_manager.metrics.bounds import score_bounds
from lori_manager.metrics.multiple import holm
from lori_manager.metrics.paired import paired_difference
from lori_manager.metrics.summary import summarize
from lori_manager.reporting import contents
from lori_manager.reporting.headline import headline
from lori_manager.reporting.intervals import score_interval
from lori_manager.reporting.page import write_page

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from chromium import Chromium, find_chromium

START = datetime(2026, 1, 1, tzinfo=UTC)
WORDS = ["the", "answer", "of", "every", "row", "is", "a", "short", "text", "on", "an", "order"]
GOAL_MB, GOAL_S = 15, 2


def synthetic(tasks: int, versions: int, rows: int, shown: int, seed: int) -> contents.Report:
    """A history of one line of merges, every version scored on every task."""
    rng = np.random.default_rng(seed)
    refs = ["base", *(f"main@{i}" for i in range(1, versions))]
    made = [None, *(START + timedelta(days=i) for i in range(1, versions))]
    histories, changed = [], []
    p_values: dict[str, list[float]] = {ref: [] for ref in refs}
    for t in range(tasks):
        outcomes = [rng.random(rows) < 0.2]
        for i in range(1, versions):
            flips = rng.random(rows) < (0.5 if i == 1 else rng.choice([0.01, 0.03, 0.08]))
            goal = rng.random(rows) < 0.75
            outcomes.append(np.where(flips, goal, outcomes[-1]))
        cells, best = [], 0
        for i, ref in enumerate(refs):
            parent = change(refs[i - 1], outcomes[i - 1], outcomes[i]) if i else None
            against_best = change(refs[best], outcomes[best], outcomes[i]) if i else None
            value, error, n = summarize(outcomes[i])
            if value > outcomes[best].mean():
                best = i
            low, high = score_interval(value, error, n)
            cells.append(
                contents.Cell(ref, value, low, high, n, "measured", "bf16", parent, against_best, 0)
            )
            p_values[ref].append(parent.p if parent is not None else float("nan"))
        name = f"task-{t:03d}-{WORDS[t % len(WORDS)]}"
        histories.append(
            contents.TaskHistory(
                f"{name}#1", name, True, "exact_match", 1, True, rows, refs[best], tuple(cells), ""
            )
        )  # fmt: skip
        for purpose, before in ((contents.PARENT, versions - 2), ("production", versions - 8)):
            changed.append(
                rows_changed(rng, f"{name}#1", purpose, refs, outcomes, before, versions - 1, shown)
            )
    adjusted = {ref: holm(p) for ref, p in p_values.items()}
    histories = [with_verdicts(history, t, adjusted) for t, history in enumerate(histories)]
    used = [i for i, one in enumerate(changed) if one.pair != contents.PARENT]
    for i, p in zip(used, holm([changed[i].change.p for i in used]), strict=True):
        if p >= 0.05:
            judged = dataclasses.replace(changed[i].change, verdict="")
            changed[i] = dataclasses.replace(changed[i], change=judged)
    report = contents.Report(
        "synthetic", "a-base", START, None, refs[-1], refs[-1],
        tuple(
            contents.Version(
                ref, ref.partition("@")[0] if i else "", "merged" if i else "base", "layerwise",
                96 if i else None, int(rng.integers(5e5, 4e7)) if i else None, made[i], None, None,
                ((refs[i - 1], 1.0),) if i > 1 else (),
                ("production",) if i == versions - 8 else (), False,
            )
            for i, ref in enumerate(refs)
        ),
        (contents.Alias("main@production", refs[-8], START, refs[-9], 7),),
        tuple(histories), tuple(changed), None, (), (),
    )  # fmt: skip
    return dataclasses.replace(report, headline=headline(report))


def change(against: str, before: np.ndarray, after: np.ndarray) -> contents.Change:
    """One paired comparison; its direction stands as its verdict for now."""
    d = paired_difference(before, after)
    both = score_bounds(d.only_a_right, d.only_b_right, d.rows, 0.975)
    return contents.Change(
        against, d.difference, both.lower, both.upper, d.p, d.rows, 0, 0, d.only_b_right,
        d.only_a_right, "worse" if d.difference < 0 else "better", "",
    )  # fmt: skip


def with_verdicts(
    history: contents.TaskHistory, t: int, adjusted: dict[str, list[float]]
) -> contents.TaskHistory:
    """The same, a verdict only where Holm over the version's tasks leaves one."""

    def judged(found: contents.Change | None, p: float) -> contents.Change | None:
        if found is None or p < 0.05:
            return found
        return dataclasses.replace(found, verdict="")

    cells = tuple(
        dataclasses.replace(c, parent=judged(c.parent, adjusted[c.version][t]),
                            best=judged(c.best, c.best.p * len(adjusted) if c.best else 1.0))
        for c in history.cells
    )  # fmt: skip
    return dataclasses.replace(history, cells=cells)


def rows_changed(rng, task, purpose, refs, outcomes, before, after, shown) -> contents.ChangedRows:  # type: ignore[no-untyped-def]
    """Made-up texts of about 300 characters for the rows that did change."""
    found = change(refs[before], outcomes[before], outcomes[after])
    gain = outcomes[after].astype(int) - outcomes[before].astype(int)
    picked = [*np.flatnonzero(gain < 0)[:shown], *np.flatnonzero(gain > 0)[:shown]]
    rows = tuple(
        contents.ChangedRow(
            int(i), bool(gain[i] > 0), " ".join(rng.choice(WORDS, 60)),
            " ".join(rng.choice(WORDS, 3)), float(outcomes[before][i]), float(outcomes[after][i]),
            None, None,
        )
        for i in picked
    )  # fmt: skip
    return contents.ChangedRows(
        purpose, task, refs[before], refs[after], found, int((gain < 0).sum()),
        int((gain > 0).sum()), rows,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--versions", type=int, default=500, help="the base among them")
    parser.add_argument("--rows", type=int, default=1000, help="eval rows a task")
    parser.add_argument("--shown", type=int, default=20, help="changed rows of each direction")
    parser.add_argument("--workspace", type=Path, help="measure this one's report instead")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="write the page here")
    args = parser.parse_args()
    if args.workspace is None and min(args.versions - 9, args.tasks, args.rows) < 1:
        parser.error("at least one task and row, and ten versions")

    print(heading(args.seed, libraries=("lori-manager", "numpy")))
    start = time.perf_counter()
    if args.workspace is not None:
        from lori_manager.workspace import Workspace

        with Workspace.open(args.workspace) as ws:
            report = ws.report(rows=args.shown)
    else:
        report = synthetic(args.tasks, args.versions, args.rows, args.shown, args.seed)
    gathered = time.perf_counter() - start
    cells = sum(len(task.cells) for task in report.tasks)
    with tempfile.TemporaryDirectory() as folder:
        path = args.keep or Path(folder) / "report.html"
        start = time.perf_counter()
        size = write_page(report, path)
        written = time.perf_counter() - start
        browser = find_chromium()
        if browser is None:
            raise SystemExit(f"{size / 1e6:.2f} MB; no Chromium is here to open it: set $CHROMIUM")
        ready, complete, heap = [], [], []
        with Chromium(browser) as page:
            version = page.call("Browser.getVersion")["product"]
            for _ in range(args.runs + 1):
                page.window(1200, 900)
                page.open(path)
                page.wait("document.documentElement.classList.contains('complete')", 120)
                of = "performance.getEntriesByName('report-{}')[0].startTime / 1000"
                ready.append(page.run(of.format("ready")))
                complete.append(page.run(of.format("complete")))
                heap.append(page.run("performance.memory.usedJSHeapSize") / 1e6)
                if page.console:
                    raise SystemExit(f"the page complained: {page.console}")
    shown = sum(len(c.rows) for c in report.changed)
    print(
        f"{version}; {len(report.tasks)} tasks, {len(report.versions)} versions, {cells:,} cells, "
        f"{shown:,} changed rows with text"
    )
    print(f"gathered in {gathered:.2f} s; median of {args.runs} openings, the first not counted\n")
    print("| what | measured | goal |\n|---|---|---|")
    print(f"| size | {size / 1e6:.2f} MB | {GOAL_MB} MB |")
    print(f"| written in | {written:.2f} s | - |")
    print(f"| ready after, first opening | {ready[0]:.2f} s | {GOAL_S} s |")
    for name, times, goal in (("ready", ready[1:], f"{GOAL_S} s"), ("complete", complete[1:], "-")):
        spread = f"{min(times):.2f} - {max(times):.2f}"
        print(f"| {name} after | {statistics.median(times):.2f} s ({spread}) | {goal} |")
    print(f"| JavaScript heap | {statistics.median(heap[1:]):.0f} MB | - |")


if __name__ == "__main__":
    main()
