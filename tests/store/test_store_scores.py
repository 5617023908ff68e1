from __future__ import annotations

import math
import sqlite3
from typing import Any

import numpy as np
import pytest
import store_builders as build

from lori_manager.errors import Conflict, DamagedObject, NotFound
from lori_manager.records import Adapter, Score, Task
from lori_manager.store.store import Store

RIGHT = np.array([1, 0, 1, 1, 0, 0, 0, 1, 1, 0], np.float32)
PARTLY = np.array([1, 0, np.nan, 1, 0.25, 0, 0, -3.5, 1e30, np.inf], np.float32)


@pytest.fixture
def task(store: Store) -> Task:
    return build.add_task(store, rows=10)


@pytest.fixture
def adapter(store: Store) -> Adapter:
    return store.add_adapter(build.new_adapter("main"), b"weights")


def sql(store: Store, statement: str, *values: Any) -> Any:
    connection = sqlite3.connect(store.root / "registry.db", isolation_level=None)
    row = connection.execute(statement, values).fetchone()
    connection.close()
    return row


def test_a_score_comes_back_as_it_was_given(store: Store, task: Task, adapter: Adapter) -> None:
    new = build.new_score("main@1", adapter.digest, task)
    score = store.add_score(new, RIGHT)
    assert score == Score(**vars(new), id=score.id, created_at=score.created_at)
    assert store.scores() == [score]
    outcomes, weights = store.outcomes(score)
    assert outcomes.dtype == np.float32
    np.testing.assert_array_equal(outcomes, RIGHT)
    assert weights is None


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 10])
@pytest.mark.parametrize("seed", range(3))
def test_right_and_wrong_come_back_exactly(store: Store, rows: int, seed: int) -> None:
    task = build.add_task(store, rows=rows)
    given = np.random.default_rng(seed).integers(0, 2, rows).astype(np.float32)
    outcomes, _ = store.outcomes(build.score_base(store, task, given))
    np.testing.assert_array_equal(outcomes, given)


def test_right_and_wrong_take_at_most_015_bytes_each(store: Store) -> None:
    task = build.add_task(store, rows=200)
    build.score_base(store, task, np.arange(200) % 3 == 0)
    (size,) = sql(store, "SELECT length(outcomes) FROM scores")
    assert size <= 0.15 * 200


def test_values_and_gaps_come_back_as_float32_with_weights(store: Store, task: Task) -> None:
    tokens = np.arange(10, dtype=np.int64)
    score = store.add_score(build.new_score("base", build.FINGERPRINT, task), PARTLY, tokens)
    outcomes, weights = store.outcomes(score)
    np.testing.assert_array_equal(outcomes, PARTLY)
    assert weights is not None
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights, tokens)


def test_weights_of_right_and_wrong_are_kept_too(store: Store, task: Task) -> None:
    new = build.new_score("base", build.FINGERPRINT, task)
    outcomes, weights = store.outcomes(store.add_score(new, RIGHT, RIGHT + 0.5))
    np.testing.assert_array_equal(outcomes, RIGHT)
    np.testing.assert_array_equal(weights, RIGHT + 0.5)


def test_a_value_that_is_not_a_number_stays_one(store: Store, task: Task) -> None:
    build.score_base(store, task, RIGHT, value=math.inf, error=math.nan)
    (score,) = store.scores()
    assert score.value == math.inf
    assert math.isnan(score.error)


@pytest.mark.parametrize(
    "change",
    [
        {"scorer": "choice"},
        {"scorer_version": 2},
        {"precision": "bf16"},
        {"origin": "lm-eval"},
        {"subject": "main@1"},
        {"task_revision": 2},
    ],
)
def test_each_part_of_the_key_tells_scores_apart(
    store: Store, task: Task, adapter: Adapter, change: dict[str, Any]
) -> None:
    build.add_task(store, rows=10, salt="revised")
    first = build.score_base(store, task, RIGHT)
    digest = adapter.digest if "subject" in change else build.FINGERPRINT
    other = build.new_score(**{"subject": "base", "digest": digest, "task": task} | change)
    second = store.add_score(other, 1 - RIGHT)
    assert second.id != first.id
    np.testing.assert_array_equal(store.outcomes(first)[0], RIGHT)
    np.testing.assert_array_equal(store.outcomes(second)[0], 1 - RIGHT)


def test_a_repeated_score_is_returned_as_stored(store: Store, task: Task) -> None:
    first = build.score_base(store, task, RIGHT)
    assert build.score_base(store, task, 1 - RIGHT, value=0.9) == first
    np.testing.assert_array_equal(store.outcomes(first)[0], RIGHT)


def test_outcomes_measured_elsewhere_never_change_in_silence(store: Store, task: Task) -> None:
    first = build.score_base(store, task, RIGHT, origin="lm-eval")
    assert build.score_base(store, task, RIGHT, origin="lm-eval") == first
    with pytest.raises(Conflict, match="name another origin"):
        build.score_base(store, task, 1 - RIGHT, origin="lm-eval")


def test_a_score_is_found_by_the_weights_alone(store: Store, task: Task, adapter: Adapter) -> None:
    key = build.key_of(task, adapter.digest)
    assert store.find_score(**key) is None
    score = store.add_score(build.new_score("main@1", adapter.digest, task), RIGHT)
    assert store.find_score(**key) == score
    for other in ({"precision": "bf16"}, {"scorer_version": 2}, {"digest": build.FINGERPRINT}):
        assert store.find_score(**(dict(key) | other)) is None
    assert store.find_score(**dict(key) | {"task": build.add_task(store, salt="new")}) is None


def test_what_others_measured_is_not_taken_for_our_own(store: Store, task: Task) -> None:
    build.score_base(store, task, RIGHT, origin="lm-eval")
    assert store.find_score(**build.key_of(task, build.FINGERPRINT)) is None


def test_equal_weights_share_their_scores_each_under_its_own_name(
    store: Store, task: Task, adapter: Adapter
) -> None:
    first = store.add_score(build.new_score("main@1", adapter.digest, task), RIGHT)
    twin = store.add_adapter(build.new_adapter("main"), b"weights")
    again = store.add_score(build.new_score("main@2", twin.digest, task), RIGHT)
    assert (first.subject, again.subject) == ("main@1", "main@2")
    assert again.id == first.id
    assert sql(store, "SELECT count(*) FROM scores") == (1,)
    assert store.scores(subject="main@1") == [first]
    assert store.scores(subject="main@2") == [again]
    assert store.scores(task="safety") == [first, again]
    found = store.find_score(**build.key_of(task, twin.digest))
    assert found == first
    np.testing.assert_array_equal(store.outcomes(again)[0], RIGHT)


def test_scores_are_listed_by_subject_task_and_revision(
    store: Store, task: Task, adapter: Adapter
) -> None:
    nlu = build.add_task(store, "nlu", rows=10)
    revised = build.add_task(store, rows=10, salt="revised")
    base = build.score_base(store, task, RIGHT)
    old, new, other = (
        store.add_score(build.new_score("main@1", adapter.digest, t), RIGHT)
        for t in (task, revised, nlu)
    )
    store.set_alias("main", "production", 1)
    assert store.scores() == [base, old, new, other]
    assert store.scores(subject="base") == [base]
    for name in ("main@1", "main@latest", "main@production", "main"):
        assert store.scores(subject=name) == [old, new, other]
    assert store.scores(task="safety") == [base, old, new]
    assert store.scores(task="safety", revision=2) == [new]
    assert store.scores(subject="main@1", task="safety", revision=1) == [old]


def test_unknown_subjects_and_tasks_are_told(store: Store, task: Task, adapter: Adapter) -> None:
    for unknown in ("main@2", "mian@1"):
        with pytest.raises(NotFound):
            store.scores(subject=unknown)
    with pytest.raises(NotFound):
        store.scores(task="safty")
    with pytest.raises(NotFound):
        store.scores(task="safety", revision=2)
    for subject in ("main@2", "nope@1"):
        with pytest.raises(NotFound):
            store.add_score(build.new_score(subject, adapter.digest, task), RIGHT)
    with pytest.raises(NotFound):
        build.score_base(store, task, RIGHT, task_revision=2)
    assert store.scores() == []


def test_a_score_must_fit_its_weights_and_rows(store: Store, task: Task, adapter: Adapter) -> None:
    with pytest.raises(ValueError, match="main@1 has digest"):
        store.add_score(build.new_score("main@1", build.FINGERPRINT, task), RIGHT)
    new = build.new_score("base", build.FINGERPRINT, task)
    with pytest.raises(ValueError, match="10 eval rows, got 9"):
        store.add_score(new, RIGHT[:9])
    with pytest.raises(ValueError, match=r"shape \(rows,\)"):
        store.add_score(new, RIGHT[None])
    with pytest.raises(ValueError, match="weights of shape"):
        store.add_score(new, RIGHT, RIGHT[:9])
    assert store.scores() == []


@pytest.mark.parametrize("column", ["outcomes", "weights", "encoding"])
def test_damaged_outcomes_are_found_and_healed_by_scoring_again(
    store: Store, task: Task, column: str
) -> None:
    new = build.new_score("base", build.FINGERPRINT, task)
    score = store.add_score(new, RIGHT, RIGHT)
    (blob,) = sql(store, f"SELECT {column} FROM scores")
    if column == "encoding":
        sql(store, "UPDATE scores SET encoding = 'float32'")
    else:
        sql(store, f"UPDATE scores SET {column} = ?", bytes([blob[0] ^ 16]) + blob[1:])
    with pytest.raises(DamagedObject):
        store.outcomes(score)
    (finding,) = store.verify()
    assert (finding.kind, finding.subject) == ("damaged", "base")
    assert store.find_score(**build.key_of(task, build.FINGERPRINT)) is None
    assert store.add_score(new, RIGHT, RIGHT) == score
    np.testing.assert_array_equal(store.outcomes(score)[0], RIGHT)
    assert list(store.verify()) == []
