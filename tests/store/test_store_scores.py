from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import store_builders as build

from lori_manager.errors import Conflict, DamagedObject, NotFound
from lori_manager.metrics.summary import summarize
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
    rows = build.sql(store, statement, *values)
    return rows[0] if rows else None


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


def test_a_long_history_takes_at_most_015_bytes_an_outcome_all_told(store: Store) -> None:
    task = build.add_task(store, rows=1000)
    random = np.random.default_rng(0)
    new = []
    for i in range(145):
        adapter = store.add_adapter(build.new_adapter("main"), b"%d" % i)
        values = random.integers(0, 2, 1000).astype(np.float32)  # nothing to be saved here
        value, error, rows = summarize(values)
        made = build.new_score(
            adapter.ref, adapter.digest, task, value=value, error=error, rows=rows
        )
        new.append((made, values, None))
    store.add_scores(new)
    (used,) = sql(store, "SELECT count(*) * 4096.0 FROM score_pages")  # each fills one of SQLite's
    (largest,) = sql(
        store,
        "SELECT max(length(directory) + coalesce(length(reference), 0) + length(bodies)) "
        "FROM score_pages",
    )
    assert largest <= 4046
    assert used / 145_000 <= 0.15


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
        {"scorer_version": "2"},
        {"precision": "bf16"},
        {"origin": "lm-eval"},
        {"encoding": "tokenizer b"},
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
    for other in ({"precision": "bf16"}, {"scorer_version": "2"}, {"digest": build.FINGERPRINT}):
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


def test_scores_of_several_subjects_come_in_one_reading_each_under_its_own_name(
    store: Store, task: Task, adapter: Adapter
) -> None:
    other = build.add_task(store, "other", rows=10)
    store.add_adapter(build.new_adapter("copy"), b"weights")  # the same weights
    build.score_base(store, task, RIGHT)
    for of in (task, other):
        store.add_score(build.new_score("main@1", adapter.digest, of), RIGHT)
    told = [(s.subject, s.task) for s in store.scores_of(["copy@1", "base", "nobody@7"])]
    assert told == [("base", task.name), ("copy@1", task.name), ("copy@1", "other")]
    assert store.scores_of([]) == []
    both = store.scores_of(["main@1", "copy@1"])
    assert [s.subject for s in both] == ["main@1", "copy@1"] * 2
    assert [s for s in both if s.subject == "main@1"] == store.scores(subject="main@1")


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


def test_a_score_of_another_encoding_is_not_found_but_one_that_was_not_noted_is(
    store: Store, task: Task, adapter: Adapter
) -> None:
    key = build.key_of(task, adapter.digest)
    new = build.new_score("main@1", adapter.digest, task)
    noted = store.add_score(dataclasses.replace(new, encoding="a"), RIGHT)
    assert store.find_score(**key, encoding="a") == noted
    assert store.find_score(**key, encoding="b") is None
    assert store.find_score(**key) is None
    unnoted = store.add_score(new, RIGHT)
    assert store.find_score(**key, encoding="a") == noted
    assert store.find_score(**key, encoding="b") == store.find_score(**key) == unnoted


def test_many_scores_are_found_in_one_look(store: Store, task: Task, adapter: Adapter) -> None:
    nlu = build.add_task(store, "nlu", rows=10)
    of_nlu = store.add_score(build.new_score("main@1", adapter.digest, nlu), RIGHT)
    first = store.add_score(build.new_score("main@1", adapter.digest, task), RIGHT)
    keys = [(task, "exact_match", "1"), (nlu, "exact_match", "2"), (nlu, "exact_match", "1")]
    found = store.find_scores(adapter.digest, keys, precision="fp32")
    assert found == [first, None, of_nlu]
    assert store.find_scores(build.FINGERPRINT, keys, precision="fp32") == [None] * 3
    assert store.find_scores(adapter.digest, [], precision="fp32") == []


def test_scores_are_listed_by_time_and_task_by_task(
    store: Store, task: Task, adapter: Adapter
) -> None:
    nlu = build.add_task(store, "nlu", rows=10)
    first = build.score_base(store, nlu, RIGHT)
    second = build.score_base(store, task, RIGHT)
    third = store.add_score(build.new_score("main@1", adapter.digest, nlu), RIGHT)
    assert store.scores(since=second.created_at) == [second, third]
    assert store.scores(until=second.created_at) == [first]
    assert store.scores(task="nlu", since=second.created_at) == [third]
    assert [(t.name, s) for t, s in store.scores_by_task()] == [
        ("safety", [second]), ("nlu", [first, third]),
    ]  # fmt: skip
    assert [s for _, s in store.scores_by_task(subject="main@1")] == [[], [third]]


def test_outcomes_of_many_scores_come_in_the_order_asked(store: Store, adapter: Adapter) -> None:
    random = np.random.default_rng(1)
    expected = []
    for name, rows in (("safety", 10), ("nlu", 300)):
        task = build.add_task(store, name, rows=rows)
        for i in range(40):
            values = (random.random(rows) < 0.7).astype(np.float32)
            weights = None if i % 3 else np.full(rows, i, np.float32)
            new = build.new_score("main@1", adapter.digest, task, precision=f"p{i}")
            expected.append((store.add_score(new, values, weights), values, weights))
    random.shuffle(expected)  # type: ignore[arg-type]
    told = store.outcomes_of([score for score, _, _ in expected])
    for (values, weights), (_, given, given_weights) in zip(told, expected, strict=True):
        np.testing.assert_array_equal(values, given)
        assert (weights is None) == (given_weights is None)
        if weights is not None:
            np.testing.assert_array_equal(weights, given_weights)
    assert store.outcomes_of([]) == []


def test_scores_added_together_are_those_added_one_by_one(
    store: Store, stores: Any, tmp_path: Path
) -> None:
    given = history(store, versions=120, rows=300)
    stores.copy(store, tmp_path / "other")
    together = store.add_scores(given)
    with Store.open(tmp_path / "other") as other:
        apart = [other.add_score(*one) for one in given]
        for a, b in zip(together, apart, strict=True):
            assert dataclasses.replace(a, id=b.id, created_at=b.created_at) == b
            np.testing.assert_array_equal(store.outcomes(a)[0], other.outcomes(b)[0])
    assert store.add_scores(given) == together
    assert sql(store, "SELECT count(*) > 1 FROM score_pages") == (1,)  # or it shows little


def test_all_of_several_scores_are_stored_or_none(store: Store, task: Task) -> None:
    good = build.new_score("base", build.FINGERPRINT, task)
    with pytest.raises(ValueError, match="10 eval rows, got 9"):
        store.add_scores([(good, RIGHT, None), (good, RIGHT[:9], None)])
    assert store.scores() == []


def test_reuse_counts_the_weights_that_were_ever_scored(
    store: Store, task: Task, adapter: Adapter
) -> None:
    assert store.reuse("safety", 1) == 0
    build.score_base(store, task, RIGHT)
    build.score_base(store, task, RIGHT, precision="bf16")
    store.add_score(build.new_score("main@1", adapter.digest, task, origin="x"), RIGHT)
    twin = store.add_adapter(build.new_adapter("main"), b"weights")
    store.add_score(build.new_score("main@2", twin.digest, task), RIGHT)
    revised = build.add_task(store, rows=10, salt="revised")
    assert store.reuse("safety", 1) == 2
    assert store.reuse("safety", revised.revision) == 0
    with pytest.raises(NotFound):
        store.reuse("safety", 3)


def test_a_score_that_is_gone_is_told(store: Store, task: Task, adapter: Adapter) -> None:
    score = build.score_base(store, task, RIGHT)
    for other in (
        {"id": score.id + 1}, {"id": score.id + (1 << 16)}, {"digest": adapter.digest},
        {"task": "nlu"},
    ):  # fmt: skip
        with pytest.raises(NotFound, match="score base again"):
            store.outcomes(dataclasses.replace(score, **other))


# damage


def history(store: Store, *, versions: int, rows: int) -> list[Any]:
    """Scores to add, of a task and as many versions, which have much in common."""
    task = build.add_task(store, rows=rows)
    random = np.random.default_rng(0)
    common = random.random(rows) < 0.7
    made = []
    for i in range(versions):
        adapter = store.add_adapter(build.new_adapter("main"), b"%d" % i)
        values = (common ^ (random.random(rows) < 0.1)).astype(np.float32)
        value, error, measured = summarize(values)
        new = build.new_score(
            adapter.ref, adapter.digest, task, value=value, error=error, rows=measured
        )
        made.append((new, values, None))
    return made


def flip(store: Store, column: str, place: int, *, page: int = 1, bit: int = 16) -> None:
    (blob,) = sql(store, f"SELECT {column} FROM score_pages WHERE id = ?", page)
    altered = blob[:place] + bytes([blob[place] ^ bit]) + blob[place + 1 :]
    sql(store, f"UPDATE score_pages SET {column} = ? WHERE id = ?", altered, page)


@pytest.mark.parametrize("column", ["bodies", "directory", "weights"])
def test_damaged_outcomes_are_found_and_healed_by_scoring_again(
    store: Store, task: Task, column: str
) -> None:
    new = build.new_score("base", build.FINGERPRINT, task)
    score = store.add_score(new, RIGHT, RIGHT)
    if column == "weights":
        (blob,) = sql(store, "SELECT content FROM row_weights")
        sql(store, "UPDATE row_weights SET content = ?", bytes([blob[0] ^ 16]) + blob[1:])
    else:
        flip(store, column, 0)
    with pytest.raises(DamagedObject, match="safety#1"):
        store.outcomes(score)
    (finding,) = store.verify()
    assert finding.kind == "damaged"
    assert finding.subject == ("safety#1" if column == "directory" else "base")
    assert store.find_score(**build.key_of(task, build.FINGERPRINT)) is None
    again = store.add_score(new, RIGHT, RIGHT)
    if column == "directory":
        assert dataclasses.replace(again, id=score.id, created_at=score.created_at) == score
    else:
        assert again == score
    np.testing.assert_array_equal(store.outcomes(again)[0], RIGHT)
    assert list(store.verify()) == []


def test_every_flipped_bit_of_a_page_is_noticed(store: Store) -> None:
    given = history(store, versions=4, rows=50)
    stored = store.add_scores(given)
    for column in ("directory", "reference", "bodies"):
        (length,) = sql(store, f"SELECT length({column}) FROM score_pages")
        for place in range(length):
            flip(store, column, place, bit=1 << place % 8)
            with pytest.raises(DamagedObject, match=r"main@|safety#1"):
                store.outcomes_of(stored)
            assert {f.kind for f in store.verify()} == {"damaged"}
            flip(store, column, place, bit=1 << place % 8)
    assert len(store.outcomes_of(stored)) == 4


def test_a_damaged_body_is_that_score_s_alone(store: Store) -> None:
    given = history(store, versions=10, rows=100)
    stored = store.add_scores(given)
    (length,) = sql(store, "SELECT length(bodies) FROM score_pages")
    flip(store, "bodies", length - 1)
    assert [(f.kind, f.subject) for f in store.verify()] == [("damaged", "main@10")]
    with pytest.raises(DamagedObject, match="outcomes of main@10 on safety#1 are damaged"):
        store.outcomes_of(stored)
    np.testing.assert_array_equal(store.outcomes(stored[8])[0], given[8][1])


def test_scores_that_hang_on_a_damaged_reference_are_told_and_mended_one_by_one(
    store: Store,
) -> None:
    given = history(store, versions=10, rows=100)
    stored = store.add_scores(given)
    flip(store, "reference", 3)
    findings = list(store.verify())
    assert [f.subject for f in findings] == [f"main@{i}" for i in range(1, 11)]
    assert all("reference" in f.message for f in findings)
    task = store.task("safety")
    for (new, values, _), score in zip(given, stored, strict=True):
        assert store.find_score(**build.key_of(task, new.digest)) is None
        assert store.add_score(new, values) == score
        np.testing.assert_array_equal(store.outcomes(score)[0], values)
    assert list(store.verify()) == []
    assert store.scores() == stored
    later = store.add_adapter(build.new_adapter("main"), b"later")  # and life goes on
    new = build.new_score(later.ref, later.digest, task)
    np.testing.assert_array_equal(store.outcomes(store.add_score(new, given[0][1]))[0], given[0][1])


def test_what_is_measured_anew_in_place_of_damage_may_differ(store: Store, task: Task) -> None:
    new = build.new_score("base", build.FINGERPRINT, task)
    score = store.add_score(new, RIGHT)
    flip(store, "bodies", 0)
    again = store.add_score(dataclasses.replace(new, value=0.75, error=0.5), 1 - RIGHT)
    assert again == dataclasses.replace(score, value=0.75, error=0.5)
    assert store.scores() == [again]
    np.testing.assert_array_equal(store.outcomes(again)[0], 1 - RIGHT)


def test_a_damaged_directory_takes_no_other_page_with_it(store: Store) -> None:
    given = history(store, versions=120, rows=300)
    stored = store.add_scores(given)
    (first_page,) = sql(store, "SELECT id FROM score_pages WHERE number = 0")
    flip(store, "directory", 8, page=first_page)
    with pytest.raises(DamagedObject, match="list of scores 1 on safety#1"):
        store.scores()
    task = store.task("safety")
    again = []
    for new, values, _ in given:
        found = store.find_score(**build.key_of(task, new.digest))
        again.append(found or store.add_score(new, values))
    kept = [a for a, b in zip(again, stored, strict=True) if a == b]
    assert 0 < len(kept) < len(stored)
    assert list(store.verify()) == []
    for score, (_, values, _) in zip(again, given, strict=True):
        np.testing.assert_array_equal(store.outcomes(score)[0], values)
