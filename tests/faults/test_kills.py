"""kill -9 at random times: nothing that was told is lost, and the next command works."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import acting

FRESH = 25  # kills after which the place is begun anew: what grows only makes tests slow


def test_kills_at_random_times_lose_nothing(
    scene: Callable[[str], Any], many: Callable[[int, int], int], record_property: Any
) -> None:
    chance = random.Random(0)
    here = scene("kills")
    lasting = {}
    for name in acting.ACTS:  # how long each takes when it is left alone
        assert here.act(name) == 0
        lasting[name] = here.last["seconds"]
    here.check()
    kills = interrupted = versions = 0
    wanted = many(25, 1000)
    names = list(acting.ACTS)
    while kills < wanted:
        if kills % FRESH == 0:
            here = scene("kills")
        name = names[kills % len(names)]
        kills += 1
        if here.act(name, kill_after=chance.uniform(0, lasting[name])) == -9:
            interrupted += 1
        here.check()
        assert here.act(name) == 0, here.last["error"]
        here.check()
        versions += sum(told.startswith("version") for told in here.acks)
    told = {"kills": kills, "in mid-act": interrupted}
    print(f"\n{told}")
    assert interrupted > kills / 3
