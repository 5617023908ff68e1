"""Programs that mean harm: each ends without having passed, and nothing outside is touched."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lori_manager.errors import InvalidInput
from lori_manager.sandbox import run as sandbox
from lori_manager.sandbox.run import Limits, check, run

FINE = "assert 1 + 1 == 2"
SHORT = Limits(cpu_seconds=1, wall_seconds=6)
# What raises in the sandbox ends "failed"; what is let through reaches FINE and passes.
REFUSED = {
    "forks": "import os\nos.fork()",
    "a fork bomb that does not give up": (
        "import os\nn = 0\nwhile n < 1000:\n    n += 1\n    try:\n        os.fork()\n"
        "    except OSError: pass\nelse: raise SystemExit('no child')"
    ),
    "starts another program": "import subprocess\nsubprocess.run(['/bin/true'])",
    "becomes another program": "import os\nos.execv('/bin/true', ['true'])",
    "starts a thread": "import threading\nthreading.Thread(target=print).start()",
    "leaves its process group": "import os\nos.setsid()",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)",
    "kills every process": "import os\nos.kill(-1, 9)",
    "opens a socket": "import socket\nsocket.socket()",
    "sends to a socket's address": (
        "import socket\na, b = socket.socketpair(type=socket.SOCK_DGRAM)\n"
        "a.sendto(b'x', '/run/systemd/journal/socket')"
    ),
    "asks for a name": "import socket\nsocket.create_connection(('127.0.0.1', 80), 1)",
    "fills the memory": "x = []\nwhile True: x.append(bytes(1 << 26))",
    "asks for all memory at once": "x = bytearray(1 << 40)",
    "writes a huge file": (
        "with open('f', 'wb') as f:\n    for _ in range(64): f.write(bytes(1 << 20))"
    ),
    "raises its own limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))"
    ),
    "opens a thousand files": "held = [open(f'f{i}', 'w') for i in range(1000)]",
    "reads the password file": "open('/etc/passwd').read()",
    "reads another process": "import os\nopen(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "reads its own memory": "open('/proc/self/mem', 'rb').read(1)",
    "lists a folder outside": "import os\nos.listdir('/home')",
    "asks for system calls by ctypes": (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.syscall(41, 2, 1, 0) < 0 and libc.ptrace(16, os.getppid(), 0, 0) < 0:\n"
        "    raise SystemExit('refused')"
    ),
    "makes itself a namespace": (
        "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000): raise SystemExit('refused')"
    ),
    "outlives its parent": (
        "import ctypes\nif ctypes.CDLL(None).prctl(1, 0, 0, 0, 0): raise SystemExit('refused')"
    ),
    "ends early": "import sys\nsys.exit(0)",
    "ends early as a base exception": "raise KeyboardInterrupt",
    "recurses without end": "def f(): return f()\nf()",
    "imports what is installed beside lori": "import numpy",
    "imports lori": "import lori_manager",
    "waits for input": "input()",
    "is no Python": "def f(:",
    "holds half a character": "x = '\ud800'",
}  # fmt: skip
ENDED = {
    "ends at once": "import os\nos._exit(0)",
    "ends as a failure": "import os\nos._exit(3)",
    "kills itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\nos.abort()",
    "crashes": "import ctypes\nctypes.string_at(0)",
    "says yes on every descriptor": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, bytes(4096))\n"
        "    except OSError: pass\nos._exit(0)"
    ),
    "closes every descriptor": "import os\nos.closerange(0, 64)",
    "eats what it is told": (
        "import os\nfor fd in range(64):\n    try: os.read(fd, 1 << 16)\n    except OSError: pass"
    ),
    "hands on what it is told": (
        "import os\nfor fd in range(3, 64):\n    try: told = os.read(fd, 1 << 16)\n"
        "    except OSError: continue\n    for to in range(3, 64):\n"
        "        try: os.write(to, told)\n        except OSError: pass\nos._exit(0)"
    ),
    "leaves when the harness comes back": (
        "import sys, os\nsys.setprofile(lambda *a: os._exit(0))"
    ),
}  # fmt: skip
SLOW = {
    "never ends": "while True: pass",
    "sleeps": "import time\ntime.sleep(1000)",
    "ignores signals": (
        "import signal\nfor s in (15, 2, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass"
    ),
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nwhile True: pass",
    "prints without end": "while True: print('x' * (1 << 20))",
    "compiles without end": "x = (" + "+".join(["9**9"] * 20) + ")**9**9**9",
}  # fmt: skip


@pytest.fixture(params=[True, False], ids=["namespaces", "no namespaces"])
def namespaces(request):
    if request.param and not check()[0]:
        pytest.skip("this kernel gives no namespaces")
    return request.param


def test_the_guards_are_told():
    given, guards = check()
    assert guards[-2:] == ("landlock", "seccomp")
    assert given == ("namespaces" in guards)
    assert run([FINE], namespaces=False).guards == ("landlock", "seccomp")


def test_a_program_that_means_well_passes(namespaces):
    program = (
        "import asyncio, collections, dataclasses, datetime, decimal, hashlib, heapq, json, math\n"
        "import random, re, sqlite3, tempfile, typing\n"
        "@dataclasses.dataclass\nclass Point:\n    x: int\n"
        "asyncio.run(asyncio.sleep(0))\n"
        "with open('notes', 'w') as f: f.write('kept')\n"
        "with tempfile.TemporaryFile() as f: f.write(b'x')\n"
        "print('heard by nobody')\n"
        "def add(a, b): return a + b\n"
    )
    tests = "assert add(1, 2) == 3 and open('notes').read() == 'kept' and Point(1) == Point(1)"
    ended = run([program, tests], namespaces=namespaces)
    assert ended.passed, ended


def test_a_part_is_not_reached_when_one_before_it_fails(namespaces):
    assert run(["x = 1", "assert x == 1"], namespaces=namespaces).passed
    assert run(["x = 2", "assert x == 1"], namespaces=namespaces).reason == "failed"
    # In one text the tests would be part of this program's string, and nothing would fail.
    assert run(['x = """', 'y = """done"""'], namespaces=namespaces).reason == "failed"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_allowed_is_an_error_of_the_program(name, namespaces):
    ended = run([REFUSED[name], FINE], SHORT, namespaces=namespaces)
    assert ended.reason == "failed", ended


@pytest.mark.parametrize("name", ENDED)
def test_who_ends_before_the_tests_has_not_passed(name, namespaces):
    ended = run([ENDED[name], FINE], SHORT, namespaces=namespaces)
    assert ended.reason in ("died", "failed"), ended


@pytest.mark.parametrize("name", SLOW)
def test_who_takes_too_long_is_ended(name, namespaces):
    limits = Limits(cpu_seconds=1, wall_seconds=2)
    started = time.monotonic()
    ended = run([SLOW[name], FINE], limits, namespaces=namespaces)
    assert ended.reason == "time", ended
    assert time.monotonic() - started < 30


def test_builtins_that_are_patched_make_no_failure_a_pass(namespaces):
    program = (
        "import builtins, os, sys\n"
        "def quiet(*_, **__): return None\n"
        "builtins.AssertionError = builtins.BaseException = KeyError\n"
        "builtins.exec = builtins.compile = builtins.open = os._exit = sys.exit = quiet\n"
        "os.write = lambda fd, data: len(data)\n"
        "sys.excepthook = sys.settrace = quiet\n"
        "import atexit; atexit.register(lambda: os._exit(0))\n"
    )
    assert not run([program, "assert False"], namespaces=namespaces).passed
    assert not run([program, "raise SystemExit"], namespaces=namespaces).passed


def test_the_environment_and_the_descriptors_of_the_parent_are_not_there(namespaces, monkeypatch):
    monkeypatch.setenv("LORI_SECRET", "hush")
    read, write = os.pipe()
    os.set_inheritable(read, True)
    os.set_inheritable(write, True)
    tests = (
        "import os\n"
        "assert not {'LORI_SECRET', 'HOME', 'PATH', 'USER'} & set(os.environ)\n"
        "held = []\n"
        "for fd in range(64):\n"
        "    try: held.append((fd, os.fstat(fd).st_ino))\n"
        "    except OSError: pass\n"
        f"assert len(held) == 5 and {os.fstat(read).st_ino} not in dict(held).values(), held\n"
        "assert os.listdir() == []"
    )
    try:
        assert run([tests], namespaces=namespaces).passed
    finally:
        os.close(read)
        os.close(write)


def test_files_outside_can_neither_be_written_nor_touched(namespaces, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    before = kept.stat()
    for attack in (
        f"open({str(kept)!r}, 'w')",
        f"open({str(kept)!r}, 'a')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.rename({str(kept)!r}, {str(tmp_path / 'gone')!r})",
        f"import os; os.truncate({str(kept)!r}, 0)",
        f"import os; os.chmod({str(kept)!r}, 0)",
        f"import os; os.utime({str(kept)!r}, (0, 0))",
        f"import os; os.mkdir({str(tmp_path / 'folder')!r})",
        f"import os; os.symlink({str(kept)!r}, {str(tmp_path / 'link')!r})",
        f"import os; os.link({str(kept)!r}, 'link'); open('link', 'w')",
        f"import os; os.symlink({str(kept)!r}, 'link'); open('link', 'w')",
    ):
        assert run([attack], namespaces=namespaces).reason == "failed", attack
    after = kept.stat()
    assert kept.read_text() == "kept"
    assert (after.st_mode, after.st_mtime, after.st_nlink) == (
        before.st_mode, before.st_mtime, before.st_nlink,
    )  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_nothing_listening_on_this_machine_is_reached(namespaces):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.settimeout(0.2)
        program = (
            "import ctypes, struct\nlibc = ctypes.CDLL(None)\n"
            "fd = libc.socket(2, 1, 0)\n"
            f"to = struct.pack('=HH4s8x', 2, {socket.htons(port)}, bytes([127, 0, 0, 1]))\n"
            "libc.connect(fd, to, 16)"
        )
        run([program], SHORT, namespaces=namespaces)
        with pytest.raises(TimeoutError):
            server.accept()


def test_many_small_files_are_too_many_too(namespaces):
    program = (
        "for i in range(100):\n    with open(f'f{i}', 'wb') as f: f.write(bytes(4 << 20))\n"
        "import time; time.sleep(30)"
    )
    ended = run([program], Limits(cpu_seconds=20, wall_seconds=25), namespaces=namespaces)
    assert ended.reason == ("failed" if namespaces else "files"), ended


def test_nothing_is_left_running_or_lying_about(namespaces, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    spawned = []
    original = subprocess.Popen

    def watched(*args, **kwargs):
        spawned.append(original(*args, **kwargs))
        return spawned[-1]

    monkeypatch.setattr(sandbox.subprocess, "Popen", watched)
    program = "import os\nos.makedirs('a/b/c', 0); open('f', 'w').write('x')\nwhile True: pass"
    assert run([program], SHORT, namespaces=namespaces).reason in ("time", "failed")
    (child,) = spawned
    assert child.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_parent_takes_the_program_along(namespaces, tmp_path):
    code = (
        "from lori_manager.sandbox.run import run, Limits\n"
        "run(['import ctypes, time\\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\\ntime.sleep(60)'],"
        f" Limits(wall_seconds=60), namespaces={namespaces})"
    )
    root = str(Path(sandbox.__file__).parents[2])
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root})

    def children_of(pid):
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                stat = path.read_text()
            except OSError:  # ended meanwhile
                continue
            if int(stat.rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
        return found

    deadline = time.monotonic() + 20
    while not (first := children_of(parent.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    family = first + [p for c in first for p in children_of(c)]
    assert len(family) == (2 if namespaces else 1)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{p}") for p in family) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{p}") for p in family)


def test_a_machine_that_cannot_confine_runs_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(InvalidInput, match="confined by Linux alone, this is darwin"):
        run([FINE])
    monkeypatch.undo()
    # A child that cannot set itself up says why on standard error and runs no part.
    monkeypatch.setattr(sandbox, "_BOOT", "import sys; sys.exit('no Landlock here')")
    with pytest.raises(InvalidInput, match=r"cannot confine .* none is run: no Landlock here"):
        run([FINE])
