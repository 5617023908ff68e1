"""A fork of this process that answers for one function, each call within time and memory.

For pure Python that works on what strangers wrote and may not come to an end, such as a chat
template: a loop in a loop, or `9**9**9`, cannot be stopped from inside. The fork has everything
that this process has loaded, so nothing is imported twice; it has no open files but its two pipes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

_LENGTH = 8  # bytes before every message, little-endian
_OPEN_FILES = 1 << 16


@dataclass(frozen=True)
class Bounds:
    """What one call may take.

    Attributes:
        cpu_seconds: of processor time; the kernel ends the fork after it.
        wall_seconds: until the answer, for a fork that waits.
        memory: bytes beyond what this process had.
        answer: bytes of the answer as JSON.
    """

    cpu_seconds: float = 2.0
    wall_seconds: float = 60.0
    memory: int = 512 << 20
    answer: int = 16 << 20


class Refused(Exception):
    """The function raised, or went beyond a bound; says which in one line."""


class Forked:
    """Calls of one function, made in a fork that is started with the first.

    Where a system cannot fork (Windows) the function is called here, without bounds.
    """

    def __init__(self, function: Callable[[Any], Any], bounds: Bounds | None = None) -> None:
        """
        Args:
            function: takes and returns plain JSON values.
        """
        self._function = function
        self._bounds = bounds or Bounds()
        self._child: tuple[int, int, int] | None = None  # process, requests, answers
        self._end: Callable[[], Any] = _nothing

    def __call__(self, value: Any) -> Any:
        """What the function says of the value.

        Raises:
            Refused: it raised, or took too much.
        """
        if not hasattr(os, "fork"):
            return _answer(self._function, value)
        if self._child is None:
            self._child = _start(self._function, self._bounds)
            self._end = weakref.finalize(self, _stop, *self._child)
        _, requests, answers = self._child
        deadline = time.monotonic() + self._bounds.wall_seconds
        with contextlib.suppress(BrokenPipeError):
            _send(requests, json.dumps(value).encode())
        content = _receive(answers, deadline)
        if content is None:
            self._end()
            self._child = None
            late = time.monotonic() >= deadline
            raise Refused(
                f"it did not end within {self._bounds.cpu_seconds:g} s of processor time"
                + (f" and {self._bounds.wall_seconds:g} s" if late else " or took too much memory")
            )
        told = json.loads(content)
        if "error" in told:
            raise Refused(told["error"])
        return told["value"]


def _nothing() -> None:
    return None


def _answer(function: Callable[[Any], Any], value: Any) -> Any:
    try:
        return function(value)
    except Exception as e:
        lines = str(e).strip().splitlines()
        raise Refused(lines[0] if lines else type(e).__name__) from e


def _start(function: Callable[[Any], Any], bounds: Bounds) -> tuple[int, int, int]:
    told, requests = os.pipe()
    answers, said = os.pipe()
    with warnings.catch_warnings():
        # Other threads are no matter: the fork runs the function and nothing of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _serve(function, bounds, told, said)
    os.close(told)
    os.close(said)
    return child, requests, answers


def _stop(child: int, requests: int, answers: int) -> None:
    for fd in (requests, answers):
        with contextlib.suppress(OSError):
            os.close(fd)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)


def _serve(function: Callable[[Any], Any], bounds: Bounds, told: int, said: int) -> NoReturn:
    """Answer until the pipe ends. Never returns into what the fork was made from."""
    end = os._exit
    try:
        gc.disable()  # nothing of the parent's is finalised here
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPROF):
            signal.signal(number, signal.SIG_DFL)
        low, high = sorted((told, said))
        os.closerange(3, low)
        os.closerange(low + 1, high)
        os.closerange(high + 1, _OPEN_FILES)
        _limit_memory(bounds.memory)
        while (content := _receive(told, None)) is not None:
            signal.setitimer(signal.ITIMER_PROF, bounds.cpu_seconds)
            try:
                answer = json.dumps({"value": _answer(function, json.loads(content))}).encode()
                if len(answer) > bounds.answer:
                    raise Refused(f"it made {len(answer)} bytes, more than {bounds.answer}")
            except (Refused, MemoryError, RecursionError) as e:
                answer = json.dumps({"error": str(e)[:2000] or type(e).__name__}).encode()
            signal.setitimer(signal.ITIMER_PROF, 0)
            _send(said, answer)
    finally:
        end(0)


def _limit_memory(more: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        most = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _send(fd: int, content: bytes) -> None:
    left = memoryview(len(content).to_bytes(_LENGTH, "little") + content)
    while left:
        left = left[os.write(fd, left) :]


def _receive(fd: int, deadline: float | None) -> bytes | None:
    """A message; None where the other side ended, or the time is over."""
    head = _read(fd, _LENGTH, deadline)
    return None if head is None else _read(fd, int.from_bytes(head, "little"), deadline)


def _read(fd: int, size: int, deadline: float | None) -> bytes | None:
    found = bytearray()
    while len(found) < size:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                return None
        more = os.read(fd, min(size - len(found), 1 << 20))
        if not more:
            return None
        found += more
    return bytes(found)
