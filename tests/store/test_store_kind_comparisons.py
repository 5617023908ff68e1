"""Comparisons of kinds as the store keeps them."""

from __future__ import annotations

import pytest
import store_builders as build

from lori_manager.errors import NotFound
from lori_manager.records import KindStep
from lori_manager.refs import AdapterRef
from lori_manager.store.store import Store


def test_an_equal_plan_is_the_same_comparison_and_another_is_not(store: Store) -> None:
    store.set_base(build.base())
    task = build.add_task(store)
    first = store.open_kind_comparison(task, {"steps": 4, "search": {"points": 3}})
    again = store.open_kind_comparison(task, {"search": {"points": 3}, "steps": 4})
    other = store.open_kind_comparison(task, {"steps": 5, "search": {"points": 3}})
    assert first == again != other
    assert store.kind_comparisons() == [first, other]
    assert (first.task, first.task_revision, first.plan["steps"]) == ("safety", 1, 4)


def test_steps_come_back_in_their_order_and_the_first_word_stays(store: Store) -> None:
    store.set_base(build.base())
    task = build.add_task(store)
    digest = store.open_kind_comparison(task, {}).digest
    adapter = store.add_adapter(build.new_adapter(line="safety.lora"), b"content")
    steps = [
        KindStep("lora", "search", "0.0005", None, {"loss": 0.25}),
        KindStep("lora", "search", "0.0015", None, {"loss": None}),
        KindStep("lora", "train", "0", adapter.ref, {"rate": 0.0005}),
    ]
    for step in steps:
        store.add_kind_step(digest, step)
    store.add_kind_step(digest, KindStep("lora", "search", "0.0005", None, {"loss": 9.0}))
    assert store.kind_steps(digest) == steps


def test_a_step_of_nothing_and_of_an_unknown_adapter_is_refused(store: Store) -> None:
    store.set_base(build.base())
    digest = store.open_kind_comparison(build.add_task(store), {}).digest
    with pytest.raises(NotFound, match="no comparison"):
        store.kind_steps("0" * 64)
    with pytest.raises(Exception, match=r"(?i)foreign key"):
        store.add_kind_step(digest, KindStep("lora", "train", "0", "nobody@1", {}))
    assert store.kind_steps(digest) == []


def test_a_training_whose_version_was_removed_is_one_to_be_done(store: Store) -> None:
    store.set_base(build.base())
    digest = store.open_kind_comparison(build.add_task(store), {}).digest
    old, new = (
        store.add_adapter(build.new_adapter(line="safety.lora"), content)
        for content in (b"old", b"new")
    )
    searched = KindStep("lora", "search", "0.0005", None, {"loss": 0.25})
    store.add_kind_step(digest, KindStep("lora", "train", "0", old.ref, {"rate": 0.0005}))
    store.add_kind_step(digest, searched)
    store.remove([AdapterRef("safety.lora", "1")])
    assert store.kind_steps(digest) == [searched]
    again = KindStep("lora", "train", "0", new.ref, {"rate": 0.0005})
    store.add_kind_step(digest, again)
    assert store.kind_steps(digest) == [searched, again]
    store.restore([AdapterRef("safety.lora", "1")])
    assert store.kind_steps(digest) == [searched, again]
