"""The power goes: whatever was written since the last fsync is gone, or some of it is."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import acting
import pytest
from disk import Disk, read_changes


@pytest.mark.parametrize("variant", ["strict", "by chance"])
def test_after_a_power_cut_all_that_was_told_is_there_and_everything_goes_on(
    scene: Callable[[str], Any],
    many: Callable[[int, int], int],
    prepared: Path,
    ground: Path,
    variant: str,
) -> None:
    here = replace(scene("recorded"), log=ground / "changes")
    here.log.unlink(missing_ok=True)
    for name in [*acting.ACTS] * 2:
        assert here.act(name) == 0, here.last["error"]
    changes = list(read_changes(here.log))
    wanted = many(12, 200)
    chance = random.Random(0)
    cuts = sorted(chance.sample(range(1, len(changes)), wanted))
    shutil.rmtree(here.place)
    shutil.copytree(prepared, here.place)
    disk, done = Disk(here.place), 0
    for cut in cuts:
        for change in changes[done:cut]:
            disk.do(change)
        done = cut
        left = scene("left")
        shutil.rmtree(left.place)
        disk.after_power_cut(left.place, None if variant == "strict" else chance)
        told = [change.path for change in changes[:cut] if change.kind == "A"]
        left.told.write_text("".join(f"{word}\n" for word in told))
        left.check()
        for name in acting.ACTS:
            assert left.act(name) == 0, f"{name} after cut {cut}: {left.last['error']}"
        left.check()
    print(f"\n{variant}: {len(cuts)} cuts in {len(changes)} changes and notes")


def test_the_model_loses_what_was_not_synced(tmp_path: Path) -> None:
    """A file that is renamed without being synced is there without its content."""
    from disk import Change

    place = tmp_path / "place"
    place.mkdir()
    disk = Disk(place)
    for kind, name, target, data in [
        ("C", "a", "", b""), ("W", "a", "", b"content"), ("R", "a", "b", b""), ("S", "", "", b""),
        ("C", "c", "", b""), ("W", "c", "", b"content"), ("S", "c", "", b""),
    ]:  # fmt: skip
        disk.do(Change(kind, f"{place}/{name}", f"{place}/{target}", 0, data))
    disk.after_power_cut(tmp_path / "left")
    assert {p.name: p.read_bytes() for p in (tmp_path / "left").iterdir()} == {"b": b""}
