"""From store to store: what comes along, what is left alone, what is refused, and going on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import store_builders as build

from lori_manager.errors import Conflict, DamagedObject, InvalidInput, NotFound, WrongBase
from lori_manager.refs import AdapterRef, parse_adapter_ref
from lori_manager.store import moving, parcels
from lori_manager.store.files import MissingObject
from lori_manager.store.moving import Moved, StoreSource, move
from lori_manager.store.store import Store


def empty(root: Path) -> Store:
    store = Store.create(root / ".lori")
    store.set_base(build.base())
    return store


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Store]:
    """safety@1 -> safety@2, wiki@1, main@1 of both; masks, runs, scores, aliases, a removal."""
    with empty(tmp_path / "full") as store:
        safety = build.add_task(store, "safety", rows=30)
        build.add_task(store, "safety", rows=40, salt="second")
        wiki = build.add_task(store, "wiki", rows=9)
        masks = [
            store.add_mask(
                task=safety, blob=b"mask %d" % i, projection="a" * 64, sparsity=0.9, scope="model",
                kept=1, total=10, config={"seed": i},
            )
            for i in range(2)
        ]  # fmt: skip
        run = store.open_run({"tasks": ["safety#1"]})
        first = store.add_adapter(
            build.new_adapter("safety", task="safety", task_revision=1, mask=masks[1].ref,
                              run=run.id, stage=0), b"first",
        )  # fmt: skip
        second = store.add_adapter(
            build.new_adapter("safety", parents=build.parents(first), task="safety",
                              task_revision=1), b"second",
        )  # fmt: skip
        other = store.add_adapter(
            build.new_adapter("wiki", task="wiki", task_revision=1), b"encyclopaedia"
        )
        merge = store.add_adapter(
            build.new_adapter("main", origin="merged", parents=build.parents(
                second, other, weights=[0.25, 0.75])), b"merge",
        )  # fmt: skip
        scrap = store.add_adapter(build.new_adapter("main"), b"scrap")
        store.remove([AdapterRef("main", str(scrap.version))], reason="a mistake")
        store.add_line("stages", sequence=["safety#1", "wiki#1"])
        random = np.random.default_rng(0)
        for adapter in (first, second, other, merge):
            right = (random.random(30) < 0.7).astype(np.float32)
            store.add_score(build.new_score(adapter.ref, adapter.digest, safety), right)
            losses, tokens = random.gamma(2, 1, 9), random.integers(1, 20, 9)
            store.add_score(build.new_score(adapter.ref, adapter.digest, wiki),
                            losses.astype(np.float32), tokens.astype(np.float32))  # fmt: skip
        build.score_base(store, safety, [0.0] * 30)
        store.set_alias("main", "production", 1)
        store.set_alias("safety", "champion", 2)
        yield store


@pytest.fixture
def target(store: Store) -> Store:
    """On every kind of database."""
    return store


def bring(source: Store, target: Store, *refs: str, names: Any = (), **options: Any) -> Moved:
    asked = [ref for ref in map(parse_adapter_ref, refs) if ref is not None] if refs else None
    parcel = parcels.renamed(source.parcel(asked), dict(names))
    parcels.check(parcel, "full")
    options.setdefault("check", lambda *_: None)
    return move(StoreSource(source, "full"), parcel, target, **options)


def contents(store: Store) -> dict[str, Any]:
    """All that has to be equal after everything was moved."""

    listed = store.scores()
    return {
        "tasks": [t for task in store.tasks() for t in store.task_revisions(task.name)],
        "masks": [m for task in store.tasks() for m in store.masks(task.name)],
        "adapters": store.adapters(removed=True),
        "lines": {(li.name, li.task, li.sequence, li.created_at) for li in store.lines()},
        "scores": [
            (replace(s, id=0), [None if x is None else x.tolist() for x in both])
            for s, both in zip(listed, store.outcomes_of(listed), strict=True)
        ],
        "content": [store.adapter_bytes(a) for a in store.adapters()],
        "keys": [store.eval_keys(t) for t in store.tasks() if t.name == "wiki"],
    }  # fmt: skip


def test_a_whole_store_comes_as_it_is(full: Store, target: Store) -> None:
    moved = bring(full, target, aliases=True)
    assert contents(target) == contents(full)
    assert moved.adapters == ("safety@1", "safety@2", "wiki@1", "main@1")
    assert moved.removed == ("main@2",)
    assert moved.tasks == ("safety#1", "safety#2", "wiki#1")
    assert moved.masks == ("safety%1", "safety%2")
    assert (moved.known, moved.scores, moved.back, moved.renumbered) == (0, 9, (), ())
    assert moved.files == 6 + 2 + 4
    assert set(moved.aliases) == {"main@production", "safety@champion"}
    assert target.journal()[0].reason == "from full"
    assert list(target.verify()) == []
    assert target.open_runs() == []
    with pytest.raises(NotFound, match="was removed by"):
        target.adapter(AdapterRef("main", "2"))
    again = target.add_adapter(build.new_adapter("main"), b"new")
    assert again.version == 3  # no number is given twice


def test_once_more_changes_nothing(full: Store, target: Store) -> None:
    bring(full, target)
    before = contents(target)
    moved = bring(full, target, aliases=True)
    assert moved == Moved(known=4, aliases=("main@production", "safety@champion"))
    assert bring(full, target, aliases=True) == Moved(known=4)
    assert contents(target) == before


def test_one_version_comes_with_what_it_needs_alone(full: Store, target: Store) -> None:
    moved = bring(full, target, "safety@2")
    assert moved.adapters == ("safety@1", "safety@2")
    assert moved.masks == ("safety%2",)
    assert moved.tasks == ("safety#1", "wiki#1")  # it is scored on wiki, too
    assert [a.ref for a in target.adapters()] == ["safety@1", "safety@2"]
    # its own scores, and those of its parent and the base on the same tasks
    assert moved.scores == 5
    assert target.aliases() == []
    assert list(target.verify()) == []
    assert target.mask("safety", 2) == full.mask("safety", 2)
    with pytest.raises(NotFound, match=r"has no mask 1: it has 2$"):
        target.mask("safety", 1)


def test_versions_may_come_with_gaps_which_are_told(full: Store, target: Store) -> None:
    for i in range(3):
        full.add_adapter(build.new_adapter("wiki"), b"more %d" % i)
    bring(full, target, "wiki@1", "wiki@3")
    with pytest.raises(NotFound, match=r"no version 2: it has 1, 3$"):
        target.adapter(AdapterRef("wiki", "2"))
    assert target.adapter(AdapterRef("wiki", "latest")).version == 3
    bring(full, target, "wiki@2")
    assert {a.version for a in target.adapters("wiki")} == {1, 2, 3}


def test_a_later_revision_may_come_alone(full: Store, target: Store) -> None:
    task = full.task("safety", 2)
    adapter = full.add_adapter(
        build.new_adapter("late", task="safety", task_revision=2), b"late"
    )  # fmt: skip
    bring(full, target, adapter.ref)
    assert target.tasks() == [task]
    with pytest.raises(NotFound, match=r"no revision 1: it has 2$"):
        target.task("safety", 1)


def test_new_scores_of_known_versions_come(full: Store, target: Store) -> None:
    bring(full, target)
    merge = full.adapter(AdapterRef("main", "1"))
    task = full.task("safety", 1)
    full.add_score(
        build.new_score(merge.ref, merge.digest, task, precision="bf16"), np.ones(30, np.float32)
    )
    assert bring(full, target) == Moved(known=4, scores=1)
    assert contents(target) == contents(full)


def test_another_base_is_one_clear_error(full: Store, tmp_path: Path) -> None:
    with Store.create(tmp_path / "other" / ".lori") as other:
        other.set_base(build.base("e" * 64))
        with pytest.raises(WrongBase, match=r"ffffffffffff .*here eeeeeeeeeeee"):
            bring(full, other)
        assert other.lines() == []
        assert list(other.objects.digests()) == []


def test_the_same_version_of_other_weights_is_refused_before_anything_comes(
    full: Store, target: Store
) -> None:
    build.add_task(target, "safety", rows=30)
    target.add_adapter(build.new_adapter("safety"), b"mine")
    before = sorted(target.objects.digests())
    with pytest.raises(Conflict, match=r"safety@1 is \w{12} here and \w{12} there.*--as safety="):
        bring(full, target, "main@1")
    assert sorted(target.objects.digests()) == before
    assert len(target.adapters()) == 1


def test_a_line_is_not_called_as_another_that_comes_without_versions(
    full: Store, target: Store
) -> None:
    for taken in ("stages", "wiki"):
        with pytest.raises(InvalidInput, match=f"a line '{taken}' comes, too"):
            bring(full, target, names={"main": taken})


def test_or_it_comes_under_another_name(full: Store, target: Store) -> None:
    build.add_task(target, "safety", rows=30)
    mine = target.add_adapter(build.new_adapter("safety"), b"mine")
    for _ in range(2):
        moved = bring(full, target, "main@1", names={"safety": "theirs", "main": "release"})
    assert moved == Moved(known=4)
    assert target.adapters("safety") == [mine]
    assert [a.ref for a in target.adapters("theirs")] == ["theirs@1", "theirs@2"]
    merge = target.adapter(AdapterRef("release", "1"))
    assert [p.ref for p in merge.parents] == ["theirs@2", "wiki@1"]
    assert {s.subject for s in target.scores(task="safety")} == {
        "base", "theirs@1", "theirs@2", "wiki@1", "release@1",
    }  # fmt: skip
    assert target.line("theirs").task is None
    assert list(target.verify()) == []


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ({"nobody": "x"}, "no line 'nobody' comes"),
        ({"main": "base"}, "reserved"),
        ({"main": "../x"}, "not usable"),
        ({"main": "wiki"}, "a line 'wiki' comes, too"),
        ({"main": "x", "wiki": "x"}, "two lines one name"),
    ],
)
def test_names_that_cannot_be_are_refused(
    full: Store, target: Store, names: dict[str, str], told: str
) -> None:
    with pytest.raises(InvalidInput, match=told):
        bring(full, target, names=names)


def test_other_rows_under_the_same_revision_are_refused(full: Store, target: Store) -> None:
    build.add_task(target, "safety", rows=30, salt="mine")
    with pytest.raises(Conflict, match="safety#1 has other rows or another scorer"):
        bring(full, target)


def test_a_name_that_is_a_task_here_and_a_line_there_is_refused(full: Store, target: Store) -> None:
    build.add_task(target, "main")
    with pytest.raises(Conflict, match="'main' is a task here and a line there"):
        bring(full, target)
    assert bring(full, target, names={"main": "release"}).adapters[-1] == "release@1"


def test_another_sequence_of_that_name_is_refused(full: Store, target: Store) -> None:
    target.add_line("stages", sequence=["wiki#1"])
    with pytest.raises(Conflict, match="'stages' was taught other tasks there"):
        bring(full, target)


def test_a_mask_whose_number_is_taken_gets_another_one(full: Store, target: Store) -> None:
    task = build.add_task(target, "safety", rows=30)
    for i in range(3):
        target.add_mask(
            task=task, blob=b"my mask %d" % i, projection="b" * 64, sparsity=0.9, scope="model",
            kept=1, total=10, config={},
        )  # fmt: skip
    moved = bring(full, target)
    assert moved.renumbered == (("safety%1", "safety%4"), ("safety%2", "safety%5"))
    adapter = target.adapter(AdapterRef("safety", "1"))
    assert adapter.mask == "safety%5"
    assert target.mask_bytes(target.mask("safety", 5)) == b"mask 1"
    assert bring(full, target).masks == ()
    assert len(target.masks("safety")) == 5


def test_an_alias_that_means_another_version_is_left(full: Store, target: Store) -> None:
    bring(full, target)
    target.add_adapter(build.new_adapter("main"), b"mine")
    target.set_alias("main", "production", 3)
    moved = bring(full, target, aliases=True)
    assert (moved.aliases, moved.left) == (("safety@champion",), ("main@production",))
    assert target.adapter(AdapterRef("main", "production")).version == 3


def test_what_was_removed_here_stays_so_unless_it_is_asked_for_or_needed(
    full: Store, target: Store
) -> None:
    bring(full, target)
    target.remove([AdapterRef("main", "1"), AdapterRef("safety", "2"), AdapterRef("wiki", "1")])
    freed = list(target.collect(grace=timedelta(0)))
    assert sum(f.kind == "removed" for f in freed) == 3
    assert bring(full, target) == Moved(known=4)
    assert [a.ref for a in target.adapters()] == ["safety@1"]
    moved = bring(full, target, "wiki@1")
    assert moved.back == ("wiki@1",)
    child = full.add_adapter(
        build.new_adapter("child", parents=build.parents(full.adapter(AdapterRef("main", "1")))),
        b"child",
    )
    moved = bring(full, target)
    assert moved.adapters == (child.ref,)
    assert set(moved.back) == {"main@1", "safety@2"}
    assert target.adapter_bytes(target.adapter(AdapterRef("main", "1"))) == b"merge"
    assert list(target.verify()) == []


def test_a_run_that_goes_on_there_is_not_going_on_here(full: Store, target: Store) -> None:
    assert len(full.open_runs()) == 1
    bring(full, target)
    assert target.open_runs() == []
    (run,) = full.open_runs()
    assert [a.ref for a in target.run_adapters(run.id)] == ["safety@1"]


def test_the_weights_of_a_run_may_come_under_two_names(full: Store, target: Store) -> None:
    bring(full, target, "safety@1")
    bring(full, target, "safety@1", names={"safety": "again"})
    assert {a.ref for a in target.adapters()} == {"safety@1", "again@1"}


def test_damage_at_the_source_is_told_and_nothing_of_it_comes(full: Store, target: Store) -> None:
    adapter = full.adapter(AdapterRef("safety", "2"))
    full.objects.path(adapter.digest).write_bytes(b"altered")  # type: ignore[attr-defined]
    with pytest.raises(DamagedObject, match="full: object"):
        bring(full, target)
    assert target.adapters() == []
    assert [f for f in target.verify() if f.kind != "orphan"] == []
    assert bring(full, target, "wiki@1").adapters == ("wiki@1",)


def test_what_is_not_what_it_is_to_be_is_refused(full: Store, target: Store) -> None:
    def check(file: parcels.File, content: bytes) -> None:
        if file.subject == "safety@2":
            raise DamagedObject("no adapter")

    for _ in range(2):  # what lies there by now is checked all the same
        with pytest.raises(DamagedObject, match="no adapter"):
            bring(full, target, "safety@2", check=check)
    digest = target.objects.put(b"second")
    with pytest.raises(DamagedObject, match="no adapter"):
        bring(full, target, "safety@2", check=check)
    assert target.objects.exists(digest)
    assert target.adapters() == []


def test_files_that_are_there_are_not_copied_again(full: Store, target: Store) -> None:
    for content in (b"first", b"second", b"mask 0"):
        target.objects.put(content)
    assert bring(full, target).files == 12 - 3


def test_a_damaged_file_that_lies_there_is_replaced(full: Store, target: Store) -> None:
    digest = target.objects.put(b"first")
    target.objects.path(digest).write_bytes(b"f1rst")  # type: ignore[attr-defined]
    assert bring(full, target).files == 12
    assert list(target.verify()) == []


def test_it_goes_on_where_gc_came_between(
    full: Store, target: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, gone = moving._Porter._put, []

    def put_and_lose(*given: Any) -> Any:
        files = put(*given)
        if not gone:
            gone.extend(f.subject for f in target.collect(grace=timedelta(0)))
        return files

    monkeypatch.setattr(moving._Porter, "_put", put_and_lose)
    bring(full, target)
    assert gone
    assert contents(target) == contents(full)
    assert list(target.verify()) == []


def test_files_that_gc_takes_every_time_are_put_where_it_waits(
    full: Store, target: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = build.lose_files(target, monkeypatch)
    bring(full, target)
    assert sum(map(bool, looks)) == 5 * 3  # a transaction each for tasks, masks and adapters
    assert contents(target) == contents(full)
    assert list(target.verify()) == []


def test_a_file_that_is_missing_there_is_told(full: Store, target: Store) -> None:
    full.objects.remove(full.adapter(AdapterRef("wiki", "1")).digest)
    with pytest.raises(MissingObject, match="full: object"):
        bring(full, target)
    assert target.adapters() == []


def test_a_version_that_others_bring_back_and_remove_meanwhile_is_whole(
    full: Store, target: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    wiki = AdapterRef("wiki", "1")
    bring(full, target, "wiki@1")
    target.remove([wiki])
    news, calls = target.news, []

    def news_of_a_moment(parcel: parcels.Parcel) -> Any:
        calls.append(parcel)
        if len(calls) != 2:  # the second says which files to put
            return news(parcel)
        target.restore([wiki])
        found = news(parcel)
        target.remove([wiki])
        assert "wiki@1" in [f.subject for f in target.collect(grace=timedelta(0))]
        return found

    monkeypatch.setattr(target, "news", news_of_a_moment)
    bring(full, target, "wiki@1")
    assert target.adapter_bytes(target.adapter(wiki)) == b"encyclopaedia"
    assert list(target.verify()) == []


@pytest.mark.parametrize("stop", range(12))
def test_interrupted_anywhere_versions_are_whole_or_absent_and_the_same_call_goes_on(
    full: Store, target: Store, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    monkeypatch.setattr(moving, "ADAPTERS", 1)
    monkeypatch.setattr(moving, "TASKS", 1)
    monkeypatch.setattr(moving, "_AT_ONCE", 1)
    put, left = target.objects.put, [stop]

    def put_until(content: bytes) -> str:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return put(content)

    with monkeypatch.context() as patch:
        patch.setattr(target.objects, "put", put_until)
        with pytest.raises(KeyboardInterrupt):
            bring(full, target)
    assert [f for f in target.verify() if f.kind != "orphan"] == []
    for adapter in target.adapters():
        assert len(target.scores(subject=adapter.ref)) == 2
        assert all(target.adapter(AdapterRef(*p.ref.split("@"))) for p in adapter.parents)
    moved = bring(full, target)
    assert moved.files <= 12 - stop
    assert contents(target) == contents(full)
    assert list(target.verify()) == []


def test_between_buckets_and_folders(
    full: Store, target: Store, bucket: str, tmp_path: Path
) -> None:
    with Store.create(tmp_path / "remote" / ".lori") as remote:
        remote.keep_objects_at(f"s3://{bucket}/team")
        remote.set_base(build.base())
        assert bring(full, remote).files == 12
        assert bring(full, remote).files == 0
        assert bring(remote, target).files == 12
        assert contents(target) == contents(remote) == contents(full)
        assert list(remote.verify()) == []
