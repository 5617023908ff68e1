"""How a machine or a cluster is shared out among trainings that run at once."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """What one training has: threads, and the cores and GPUs that are set aside for it."""

    threads: int
    cpus: float
    gpus: float


def share(at_once: int, cpus: float, gpus: float, largest: float | None = None) -> Share:
    """An equal share for each of `at_once` trainings.

    A training uses one GPU at most; several share one where there are fewer GPUs. Threads
    are the user's OMP_NUM_THREADS where that is set: a sum's last bits depend on them.

    Args:
        cpus, gpus: that there are in all.
        largest: cores of the largest machine; None is all.
    """
    each = min(cpus / at_once, largest or cpus)
    each = float(math.floor(each)) if each >= 1 else each
    told = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(told) if told.isdecimal() and int(told) > 0 else max(1, math.floor(each))
    return Share(
        threads,
        min(each, float(threads)),
        0.0 if gpus < 1 else 1.0 / math.ceil(at_once / gpus),
    )


def cores() -> int:
    """How many this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
