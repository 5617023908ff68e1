"""kill -9 at random times: nothing that was told is lost, and the next command works."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import acting
import pytest

FRESH = 25  # kills after which the place is begun anew: what grows only makes tests slow


@pytest.fixture(params=["sqlite", "postgresql"])
def kind(request: pytest.FixtureRequest) -> tuple[str, Callable[[str], Any]]:
    """The name of a database, and what makes scenes on it."""
    name = {"sqlite": "scene", "postgresql": "served_scene"}[request.param]
    return request.param, request.getfixturevalue(name)


def test_kills_at_random_times_lose_nothing(
    kind: tuple[str, Callable[[str], Any]], many: Callable[[int, int], int]
) -> None:
    name_of_database, scene = kind
    chance = random.Random(0)
    lasting: dict[str, float] = {}
    for _ in range(2):  # how long each takes when it is left alone
        here = scene("kills")
        for name in acting.ACTS:
            assert here.act(name) == 0
            lasting[name] = min(here.last["seconds"], lasting.get(name, math.inf))
        here.check()
    kills = interrupted = 0
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
    print(f"\n{name_of_database}: {kills} kills, {interrupted} in mid-act")
    assert interrupted > kills / 3
