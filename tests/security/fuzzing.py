"""Mutated files of every form, read as lori reads them: refused in one line, or whole.

    python tests/security/fuzzing.py --count 10000          # of each group, spread over its targets
    python tests/security/fuzzing.py --only "rows" --case 17 --seed 0     # one case again

A case is its target's name, the seed and a number. It fails by a traceback, by more than a second
of processor time, or by accepting what an independent reader does not.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from bundle_targets import bundle_targets
from targets import Accepted, Bed, Target, targets

SECONDS = 1.0  # of processor time
WAITING = 30.0  # of any time


class Hang(BaseException):
    """A case took too long."""


@dataclass
class Found:
    """What a run came to."""

    cases: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    slowest: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    failures: list[str] = field(default_factory=list)


def _late(*_: object) -> None:
    raise Hang


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    for number, timer, seconds in (
        (signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, WAITING)
    ):  # fmt: skip
        signal.signal(number, _late)
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What is refused is not told at length as well."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def one(name: str, target: Target, seed: int, case: int, folder: Path, found: Found) -> None:
    """Read one case and note what came of it."""
    rng = random.Random(f"{name}|{seed}|{case}")
    folder.mkdir()
    begun = time.process_time()
    again = f"--only {name!r} --case {case} --seed {seed}"
    try:
        with _bounded(), contextlib.redirect_stderr(io.StringIO()):
            found.accepted[name] += target.run(rng, folder)
    except Hang:
        found.failures.append(f"hang: {again}")
    except Accepted as e:
        found.failures.append(f"accepted, {e}: {again}")
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt | SystemExit):
            raise
        where = traceback.extract_tb(e.__traceback__)[-1]
        text = f"{type(e).__name__}: {str(e)[:150]!r} at {Path(where.filename).name}:{where.lineno}"
        found.failures.append(f"traceback, {text}: {again}")
    finally:
        found.cases[name] += 1
        found.slowest[name] = max(found.slowest[name], time.process_time() - begun)
        shutil.rmtree(folder)


def run(
    count: int, seed: int = 0, *, only: str | None = None, case: int | None = None
) -> tuple[Found, dict[str, Target]]:
    """`count` cases of each group, shared out evenly to its targets."""
    torch.set_num_threads(1)
    found = Found()
    with tempfile.TemporaryDirectory() as folder, _quiet():
        known = targets(Bed(Path(folder))) | bundle_targets(Path(folder) / "bundles")
        groups = Counter(target.group for target in known.values())
        for name, target in known.items():
            if only not in (None, name):
                continue
            each = -(-count // groups[target.group])
            cases = range(each) if case is None else [case]
            for number in cases:
                one(name, target, seed, number, Path(folder) / "case", found)
    return found, known


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="cases of each group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one target")
    parser.add_argument("--case", type=int, help="one case of it")
    told = parser.parse_args()
    begun = time.time()
    found, known = run(told.count, told.seed, only=told.only, case=told.case)
    print(f"{'target':28}{'cases':>7}{'accepted':>10}{'slowest, s':>12}")
    for name in found.cases:
        print(f"{name:28}{found.cases[name]:7}{found.accepted[name]:10}{found.slowest[name]:12.3f}")
    for group in ("files", "configs"):
        print(f"{group}: {sum(n for name, n in found.cases.items() if known[name].group == group)}")
    print(f"{len(found.failures)} failures, seed {told.seed}, {time.time() - begun:.0f} s, "
          f"Python {platform.python_version()}, torch {torch.__version__}")  # fmt: skip
    for line in found.failures[:200]:
        print(line)
    return bool(found.failures)


if __name__ == "__main__":
    sys.exit(main())
