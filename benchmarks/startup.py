"""How long `lori --help` and `lori lines` take as whole processes, and that torch stays out.

    python benchmarks/startup.py [--adapters 1000] [--lines 1000] [--runs 7]

The store is filled without a model: every adapter has a few bytes of its own. Python
alone and `import sqlalchemy` are timed beside, in turns, after one warm-up of each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from heading import heading

from lori_manager.records import Base, NewAdapter
from lori_manager.store.store import Store

GOALS = {"lori --help": 0.3, "lori lines": 0.6}


def fill(folder: Path, adapters: int, lines: int) -> None:
    """A workspace with `adapters` versions spread over `lines` lines."""
    mark = "0" * 64
    with Store.create(folder / ".lori") as store:
        store.set_base(Base(mark, "none", None, str(folder), "llama", datetime.now(UTC)))
        for i in range(adapters):
            new = NewAdapter(
                line=f"line-{i % lines:04d}", origin="trained", task=None, task_revision=None,
                mask=None, parents=(), method="lori-s", rank=32, projection=None, base=mark,
            )  # fmt: skip
            store.add_adapter(new, b"adapter %d" % i)


def seconds(command: list[str], folder: Path) -> float:
    """Wall time of one process."""
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def imports_torch(command: list[str], folder: Path) -> bool:
    """Whether torch is among what the process imports, by Python's own log."""
    env = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, env=env, text=True)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    if "site" not in modules:
        raise SystemExit("Python's log of imports is empty: nothing can be said about torch")
    return "torch" in modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--lines", type=int, default=1000, help="over which they are spread")
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()

    script = Path(sys.executable).with_name("lori")
    lori = [str(script)] if script.is_file() else [sys.executable, "-m", "lori_manager"]
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "python -c 'import sqlalchemy'": [sys.executable, "-c", "import sqlalchemy"],
        "lori --help": [*lori, "--help"],
        "lori lines": [*lori, "lines"],
    }
    print(heading("none: nothing is random", libraries=("lori-manager", "typer", "sqlalchemy")))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill(folder, args.adapters, args.lines)
        taken: dict[str, list[float]] = {label: [] for label in commands}
        for i in range(args.runs + 1):
            for label, command in commands.items():
                spent = seconds(command, folder)
                if i:  # the first round fills caches
                    taken[label].append(spent)
        torch = {label: imports_torch(command, folder) for label, command in commands.items()}
    print(f"{args.adapters} adapters on {args.lines} lines; median of {args.runs} processes\n")
    middle = {label: statistics.median(times) for label, times in taken.items()}
    plain, alchemy = (middle[label] for label in list(commands)[:2])
    print("| process | median s | least - most | over python | over sqlalchemy | goal s | torch |")
    print("|---|---|---|---|---|---|---|")
    for label, times in taken.items():
        m, goal = middle[label], GOALS.get(label, "-")
        print(
            f"| `{label}` | {m:.3f} | {min(times):.3f} - {max(times):.3f} | {m / plain:.1f} | "
            f"{m / alchemy:.2f} | {goal} | {'imported' if torch[label] else 'not imported'} |"
        )


if __name__ == "__main__":
    main()
