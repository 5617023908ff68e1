"""What a command says on stderr while it works."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from lori_manager.cli.output import duration, one_line

if TYPE_CHECKING:
    from lori_manager.training import Progress

REDRAW = 0.1  # seconds between two states of the line on a terminal
REPEAT = 10.0  # seconds between two lines elsewhere


class Teller:
    """Messages, and the progress of the step at hand: one moving line, or one every 10 s.

    Of several trainings at once, each has a line of its own.

    Args:
        quiet: say nothing.
        stream: stderr by default.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quiet = quiet
        self._stream = stream or sys.stderr
        self._clock = clock
        self._moving = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._phases: dict[str, str] = {}
        self._last: dict[str, float] = {}
        self._lines: dict[str, str] = {}
        self._drawn = 0

    def message(self, text: str) -> None:
        """One line that stays."""
        if not self._quiet:
            self._wipe()
            self._write(one_line(text) + "\n")

    def progress(self, state: Progress) -> None:
        """Where the step at hand is."""
        if self._quiet:
            return
        now = self._clock()
        if state.phase != self._phases.get(state.job):
            self._phases[state.job] = state.phase
            self._last[state.job] = -math.inf if self._moving else now
        if now - self._last[state.job] < (REDRAW if self._moving else REPEAT):
            return
        self._last[state.job] = now
        if not self._moving:
            self._write(progress_line(state) + "\n")
            return
        width = shutil.get_terminal_size().columns - 1
        self._lines[state.job] = progress_line(state)[:width]
        up = "\x1b[F" * (self._drawn - 1) or "\r"
        self._write(up + "\n".join(f"{line}\x1b[K" for line in self._lines.values()))
        self._drawn = len(self._lines)

    def _wipe(self) -> None:
        if self._drawn:
            up = "\x1b[F" * (self._drawn - 1)
            self._write(f"{up}\r\x1b[J" if up else "\r\x1b[K")
            self._drawn = 0

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._wipe()


def progress_line(state: Progress) -> str:
    """`training safety  120/500  loss 1.234  3,402 tokens/s  1 min 20 s left`."""
    scoring = math.isnan(state.loss)
    parts = [one_line(state.phase), f"{state.step}/{state.steps}"]
    if not scoring:
        parts.append(f"loss {state.loss:.3f}")
    if math.isfinite(state.tokens_per_second):
        parts.append(f"{state.tokens_per_second:,.0f} {'rows' if scoring else 'tokens'}/s")
    if math.isfinite(state.seconds_left):
        parts.append(f"{duration(state.seconds_left)} left")
    return "  ".join(parts)
