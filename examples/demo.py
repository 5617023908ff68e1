"""The main job end to end on a real model: `make demo` runs this.

Three small tasks are taught to SmolLM2-135M-Instruct one after another on one line,
then each alone; the three single adapters are merged; the audit says what every step
did to every task. Every step is a command that you can type yourself.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from fetch_base import base_folder

HERE = Path(__file__).resolve().parent
TASKS = ("clinc_domain", "snips", "sentiment_uci")
RECIPE = ("--steps", "40", "--calibration-steps", "12", "--batch", "12")


def lori(folder: Path, *words: str) -> None:
    """Run one command as a user would, showing it first."""
    print(f"\n$ lori {' '.join(words)}", flush=True)
    command = [sys.executable, "-m", "lori_manager", *words]
    subprocess.run(command, cwd=folder, check=True)


def closing_table(folder: Path) -> None:
    """Every task's score at the base, every stage, its own adapter and the merge."""
    from lori_manager.workspace import Workspace

    with Workspace.open(folder) as ws:
        scores = {(s.subject, s.task): s for s in ws.store.scores()}
        subjects = list(dict.fromkeys(s.subject for s in ws.store.scores()))
    print(f"\n{'greedy exact match':22s}" + "".join(f"{t:>20s}" for t in TASKS))
    for subject in subjects:
        cells = []
        for task in TASKS:
            score = scores.get((subject, task))
            cells.append(f"{score.value:.3f} +- {score.error:.3f}" if score else "-")
        print(f"{subject:22s}" + "".join(f"{c:>20s}" for c in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE.parent / "demo")
    folder = parser.parse_args().folder.resolve()
    base = base_folder()
    if folder.exists():
        print(f"removing the last demo in {folder}")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for task in TASKS:
        shutil.copytree(HERE / "data" / task, folder / "tasks" / task)
    os.environ.setdefault("HF_HUB_OFFLINE", "0" if os.environ.get("LORI_DEMO_BASE") else "1")
    start = time.monotonic()
    lori(folder, "init", "--base", base)
    for task in TASKS:
        lori(folder, "add-task", task)
    lori(folder, "train", *TASKS, "--sequence", "support", *RECIPE)
    lori(folder, "train", *TASKS, *RECIPE)
    lori(folder, "merge", "--tasks", ",".join(TASKS))
    lori(folder, "audit")
    lori(folder, "blame", "support@3", "--task", "clinc_domain")
    lori(folder, "promote", "main@1")
    lori(folder, "report")
    lori(folder, "verify")
    closing_table(folder)
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    print(f"\n{minutes} min {seconds} s without downloads and installs. The workspace is {folder}:")
    print(f"try `lori -C {folder} log`, `lori -C {folder} audit support`, `lori --help`.")


if __name__ == "__main__":
    main()
