"""What the child does: give everything up, run the program's parts, answer.

The job comes over a pipe: one line of JSON, the parts' sources, and behind them a token.
The answer goes over another: one line of JSON that names the guards in force, written
before anything of the program is looked at, and after the last part the token backwards.
The token is read only then, so no part finds it in memory; whatever ends the process before
(an exception, `sys.exit`, `os._exit`, a signal) leaves it unsaid, and so does handing on
what comes over the pipe.
"""

# ruff: noqa: PTH109, PTH118
# A child imports as little as it can, and pathlib is much.

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from lori_manager.sandbox import kernel
from lori_manager.sandbox.protocol import (
    FAILED,
    LANDLOCK,
    NAMESPACES,
    SECCOMP,
    TOKEN_BYTES,
    UNFIT,
)

_NAME = "program"
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache",
              "/etc/localtime", "/usr/share/zoneinfo")  # fmt: skip
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/urandom", "/dev/random")


def main() -> NoReturn:
    """Serve the one job on standard input."""
    write, end, read = os.write, os._exit, _read_exactly
    job, answer = os.dup(0), os.dup(1)
    told = json.loads(_line(job))
    parts = [read(job, size).decode("utf-8", "surrogatepass") for size in told["sizes"]]
    try:
        guards = _confine(told, keep=(job, answer))
    except (kernel.Unsupported, OSError, ValueError) as e:
        os.write(2, f"{e}".encode())
        end(UNFIT)
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    write(answer, json.dumps(guards).encode() + b"\n")
    try:
        _run(parts, told["root"])
    except BaseException:  # noqa: BLE001 - also SystemExit: a program that ends early has not passed
        end(FAILED)
    write(answer, read(job, TOKEN_BYTES)[::-1])
    end(0)


def _confine(told: dict[str, Any], keep: tuple[int, int]) -> list[str]:
    """Every guard there is; their names, the strongest first."""
    kernel.end_with_parent()
    if os.getppid() not in (told["parent"], 0):
        raise kernel.Unsupported("the parent has ended")
    os.closerange(3, min(keep))
    os.closerange(max(keep) + 1, 4096)
    for limit, value in (
        (resource.RLIMIT_CPU, told["cpu_seconds"]),
        (resource.RLIMIT_AS, told["memory"]),
        (resource.RLIMIT_FSIZE, told["file_bytes"]),
        (resource.RLIMIT_NOFILE, told["open_files"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    folder = os.getcwd()
    guards = []
    if told["namespaces"] and kernel.enter_namespaces(folder, told["folder_bytes"]):
        guards.append(NAMESPACES)
    kernel.drop_privileges()
    own = [os.path.realpath(p) for p in sys.path if p != told["root"]]
    own.append(os.path.join(os.path.realpath(sys.base_prefix), "lib"))
    kernel.restrict_files(folder, {*own, *_LIBRARIES}, _DEVICES)
    kernel.filter_system_calls()
    return [*guards, LANDLOCK, SECCOMP]


def _run(parts: list[str], root: str) -> None:
    """Execute the parts one after another in one fresh module.

    All are compiled before the first runs: a program may put other functions in the place
    of Python's own, which are looked up by name.
    """
    run = exec
    codes = [compile(part, _NAME, "exec", dont_inherit=True) for part in parts]
    sys.path.remove(root)
    for name in [n for n in sys.modules if n.partition(".")[0] == "lori_manager"]:
        del sys.modules[name]
    sys.argv = [_NAME]
    module = ModuleType(_NAME)
    sys.modules[_NAME] = module
    for code in codes:
        run(code, module.__dict__)


def _line(fd: int) -> bytes:
    found = b""
    while not found.endswith(b"\n"):
        found += _read_exactly(fd, 1)
    return found


def _read_exactly(fd: int, size: int, read: Callable[[int, int], bytes] = os.read) -> bytes:
    """`size` bytes, by the `os.read` of before any program ran."""
    found = b""
    while len(found) < size:
        more = read(fd, size - len(found))
        if not more:
            raise EOFError("the job is cut short")
        found += more
    return found
