"""The parent's side: start the child, give it the job, wait no longer than allowed."""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lori_manager.errors import InvalidInput
from lori_manager.sandbox.protocol import FAILED, NAMESPACES, TOKEN_BYTES

_ROOT = str(Path(__file__).resolve().parents[2])
_BOOT = (
    f"import sys; sys.path.insert(0, {_ROOT!r}); "
    "from lori_manager.sandbox.inside import main; main()"
)
_SIGKILL, _SIGXCPU = 9, 24  # of Linux: not every system that imports this module has them
_OUT_OF_TIME = (-_SIGKILL, -_SIGXCPU, 128 + _SIGKILL, 128 + _SIGXCPU)
_MOST_FILES = 1000
_GLANCE = 0.1  # seconds between looks at a folder on disk


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        cpu_seconds: of processor time.
        wall_seconds: from start to end, waiting included.
        memory: bytes of address space, the interpreter's own included.
        file_bytes: of one file. folder_bytes: of all files.
        open_files: at a time.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 20.0
    memory: int = 1 << 30
    file_bytes: int = 16 << 20
    folder_bytes: int = 64 << 20
    open_files: int = 64


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Attributes:
        reason: "passed": every part ran to its end; "failed": it raised, `sys.exit`
            included; "time" or "files": a limit; "died": anything else. A program that
            sends itself SIGKILL looks like one that ran out of time.
        guards: that were in force.
    """

    reason: str
    guards: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every part ran to its end."""
        return self.reason == "passed"


def run(parts: Sequence[str], limits: Limits | None = None, *, namespaces: bool = True) -> Ended:
    """Run Python sources, one after another in one module, in a confined child process.

    The child has this interpreter's standard library and nothing else of this process: no
    environment, no descriptors, an empty folder for its own files. It is killed, with its
    process group, when this returns.

    Args:
        parts: the sources; a part runs only if those before it ended without raising.
        limits: the usual ones where None.
        namespaces: take namespaces where the kernel gives them.
    Raises:
        InvalidInput: this machine cannot confine a program; nothing of it was run.
    """
    limits = limits or Limits()
    if not sys.platform.startswith("linux"):
        raise InvalidInput(
            f"programs are confined by Linux alone, this is {sys.platform}: score on Linux, or "
            "in a Linux container"
        )
    token = os.urandom(TOKEN_BYTES)
    sources = [part.encode("utf-8", "surrogatepass") for part in parts]
    told = dataclasses.asdict(limits) | {
        "root": _ROOT,
        "parent": os.getpid(),
        "namespaces": namespaces,
        "sizes": [len(source) for source in sources],
    }
    job = json.dumps(told).encode() + b"\n" + b"".join(sources) + token
    with tempfile.TemporaryDirectory(prefix="lori-run-", ignore_cleanup_errors=True) as folder:
        child = subprocess.Popen(  # noqa: S603 - this interpreter, on our own module
            [sys.executable, "-I", "-S", "-B", "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd=folder,
            start_new_session=True,
        )
        try:
            return _watch(child, job, token, limits, Path(folder))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, _SIGKILL)
            child.wait()
            for pipe in (child.stdin, child.stdout, child.stderr):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


@cache
def check() -> tuple[bool, tuple[str, ...]]:
    """Whether namespaces are to be had, and the names of all guards.

    Raises:
        InvalidInput: this machine cannot confine a program.
    """
    with contextlib.suppress(InvalidInput):
        ended = run(["pass"])
        return NAMESPACES in ended.guards, ended.guards
    return False, run(["pass"], namespaces=False).guards


def _watch(
    child: subprocess.Popen[bytes], job: bytes, token: bytes, limits: Limits, folder: Path
) -> Ended:
    """Hand over the job and wait for the answer, an end, or a limit."""
    if child.stdin is None or child.stdout is None:
        raise ValueError("the child must have pipes")
    end = time.monotonic() + limits.wall_seconds
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(job)
        child.stdin.close()
    answer, guards = b"", None
    most = 4096
    while len(answer) < most:
        left = end - time.monotonic()
        if left <= 0:
            return Ended("time", _started(child, guards))
        if not select.select([child.stdout], [], [], min(left, _GLANCE))[0]:
            if guards and NAMESPACES not in guards and _too_much(folder, limits.folder_bytes):
                return Ended("files", guards)
            continue
        more = os.read(child.stdout.fileno(), most - len(answer))
        if not more:
            break
        answer += more
        line, newline, said = answer.partition(b"\n")
        if newline and guards is None:
            guards = tuple(json.loads(line))
        if guards is not None and len(said) >= len(token):
            passed = hmac.compare_digest(said, token[::-1])
            return Ended("passed" if passed else "died", guards)
    guards = _started(child, guards)
    code = child.wait()
    reason = "failed" if code == FAILED else "time" if code in _OUT_OF_TIME else "died"
    return Ended(reason, guards)


def _started(child: subprocess.Popen[bytes], guards: tuple[str, ...] | None) -> tuple[str, ...]:
    """The guards; InvalidInput where the child ended before it had any."""
    if guards is not None:
        return guards
    os.killpg(child.pid, _SIGKILL)
    said = child.stderr.read(4096).decode(errors="replace").strip() if child.stderr else ""
    last = said.splitlines()[-1] if said else "the child process did not start in time"
    raise InvalidInput(
        f"this machine cannot confine a program, so none is run: {last}; score on another "
        "machine (Linux 5.13 or newer on x86_64 or aarch64)"
    )


def _too_much(folder: Path, most: int) -> bool:
    """Whether a folder holds more bytes or more files than it may."""
    size = 0
    with contextlib.suppress(OSError):
        for count, path in enumerate(folder.rglob("*")):
            size += path.lstat().st_size
            if size > most or count > _MOST_FILES:
                return True
    return False
