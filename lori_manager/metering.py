"""What a training costs while it runs: time a step, and the most memory that was held."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
WARM = 2  # steps that are not counted: kernels are chosen and graphs captured in them


class Peak:
    """The most memory held since it was made.

    On a GPU what torch has allocated there, the base included; elsewhere what the whole
    process has in main memory, on Linux alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            _CLEAR.write_text("5")  # sets the high-water mark to what is held now
        except OSError:
            self._known = False

    def read(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        if not self._known:
            return None
        lines = _STATUS.read_text("ascii", "replace").splitlines()
        marks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        return int(marks[0]) * 1024 if marks else None


class Meter:
    """Seconds between the steps of the phases whose name begins so, and memory up to them."""

    def __init__(
        self,
        phase: str,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._phase, self._clock = phase, clock
        self._peak = Peak(device)
        self._last: float | None = None
        self.steps: list[float] = []
        self.peak_bytes: int | None = None

    def told(self, phase: str) -> None:
        """A step of that phase is done."""
        if not phase.startswith(self._phase):
            return
        now = self._clock()
        if self._last is not None:
            self.steps.append(now - self._last)
        self._last = now
        self.peak_bytes = self._peak.read()

    @property
    def step_seconds(self) -> float | None:
        """The median, the first steps left out; None where there were too few."""
        counted = self.steps[WARM:]
        return statistics.median(counted) if counted else None


def device_name(device: torch.device) -> str:
    """What the figures were taken on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
