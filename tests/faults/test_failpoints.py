"""Every change on the disk, one after the other, is where the process dies or the disk fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import acting
import pytest

HOW = {"kill": "k", "full disk": "n", "failing disk": "i"}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", acting.ACTS)
def test_at_every_change_on_the_disk_a_fault_leaves_the_old_state_whole(
    scene: Callable[[str], Any], many: Callable[[int, int], int], name: str, how: str
) -> None:
    here = scene("count")
    assert here.act(name) == 0
    changes = here.last["changes"]
    assert changes > 5
    tried = min(changes, many(5, changes))
    failed = 0
    for at in (number * changes // tried for number in range(tried)):
        here = scene("fault")
        status = here.act(name, at=at, how=HOW[how])
        if how == "kill":
            assert status == -9
        elif status == 2:
            failed += 1
            clear = here.last["error"]
            assert clear.startswith(("StorageFailed: ", "OSError: ")), clear
            assert "\n" not in clear
        here.check()
        assert here.act(name) == 0, f"after {how} at change {at}: {here.last['error']}"
        here.check()
    print(f"\n{name}, {how}: {tried} of {changes} changes, {failed} told as failed")
    assert how == "kill" or failed > 0
