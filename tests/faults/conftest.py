"""Acts under a shim between them and the disk, in forks of one process."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import acting
import pytest

import lori_manager

HERE = Path(__file__).parent
SOAK = float(os.environ.get("LORI_SOAK") or 0)


@pytest.fixture(scope="session")
def many() -> Callable[[int, int], int]:
    """How many: the first number in CI, the second with LORI_SOAK=1 (`make soak`), with
    LORI_SOAK=0.2 a fifth of the second.
    """
    return lambda few, soak: max(few, math.ceil(SOAK * soak)) if SOAK else few


class Server:
    """Runs one act after the other, each in a fork."""

    def __init__(self, shim: Path) -> None:
        environment = os.environ | {
            "LD_PRELOAD": str(shim),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(Path(lori_manager.__file__).parents[1])]),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "fault_server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server of faults has died"
        return json.loads(answer)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@dataclass
class Scene:
    """A place to act in, with what was told there."""

    server: Server
    place: Path
    told: Path
    log: Path | None = None
    last: dict[str, Any] = field(default_factory=dict)

    @property
    def acks(self) -> list[str]:
        return self.told.read_text().splitlines() if self.told.exists() else []

    def act(self, name: str, **how: Any) -> int:
        """Run an act; its status."""
        self.last = self.server.run(
            act=name, place=str(self.place), acks=str(self.told),
            log=None if self.log is None else str(self.log), **how,
        )  # fmt: skip
        assert self.last["status"] in (0, 2, -9), self.last["error"]
        return int(self.last["status"])

    def check(self) -> None:
        acting.check(self.place, self.acks)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("NO FAULTS INJECTED: the shim needs Linux and a C compiler (cc)")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(HERE / "shim.c")]
    subprocess.run([*command, "-ldl", "-lpthread"], check=True)
    server = Server(library)
    yield server
    server.close()


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one: no fault here needs a real disk, and fsync waits."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path_factory.mktemp("ground")
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.fixture(scope="session")
def prepared(ground: Path) -> Path:
    place = ground / "prepared"
    place.mkdir()
    acting.prepare(place)
    return place


@pytest.fixture
def scene(server: Server, prepared: Path, ground: Path) -> Callable[[str], Scene]:
    """Makes a fresh copy to act in."""

    def make(name: str) -> Scene:
        place = ground / name
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(prepared, place)
        told = ground / f"{name}.acks"
        told.unlink(missing_ok=True)
        return Scene(server, place, told)

    return make
