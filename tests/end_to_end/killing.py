"""`lori` commands in forked processes that kill themselves, as kill -9 does, at a chosen moment.

A moment is a line of lori_manager's code about to run, counted from the command's start:
finer than time, as likely in a write that takes a millisecond as in a training that
takes hours, and the same one every time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lori_manager

PACKAGE = str(Path(lori_manager.__file__).parent) + os.sep
PRELOADED = [
    "torch", "accelerate", "transformers.models.llama.modeling_llama", "lori_manager.training",
    "lori_manager.cli.app", "lori_manager.workspace", "lori_manager.adapters.lori",
    "lori_manager.scoring", "lori_manager.tasks.scorers", "lori_manager.store.store",
]  # fmt: skip

# A server that has imported everything and started no thread: a fork of it is a new
# `lori` without the seconds that torch takes to import.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


def lori(folder: Path, *args: object) -> int:
    """Run a command to its end in a fork; its exit code."""
    return _ended(_command, [str(folder), *map(str, args)])


def moments(folder: Path, trace: Path, *args: object) -> list[str]:
    """Run a command to its end; the module of each line that it ran, in order."""
    assert _ended(_recorded, [str(folder), *map(str, args)], str(trace)) == 0
    return trace.read_text().split()


def killed(folder: Path, moment: int, *args: object) -> bool:
    """Run a command that dies at that line; whether it did."""
    return _ended(_suicidal, [str(folder), *map(str, args)], moment) == -signal.SIGKILL


def _ended(target: Callable[..., None], *args: Any) -> int:
    process = _context.Process(target=target, args=args)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the command hangs"
    return process.exitcode


def _command(args: list[str]) -> None:
    from lori_manager.cli.app import app

    with Path(os.devnull).open("w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        app(["-C", *args], prog_name="lori")


def _recorded(args: list[str], trace: str) -> None:
    ran: list[str] = []
    try:
        _on_every_line(ran.append)
        _command(args)
    finally:
        sys.settrace(None)
        Path(trace).write_text("\n".join(ran))


def _suicidal(args: list[str], moment: int) -> None:
    left = moment

    def count(_: str) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    _on_every_line(count)
    _command(args)


def _on_every_line(tell: Callable[[str], None]) -> None:
    """Call `tell` with the module of every line of lori_manager before it runs."""

    def inside(frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
        if event == "line":
            tell(frame.f_code.co_filename[len(PACKAGE) : -len(".py")])
        return inside

    def calls(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        return inside if frame.f_code.co_filename.startswith(PACKAGE) else None

    sys.settrace(calls)
