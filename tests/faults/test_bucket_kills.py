"""kill -9 in the middle of moves to and from a store whose files lie in a bucket."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import acting

import lori_manager
from lori_manager.records import Base
from lori_manager.store.store import Store

VERSIONS = 12
MOVE = """
import sys
from lori_manager.store import moving
from lori_manager.store.store import Store
from pathlib import Path
moving.ADAPTERS = 3
print("begun", flush=True)
with Store.open(Path(sys.argv[1])) as source, Store.open(Path(sys.argv[2])) as target:
    found = moving.StoreSource(source, "source")
    moving.move(found, found.parcel(None), target, check=lambda *_: None)
print("done", flush=True)
"""


def store(root: Path, url: str | None = None) -> Store:
    made = Store.create(root / ".lori")
    if url is not None:
        made.keep_objects_at(url)
    made.set_base(
        Base(acting.FINGERPRINT, "tiny", None, str(root), "llama", datetime.now(UTC))
    )  # fmt: skip
    return made


def moving(source: Path, target: Path) -> subprocess.Popen[str]:
    path = str(Path(lori_manager.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", MOVE, str(source), str(target)],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def ended(process: subprocess.Popen[str]) -> bool:
    """Whether it came to its end; waits for that."""
    assert process.stdout is not None
    told = process.stdout.read()
    process.stdout.close()
    assert process.wait() in (0, -9)
    return told == "done\n"


def check(root: Path, versions: dict[str, str]) -> int:
    """No row without a good file, and every version with its score; how many there are."""
    with Store.open(root) as target:
        assert [f for f in target.verify() if f.kind != "orphan"] == []
        here = target.adapters()
        for adapter in here:
            assert versions[adapter.ref] == adapter.digest
            assert len(target.scores(subject=adapter.ref)) == 1
            assert len(target.adapter_bytes(adapter)) == adapter.bytes
        return len(here)


def test_kills_while_moving_leave_no_row_without_a_good_file_and_the_same_call_goes_on(
    bucket: str, tmp_path: Path, many: Callable[[int, int], int], record_property: Any
) -> None:
    place = tmp_path / "near"
    place.mkdir()
    acting.prepare(place)
    with Store.open(place / ".lori") as near:
        for _ in range(VERSIONS - 2):
            made = near.add_adapter(acting.adapter("safety"), os.urandom(3000))
            acting.score(near, made.ref, made.digest)
        versions = {a.ref: a.digest for a in near.adapters()}
    chance = random.Random(0)
    wanted, kills, interrupted, partly = many(6, 200), 0, 0, 0
    lasting: dict[bool, float] = {}  # up or down -> seconds from the beginning
    for number in itertools.count():
        if kills >= wanted:
            break
        remote, back = (tmp_path / name / str(number) for name in ("remote", "back"))
        store(remote, f"s3://{bucket}/{number}").close()
        store(back).close()
        for source, target in ((place, remote), (remote, back)):
            paths, up = (source / ".lori", target / ".lori"), source == place
            if up in lasting:
                process = moving(*paths)
                time.sleep(chance.uniform(0, lasting[up]))
                process.kill()
                kills += 1
                interrupted += not ended(process)
                partly += 0 < check(paths[1], versions) < VERSIONS
            process, start = moving(*paths), time.perf_counter()
            assert ended(process)
            lasting.setdefault(up, time.perf_counter() - start)
            assert check(paths[1], versions) == VERSIONS
        shutil.rmtree(remote)
        shutil.rmtree(back)
    print(f"\n{kills} kills, {interrupted} in mid-move, {partly} with some of the versions there")
    assert interrupted > kills / 3
