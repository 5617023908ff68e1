"""Keeps a small database of today's schema for tests of later upgrades, as SQL.

    python tests/store/keep_schema.py > tests/store/schemas/$REVISION.sql

To be run before a migration is added. It uses the store's own methods alone, those that this
revision has.
"""

from __future__ import annotations

import sqlite3
import sys
import tempfile
from pathlib import Path

import numpy as np
import store_builders as build

from lori_manager.records import Task
from lori_manager.store import database
from lori_manager.store.store import Store


def fill(store: Store) -> None:
    """A little of all that a store may hold."""
    store.set_base(build.base())
    task = build.add_task(store, "safety", rows=30)
    build.add_task(store, "safety", rows=40, salt="other rows")
    wiki = build.add_task(store, "wiki", rows=9)
    mask = store.add_mask(
        task=task, blob=b"mask", projection="a" * 64, sparsity=0.9, scope="model", kept=1,
        total=10, config={"seed": 1},
    )  # fmt: skip
    run = store.open_run({"tasks": ["safety#1"], "options": {"start": None}})
    first = store.add_adapter(
        build.new_adapter("safety", task="safety", task_revision=1, mask=mask.ref, run=run.id,
                          stage=0),
        b"first",
    )  # fmt: skip
    store.open_run({"tasks": ["wiki#1"], "options": {"start": first.ref}})
    second = store.add_adapter(
        build.new_adapter("safety", parents=build.parents(first), facts={"loss": 0.5}), b"second"
    )
    merge = store.add_adapter(
        build.new_adapter("main", origin="merged", method="concat", projection=None,
                          parents=build.parents(first, second, weights=[0.25, 0.75])),
        b"merge",
    )  # fmt: skip
    store.add_adapter(build.new_adapter("main"), b"first")  # the weights of safety@1 once more
    store.add_line("stages", sequence=["safety#1", "wiki#1"])
    random = np.random.default_rng(0)
    for adapter in (first, second, merge):
        right = (random.random(30) < 0.7).astype(np.float32)
        store.add_score(build.new_score(adapter.ref, adapter.digest, task, rows=30), right)
        losses, tokens = random.gamma(2, 1, 9), random.integers(1, 20, 9)
        store.add_score(
            build.new_score(adapter.ref, adapter.digest, wiki, scorer="perplexity", rows=9),
            losses.astype(np.float32), tokens.astype(np.float32),
        )  # fmt: skip
    build.score_base(store, task, [0.0] * 30)
    store.set_alias("main", "production", 1)
    store.set_alias("main", "production", 2, reason="better")
    store.set_alias("safety", "champion", 2)
    store.remove_alias("safety", "champion")
    where = {"task": wiki, "scorer_version": "1", "precision": "fp32"}
    if hasattr(store, "add_answers"):
        store.add_answers(digest=first.digest, encoding="e", found={0: "ja", 3: "né"}, **where)
        store.add_trial(recipe="r" * 64, digest="d" * 64, outcomes=np.arange(9) / 9, **where)
    if hasattr(store, "add_forecasts"):
        _forecast(store, first.ref)
    if hasattr(store, "open_kind_comparison"):
        _compare_kinds(store, task, first.ref)
    if hasattr(store, "remove"):
        from lori_manager.refs import AdapterRef

        left = store.add_adapter(build.new_adapter("safety"), b"to be removed")
        store.remove([AdapterRef("safety", str(left.version))], reason="a mistake")


def _forecast(store: Store, member: str) -> None:
    from lori_manager.records import Expected, Forecasted

    expected = Expected(member, "safety", 1, "exact_match", "1", 0.9, 40, 0.7, 0.63, 0.05)
    store.add_forecasts([Forecasted("m" * 64, "fp32", "e", expected)])


def _compare_kinds(store: Store, task: Task, trained: str) -> None:
    from lori_manager.records import KindStep

    digest = store.open_kind_comparison(task, {"steps": 4, "search": {"points": 1}}).digest
    store.add_kind_step(digest, KindStep("dora", "search", "0.001", None, {"loss": 0.5}))
    store.add_kind_step(digest, KindStep("dora", "train", "0", trained, {"rate": 0.001}))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / ".lori"
        with Store.create(root) as store:
            fill(store)
        connection = sqlite3.connect(root / database.REGISTRY)
        sys.stdout.write("".join(f"{line}\n" for line in connection.iterdump()))
        connection.close()


if __name__ == "__main__":
    main()
