"""Answers of rows and outcomes of trials: kept by all that they depend on, healed when damaged."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import store_builders as build

from lori_manager.errors import NotFound
from lori_manager.records import Task
from lori_manager.store.sqlite import SQLite
from lori_manager.store.store import Store

OUTCOMES = np.array([1, 0, np.nan, 0.25, 1, 0, -3.5, 1, 1, 0], np.float32)
WEIGHTS = np.arange(1, 11, dtype=np.float32)


@pytest.fixture
def task(store: Store) -> Task:
    return build.add_task(store, rows=10)


def about(task: Task, **changes: Any) -> dict[str, Any]:
    return {"digest": "d" * 64, "task": task, "scorer_version": "1", "precision": "fp32",
            "encoding": "e"} | changes  # fmt: skip


def tried(task: Task, **changes: Any) -> dict[str, Any]:
    return {"recipe": "r" * 64, "task": task, "scorer_version": "1", "precision": "fp32"} | changes


def test_answers_come_back_by_row(store: Store, task: Task) -> None:
    told = {3: " blue\n", 7: "", 0: "\x00 ☃ \U0001f600"}
    store.add_answers(**about(task), found=told)
    assert store.answers(**about(task), rows=range(10)) == told
    assert store.answers(**about(task), rows=[7, 7, 9]) == {7: ""}
    store.add_answers(**about(task), found={7: "again"})
    assert store.answers(**about(task), rows=[3, 7]) == {3: " blue\n", 7: "again"}


@pytest.mark.parametrize(
    "other",
    [{"digest": "e" * 64}, {"scorer_version": "2"}, {"precision": "bf16"}, {"encoding": "f"}],
)
def test_answers_are_of_those_weights_that_scorer_and_precision_alone(
    store: Store, task: Task, other: dict[str, str]
) -> None:
    store.add_answers(**about(task), found={0: "a"})
    assert store.answers(**about(task, **other), rows=[0]) == {}
    store.add_answers(**about(task, **other), found={0: "b"})
    assert store.answers(**about(task), rows=[0]) == {0: "a"}


def test_answers_and_trials_are_of_one_revision(store: Store, task: Task) -> None:
    store.add_answers(**about(task), found={0: "a"})
    store.add_trial(**tried(task), digest="d", outcomes=OUTCOMES)
    later = build.add_task(store, rows=10, salt="other")
    assert later.revision == 2
    assert store.answers(**about(later), rows=[0]) == {}
    assert store.trial(**tried(later)) is None
    assert store.trial(**tried(task)) is not None


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_trial_comes_back_as_it_was_given(store: Store, task: Task, weights: Any) -> None:
    assert store.trial(**tried(task)) is None
    store.add_trial(**tried(task), digest="d", outcomes=OUTCOMES, weights=weights)
    for other in ({"recipe": "s" * 64}, {"scorer_version": "2"}, {"precision": "bf16"}):
        assert store.trial(**tried(task, **other)) is None
    found = store.trial(**tried(task))
    assert found is not None
    assert found[0] == "d"
    np.testing.assert_array_equal(found[1], OUTCOMES)
    assert found[1].dtype == np.float32
    np.testing.assert_array_equal(found[2], weights)  # type: ignore[arg-type]
    store.add_trial(**tried(task), digest="e", outcomes=WEIGHTS)
    again = store.trial(**tried(task))
    assert again is not None
    assert again[0] == "e"


@pytest.mark.parametrize("column", ["outcomes", "weights"])
@pytest.mark.parametrize("damage", ["X'00'", "X''", "substr({0}, 1, length({0}) - 1)", "'text'"])
def test_what_is_damaged_counts_as_none_and_is_replaced(
    store: Store, task: Task, column: str, damage: str
) -> None:
    store.add_trial(**tried(task), digest="d", outcomes=OUTCOMES, weights=WEIGHTS)
    store.add_answers(**about(task), found={0: "zero", 1: "one"})
    if not isinstance(store._db.backend, SQLite):
        damage = damage.replace("X'", r"'\x")
    with store._db.write() as connection:
        connection.exec_driver_sql(f"UPDATE trials SET {column} = {damage.format(column)}")
        connection.exec_driver_sql(
            f"UPDATE answers SET answer = {damage.format('answer')} WHERE row = 0"
        )
    assert store.trial(**tried(task)) is None
    assert store.answers(**about(task), rows=[0, 1]) == {1: "one"}
    store.add_trial(**tried(task), digest="d", outcomes=OUTCOMES, weights=WEIGHTS)
    store.add_answers(**about(task), found={0: "zero"})
    assert store.trial(**tried(task)) is not None
    assert store.answers(**about(task), rows=[0]) == {0: "zero"}
    assert list(store.verify()) == []


def test_answers_of_a_task_that_is_not_there_are_refused(store: Store, task: Task) -> None:
    nowhere = dataclasses.replace(task, name="nowhere")
    with pytest.raises(NotFound, match="nowhere"):
        store.add_answers(**about(nowhere), found={0: "a"})
