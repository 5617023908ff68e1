from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import store_builders as build

from lori_manager.errors import (
    Conflict,
    DamagedObject,
    InvalidInput,
    NotFound,
    WrongBase,
)
from lori_manager.records import Split
from lori_manager.refs import AdapterRef
from lori_manager.store.sqlite import SQLite
from lori_manager.store.store import Store
from lori_manager.tasks.rows import Row, rows_to_jsonl

ODD = 'it\'s "odd"; DROP TABLE lines; -- % # @ ../../etc/passwd \t \u2603 \U0001f600'


# base


def test_the_base_comes_back_as_it_was_given(store: Store) -> None:
    assert store.base() == build.base()
    with Store.open(store.root) as again:
        assert again.base() == build.base()


def test_a_store_without_a_base_says_what_to_do(stores: Any, tmp_path: Path) -> None:
    with stores.make(tmp_path / ".lori") as store:
        for call in (store.base, lambda: store.move_base(path="/x", source="x")):
            with pytest.raises(NotFound, match="lori init"):
                call()
        with pytest.raises(NotFound, match="lori init"):
            store.add_adapter(build.new_adapter(), b"x")


def test_another_base_is_refused_and_the_same_weights_change_nothing(store: Store) -> None:
    assert store.set_base(build.base(path="/elsewhere")) == build.base()
    with pytest.raises(Conflict, match="another workspace"):
        store.set_base(build.base("e" * 64))
    assert store.base() == build.base()


def test_the_same_weights_may_move(store: Store) -> None:
    moved = store.move_base(path="/new", source="hub/new")
    assert moved == dataclasses.replace(build.base(), path="/new", source="hub/new")
    assert store.base() == moved


def test_times_are_utc_whatever_zone_was_given(stores: Any, tmp_path: Path) -> None:
    local = datetime(2026, 5, 1, 1, 30, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    with stores.make(tmp_path / ".lori") as store:
        kept = store.set_base(build.base(created_at=local)).created_at
    assert kept == local
    assert kept.tzinfo == UTC


def test_a_time_without_a_zone_is_a_callers_bug(stores: Any, tmp_path: Path) -> None:
    with stores.make(tmp_path / ".lori") as store:
        naive = datetime(2026, 1, 1)
        with pytest.raises(ValueError, match="time zone"):
            store.set_base(build.base(created_at=naive))
        with pytest.raises(NotFound):
            store.base()


# tasks


def test_a_task_comes_back_as_it_was_given(store: Store) -> None:
    before = datetime.now(UTC)
    task = build.add_task(store, rows=10)
    assert (task.name, task.revision, task.ref) == ("safety", 1, "safety#1")
    assert (task.scorer, task.scorer_version) == ("exact_match", "1")
    assert (task.description, task.options) == ("what it is", {"seed": 0, "sources": ["a.jsonl"]})
    assert list(task.splits) == ["train", "eval"]
    assert task.splits["eval"] == Split(task.splits["eval"].digest, 10, 70, 40, 1)
    assert before <= task.created_at <= datetime.now(UTC)
    assert store.task("safety") == store.task("safety", 1) == task
    assert store.tasks() == store.task_revisions("safety") == [task]
    assert store.eval_keys(task) == build.keys(10)


def test_a_task_has_its_own_line(store: Store) -> None:
    build.add_task(store)
    line = store.line("safety")
    assert (line.task, line.sequence, line.versions, line.latest) == ("safety", (), 0, None)


def test_identical_content_is_the_same_revision(store: Store) -> None:
    task = build.add_task(store)
    again = store.add_task(
        "safety",
        scorer="exact_match",
        scorer_version="1",
        description="told otherwise",
        splits=task.splits,
        options={},
    )
    assert again == task
    assert store.task_revisions("safety") == [task]


@pytest.mark.parametrize("change", ["rows", "scorer", "scorer_version", "fewer_splits"])
def test_changed_rows_or_scorer_make_a_revision(store: Store, change: str) -> None:
    first = build.add_task(store)
    splits = dict(first.splits)
    if change == "rows":
        splits["train"] = Split(store.objects.put(b"other rows"), 100)
    if change == "fewer_splits":
        del splits["train"]
    second = store.add_task(
        "safety",
        scorer="choice" if change == "scorer" else "exact_match",
        scorer_version="2" if change == "scorer_version" else "1",
        description="",
        splits=splits,
        options={},
    )
    assert second.revision == 2
    assert store.task("safety") == second
    assert store.task("safety", 1) == first
    assert store.task_revisions("safety") == [first, second]
    assert store.tasks() == [second]
    assert len(store.lines()) == 1


def test_tasks_are_listed_by_creation_whatever_was_revised_last(store: Store) -> None:
    for name in ("zebra", "ant", "mule"):
        build.add_task(store, name)
    build.add_task(store, "zebra", salt="new")
    assert [task.ref for task in store.tasks()] == ["zebra#2", "ant#1", "mule#1"]


def test_eval_keys_belong_to_a_revision(store: Store) -> None:
    first = build.add_task(store, rows=10)
    second = build.add_task(store, rows=3)
    assert store.eval_keys(first) == build.keys(10)
    assert store.eval_keys(second) == build.keys(3)


def test_a_task_and_a_line_never_share_a_name(store: Store) -> None:
    store.add_line("main")
    with pytest.raises(Conflict, match="'main' is the name of a line"):
        build.add_task(store, "main")
    build.add_task(store, "safety")
    with pytest.raises(Conflict, match="'safety' is a task's own line"):
        store.add_line("safety")


def test_a_task_whose_rows_are_not_stored_is_refused(store: Store) -> None:
    with pytest.raises(DamagedObject, match="missing"):
        store.add_task(
            "safety",
            scorer="exact_match",
            scorer_version="1",
            description="",
            splits={"eval": Split("0" * 64, 1)},
            options={},
        )
    assert store.tasks() == []


def test_a_task_without_eval_rows_is_a_callers_bug(store: Store) -> None:
    with pytest.raises(ValueError, match="needs an eval split, got train"):
        store.add_task(
            "safety",
            scorer="exact_match",
            scorer_version="1",
            description="",
            splits={"train": Split(store.objects.put(b"rows"), 1)},
            options={},
        )
    assert store.lines() == []


def test_eval_keys_are_those_of_the_rows_as_tasks_reads_them(store: Store) -> None:
    rows = [Row("what?", "this", extra={"n": 1}), Row("line\nbreak", "that\u2028so"), Row("", "x")]
    splits = {"eval": Split(store.objects.put(rows_to_jsonl(rows)), 3)}
    task = store.add_task(
        "safety", scorer="exact_match", scorer_version="1", description="", splits=splits,
        options={},
    )  # fmt: skip
    assert store.eval_keys(task) == [row.key for row in rows]


def test_eval_keys_of_altered_or_other_rows_are_refused(store: Store) -> None:
    task = build.add_task(store, rows=10)
    digest = task.splits["eval"].digest
    more = dataclasses.replace(task, splits={"eval": Split(digest, 11)})
    with pytest.raises(DamagedObject, match="has 11 eval rows, its file 10"):
        store.eval_keys(more)
    store.objects.path(digest).write_bytes(b"{}\n")
    with pytest.raises(DamagedObject, match=digest):
        store.eval_keys(task)


def test_an_unknown_task_gets_a_suggestion_and_a_bounded_list(store: Store) -> None:
    with pytest.raises(NotFound, match="there are: none yet"):
        store.task("safety")
    for i in range(23):
        build.add_task(store, f"task{i}")
    build.add_task(store, "safety")
    with pytest.raises(
        NotFound, match="no task is called 'safty'; did you mean 'safety'"
    ) as caught:
        store.task("safty")
    assert str(caught.value).endswith("task18, task19 and 4 more")
    with pytest.raises(NotFound, match=r"has no revision 2: it has 1$"):
        store.task("safety", 2)
    with pytest.raises(NotFound, match="no task"):
        store.task_revisions("safty")


# lines


def test_a_line_may_be_a_sequence(store: Store) -> None:
    line = store.add_line("support", sequence=["safety#1", "nlu#2"])
    assert (line.task, line.sequence, line.versions) == (None, ("safety#1", "nlu#2"), 0)
    assert store.add_line("support", sequence=("safety#1", "nlu#2")) == line
    for other in ((), ("nlu#2", "safety#1")):
        with pytest.raises(Conflict, match="as the sequence safety#1, nlu#2"):
            store.add_line("support", sequence=other)


def test_a_free_line_is_returned_when_added_again(store: Store) -> None:
    assert store.add_line("main") == store.add_line("main")
    with pytest.raises(Conflict, match="is no sequence"):
        store.add_line("main", sequence=["safety#1"])


def test_lines_tell_versions_latest_and_aliases(store: Store) -> None:
    build.add_task(store)
    first = store.add_adapter(build.new_adapter("main"), b"1")
    second = store.add_adapter(build.new_adapter("main", parents=build.parents(first)), b"2")
    store.set_alias("main", "production", 1)
    store.add_line("empty")
    own, main, empty = store.lines()
    assert (own.name, main.name, empty.name) == ("safety", "main", "empty")
    assert (main.versions, main.latest, main.aliases) == (2, second, {"production": 1})
    assert (empty.versions, empty.latest, empty.aliases) == (0, None, {})
    assert [store.line(name) for name in ("safety", "main", "empty")] == [own, main, empty]


def test_listing_lines_takes_as_many_queries_for_many_as_for_one(store: Store) -> None:
    from sqlalchemy import event

    asked: list[str] = []
    event.listen(store._db._engine, "before_cursor_execute", lambda *a: asked.append(a[2]))
    store.add_adapter(build.new_adapter("one"), b"1")
    asked.clear()
    store.lines()
    for_one = len(asked)
    for name in ("two", "three", "four"):
        store.add_adapter(build.new_adapter(name), b"1")
    asked.clear()
    assert len(store.lines()) == 4
    assert len(asked) == for_one


# runs


def test_an_equal_plan_is_the_same_open_run_until_it_is_finished(store: Store) -> None:
    run = store.open_run({"tasks": ["a", "b"], "seed": 1})
    assert not run.done
    assert store.open_run({"seed": 1, "tasks": ("a", "b")}) == run
    other = store.open_run({"tasks": ["b", "a"], "seed": 1})
    assert other.id != run.id
    assert store.open_runs() == [run, other]
    store.finish_run(run.id)
    assert store.open_runs() == [other]
    assert store.open_run({"tasks": ["a", "b"], "seed": 1}).id not in (run.id, other.id)


def test_a_finished_run_may_be_finished_again_but_an_unknown_one_not(store: Store) -> None:
    run = store.open_run({})
    store.finish_run(run.id)
    store.finish_run(run.id)
    for call in (store.finish_run, store.run_adapters):
        with pytest.raises(NotFound, match="no run 'nope'"):
            call("nope")


def test_a_run_lists_what_it_stored_by_stage(store: Store) -> None:
    run = store.open_run({})
    second = store.add_adapter(build.new_adapter("b", run=run.id, stage=1), b"2")
    first = store.add_adapter(build.new_adapter("a", run=run.id, stage=0), b"1")
    store.add_adapter(build.new_adapter("c"), b"3")
    assert store.run_adapters(run.id) == [first, second]


def test_a_stage_is_stored_once(store: Store) -> None:
    run = store.open_run({})
    new = build.new_adapter("a", run=run.id, stage=0)
    first = store.add_adapter(new, b"1")
    assert store.add_adapter(new, b"1") == first
    assert store.adapters() == [first]
    with pytest.raises(NotFound, match="no run"):
        store.add_adapter(build.new_adapter("a", run="nope", stage=0), b"1")
    with pytest.raises(ValueError, match="stage"):
        store.add_adapter(build.new_adapter("a", run=run.id), b"1")


# masks


def test_masks_are_versioned_per_task(store: Store) -> None:
    safety, nlu = build.add_task(store), build.add_task(store, "nlu")
    made = [
        store.add_mask(
            task=task,
            blob=blob,
            projection="a" * 64,
            sparsity=0.9,
            scope="model",
            kept=10,
            total=100,
            config={"steps": 20},
        )
        for task, blob in ((safety, b"m1"), (nlu, b"m2"), (safety, b"m3"))
    ]
    assert [mask.ref for mask in made] == ["safety%1", "nlu%1", "safety%2"]
    assert store.masks("safety") == [made[0], made[2]]
    assert store.mask("safety", 2) == made[2]
    assert store.mask_bytes(made[2]) == b"m3"
    assert (made[0].task_revision, made[0].kept, made[0].config) == (1, 10, {"steps": 20})
    with pytest.raises(NotFound, match="has no mask 3: it has 1 to 2"):
        store.mask("safety", 3)
    build.add_task(store, "code")
    assert store.masks("code") == []
    with pytest.raises(NotFound, match="lori calibrate"):
        store.mask("code", 1)
    for call in (lambda: store.mask("cod", 1), lambda: store.masks("cod")):
        with pytest.raises(NotFound, match="did you mean 'code'"):
            call()


# adapters


def test_an_adapter_comes_back_with_all_it_was_given(store: Store) -> None:
    task = build.add_task(store)
    mask = store.add_mask(
        task=task, blob=b"m", projection="a" * 64, sparsity=0.9, scope="model", kept=1, total=10,
        config={},
    )  # fmt: skip
    run = store.open_run({})
    new = build.new_adapter(
        task="safety", task_revision=1, mask=mask.ref, sequence=True, run=run.id, stage=0
    )
    adapter = store.add_adapter(new, b"weights")
    given = {f.name: getattr(new, f.name) for f in dataclasses.fields(new)}
    assert {name: getattr(adapter, name) for name in given} == given
    assert (adapter.ref, adapter.bytes) == ("safety@1", 7)
    assert store.adapter_bytes(adapter) == b"weights"
    assert store.adapter(AdapterRef("safety", "1")) == adapter


def test_versions_count_up_on_each_line_alone(store: Store) -> None:
    refs = [store.add_adapter(build.new_adapter(line), b"x").ref for line in ("a", "b", "a", "a")]
    assert refs == ["a@1", "b@1", "a@2", "a@3"]
    assert [adapter.ref for adapter in store.adapters("a")] == ["a@1", "a@2", "a@3"]
    assert [adapter.ref for adapter in store.adapters()] == refs


def test_parents_keep_their_order_and_weights(store: Store) -> None:
    a, b = (store.add_adapter(build.new_adapter(line), line.encode()) for line in "ab")
    merged = store.add_adapter(
        build.new_adapter("main", parents=build.parents(b, a, weights=[0.7, 0.3])), b"c"
    )
    assert merged.parents == build.parents(b, a, weights=[0.7, 0.3])
    continued = store.add_adapter(build.new_adapter("a", parents=build.parents(a)), b"d")
    assert store.children(AdapterRef("a", "1")) == [merged, continued]
    assert store.children(AdapterRef("b", "latest")) == [merged]
    assert store.children(AdapterRef("main", "1")) == []
    assert store.adapters() == [a, b, merged, continued]


def test_one_parent_may_be_merged_twice(store: Store) -> None:
    a = store.add_adapter(build.new_adapter("a"), b"a")
    merged = store.add_adapter(build.new_adapter("m", parents=build.parents(a, a)), b"m")
    assert len(merged.parents) == 2
    assert store.children(AdapterRef("a", "1")) == [merged]


def test_refs_resolve_versions_latest_and_aliases(store: Store) -> None:
    first, second = (store.add_adapter(build.new_adapter("main"), b"x") for _ in range(2))
    store.set_alias("main", "production", 1)
    assert store.adapter(AdapterRef("main", "2")) == second
    assert store.adapter(AdapterRef("main", "latest")) == second
    assert store.adapter(AdapterRef("main", "production")) == first


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("main@3", "line 'main' has no version 3: it has 1 to 2"),
        ("main@0", "has no version 0"),
        ("main@" + "9" * 40, "it has 1 to 2"),
        ("main@prodution", "did you mean 'production'"),
        ("mian@1", "no line is called 'mian'; did you mean 'main'"),
        ("mian@latest", "no line"),
        ("empty@latest", "no adapter yet"),
        ("empty@1", "it has none yet"),
    ],
)
def test_what_a_ref_cannot_mean_is_told_with_what_there_is(
    store: Store, ref: str, message: str
) -> None:
    for _ in range(2):
        store.add_adapter(build.new_adapter("main"), b"x")
    store.set_alias("main", "production", 1)
    store.add_line("empty")
    wanted = AdapterRef(*ref.split("@"))
    for call in (store.adapter, store.children):
        with pytest.raises(NotFound, match=message):
            call(wanted)


def test_unknown_lines_are_told(store: Store) -> None:
    for call in (store.line, store.adapters, store.aliases, store.journal):
        with pytest.raises(NotFound, match="no line is called 'nope'"):
            call("nope")


def test_an_adapter_needs_the_base_task_mask_and_parents_it_names(store: Store) -> None:
    build.add_task(store)
    ghost = build.parents(store.add_adapter(build.new_adapter("a"), b"a"))[0]
    before = store.lines()
    wrong = {
        "base": ("e" * 64, WrongBase),
        "task_revision": (1, ValueError),
        "mask": ("safety%1", NotFound),
        "parents": ((dataclasses.replace(ghost, ref="a@2"),), NotFound),
    }
    for name, (value, error) in wrong.items():
        with pytest.raises(error):
            store.add_adapter(build.new_adapter("new", **{name: value}), b"x")
    with pytest.raises(NotFound):
        store.add_adapter(build.new_adapter("new", task="safety", task_revision=2), b"x")
    other = build.new_adapter("new", parents=(dataclasses.replace(ghost, digest="0" * 64),))
    with pytest.raises(ValueError, match="has digest"):
        store.add_adapter(other, b"x")
    assert store.lines() == before


def test_records_are_safe_from_changes_to_what_was_given(store: Store) -> None:
    config = {"seed": 1}
    adapter = store.add_adapter(build.new_adapter(config=config), b"x")
    config["seed"] = 2
    assert store.adapter(AdapterRef("safety", "1")).config == adapter.config == {"seed": 1}


def test_what_json_cannot_hold_is_a_callers_bug_and_stores_nothing(store: Store) -> None:
    with pytest.raises(TypeError, match="JSON cannot hold"):
        store.add_adapter(build.new_adapter(facts={"path": Path("/x")}), b"x")
    assert store.adapters() == []


# names


@pytest.mark.parametrize(
    "name", ["", "a/b", "..", "a@1", "a#1", "a%1", "-a", "a'b", "12", "base", "latest", "x" * 300]
)
def test_names_that_a_ref_could_not_hold_are_refused(store: Store, name: str) -> None:
    calls = (
        lambda: store.add_line(name),
        lambda: build.add_task(store, name),
        lambda: store.add_adapter(build.new_adapter(name), b"x"),
    )
    for call in calls:
        with pytest.raises(InvalidInput):
            call()
    assert store.lines() == []


def test_odd_text_is_stored_as_it_is_and_found_nowhere(store: Store) -> None:
    task = build.add_task(store)
    odd = store.add_task(
        "odd",
        scorer=ODD,
        scorer_version="1",
        description=ODD,
        splits={ODD: task.splits["train"], "eval": task.splits["eval"]},
        options={ODD: [ODD, None, True, 1.5]},
    )
    assert store.task("odd") == odd
    assert (odd.scorer, odd.description, odd.options) == (ODD, ODD, {ODD: [ODD, None, True, 1.5]})
    assert ODD in odd.splits
    adapter = store.add_adapter(build.new_adapter(method=ODD, config={ODD: ODD}), b"x")
    assert store.adapter(AdapterRef("safety", "1")) == adapter
    for call in (store.task, store.line, store.adapters, store.masks):
        with pytest.raises(NotFound):
            call(ODD)
    with pytest.raises(NotFound):
        store.adapter(AdapterRef("safety", ODD))


def test_a_zero_character_is_kept_in_json_and_elsewhere_kept_or_refused(store: Store) -> None:
    adapter = store.add_adapter(build.new_adapter(config={"a\0": "b\0"}), b"x")
    assert store.adapters() == [adapter]
    if isinstance(store._db.backend, SQLite):
        assert store.move_base(path="a\0b", source="").path == "a\0b"
        return
    with pytest.raises(InvalidInput, match="cannot keep this text"):
        store.move_base(path="a\0b", source="")
    assert store.base() == build.base()


def test_text_that_is_not_unicode_is_told(store: Store) -> None:
    for call in (store.task, store.line, lambda name: store.move_base(path=name, source="")):
        with pytest.raises(InvalidInput, match="not valid Unicode"):
            call("caf\udce9")


def test_numbers_beyond_the_database_are_told(store: Store) -> None:
    task = build.add_task(store)
    with pytest.raises(NotFound):
        store.task("safety", 10**30)
    with pytest.raises(NotFound):
        store.mask("safety", 10**30)
    with pytest.raises(InvalidInput, match="too large"):
        store.add_adapter(build.new_adapter(rank=10**30), b"x")
    assert store.tasks() == [task]
