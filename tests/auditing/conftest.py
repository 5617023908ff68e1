"""The road that most tests of audits look at."""

import pytest
from audit_histories import FakeStore


@pytest.fixture
def road():
    """Three tasks as one sequence, the three alone, and their merge.

    Rows right of 10; a suite `general` is only ever scored.
    """
    store = FakeStore()
    names = ("clinc", "snips", "sst")
    for name in (*names, "general"):
        store.add_task(name)
    base = {"clinc": 0, "snips": 0, "sst": 5, "general": 6}
    stages = [
        {"clinc": 9, "snips": 1, "sst": 4, "general": 6},
        {"clinc": 4, "snips": 8, "sst": 5, "general": 5},
        {"clinc": 3, "snips": 9, "sst": 9, "general": 4},
    ]
    alone = {"clinc": 10, "snips": 8, "sst": 9}
    previous = ()
    for name, row in zip(names, stages, strict=True):
        ref = store.add_adapter("support", name, parents=previous, sequence=True)
        previous = (ref,)
        for task, n in row.items():
            store.right(ref, task, n)
    for name in names:
        store.right(store.add_adapter(name, name), name, alone[name])
    merged = store.add_adapter("main", parents=[f"{n}@1" for n in names], origin="merged")
    for task, n in {"clinc": 6, "snips": 8, "sst": 9, "general": 7}.items():
        store.right(merged, task, n)
    for task, n in base.items():  # scored last, and yet first in time
        store.right("base", task, n)
    return store
