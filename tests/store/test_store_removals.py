"""Versions that are removed, what refuses it, and what gc then frees."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import store_builders as build

from lori_manager.errors import Conflict, InvalidInput, NotFound
from lori_manager.records import Split
from lori_manager.refs import AdapterRef
from lori_manager.store import collecting
from lori_manager.store.files import TEMPORARY, MissingObject
from lori_manager.store.store import Store

NO_GRACE = timedelta(0)


def refs(*texts: str) -> list[AdapterRef]:
    return [AdapterRef(*text.split("@")) for text in texts]


def freed(store: Store, **options: Any) -> list[tuple[str, str]]:
    return [(f.kind, f.subject) for f in store.collect(**{"grace": NO_GRACE} | options)]


@pytest.fixture
def three(store: Store) -> Store:
    """main@1, main@2 and main@3 of weights of their own."""
    for i in range(3):
        store.add_adapter(build.new_adapter("main"), b"weights %d" % i)
    return store


def test_a_removed_version_is_passed_over_wherever_adapters_are_listed(three: Store) -> None:
    (gone,) = three.remove(refs("main@3"), reason="a mistake")
    assert (gone.ref, gone.hidden) == ("main@3", True)
    assert [a.ref for a in three.adapters()] == ["main@1", "main@2"]
    assert [a.ref for a in three.adapters(removed=True)] == ["main@1", "main@2", "main@3"]
    assert three.adapter(AdapterRef("main", "latest")).ref == "main@2"
    line = three.line("main")
    assert (line.versions, line.latest.ref if line.latest else None) == (2, "main@2")
    with pytest.raises(NotFound, match=r"main@3 was removed by .*: a mistake; `lori rm --undo"):
        three.adapter(AdapterRef("main", "3"))
    assert three.adapter(AdapterRef("main", "3"), removed=True) == gone


def test_its_number_is_not_given_again(three: Store) -> None:
    three.remove(refs("main@3"))
    assert three.add_adapter(build.new_adapter("main"), b"next").ref == "main@4"


def test_a_line_of_removed_versions_has_no_latest(three: Store) -> None:
    three.remove(refs("main@1", "main@2", "main@3"))
    assert three.line("main").latest is None
    with pytest.raises(NotFound, match="only removed adapters"):
        three.adapter(AdapterRef("main", "latest"))


def test_its_scores_go_and_come_back_with_it(three: Store) -> None:
    task = build.add_task(three)
    adapter = three.adapters()[2]
    three.add_score(build.new_score("main@3", adapter.digest, task), build.np.ones(10))
    three.remove(refs("main@3"))
    assert three.scores() == []
    assert [f.kind for f in three.verify()] == ["orphan"]  # its file, until gc frees it
    three.restore(refs("main@3"))
    assert [score.subject for score in three.scores()] == ["main@3"]
    assert list(three.verify()) == []


def test_scores_of_shared_weights_stay_under_the_other_name(three: Store) -> None:
    task = build.add_task(three)
    first = three.adapters()[0]
    again = three.add_adapter(build.new_adapter("other"), b"weights 0")
    three.add_score(build.new_score("main@1", first.digest, task), build.np.ones(10))
    three.remove(refs("main@1"))
    assert [score.subject for score in three.scores()] == [again.ref]
    assert freed(three) == []
    assert three.adapter_bytes(again) == b"weights 0"


def test_what_an_alias_a_child_a_merge_or_a_training_needs_is_not_removed(three: Store) -> None:
    one, two, three_ = three.adapters()
    three.set_alias("main", "production", 1)
    three.add_adapter(build.new_adapter("child", parents=build.parents(two)), b"child")
    merge = build.new_adapter("merge", origin="merged", parents=build.parents(one, three_))
    three.add_adapter(merge, b"merge")
    run = three.open_run({"options": {"start": "child@1"}, "tasks": ["safety#1"]})
    for ref, needs in {
        "main@1": "the alias main@production, merge@1, which was merged from it",
        "main@2": "child@1, which was continued from it",
        "main@3": "merge@1, which was merged from it",
        "child@1": f"the unfinished training {run.id[:8]} (`lori db abandon` gives it up)",
    }.items():
        with pytest.raises(Conflict, match=re.escape(f"{ref} is needed by {needs}: remove")):
            three.remove(refs(ref))
    assert three.removals() == []
    three.finish_run(run.id)
    three.remove_alias("main", "production")
    three.remove(refs("merge@1", "child@1", "main@1", "main@2", "main@3"))  # with their needers
    assert three.adapters() == []


def test_a_stage_of_an_unfinished_training_is_not_removed(store: Store) -> None:
    run = store.open_run({"tasks": ["safety#1"]})
    store.add_adapter(build.new_adapter("main", run=run.id, stage=0), b"stage")
    with pytest.raises(Conflict, match="the unfinished training"):
        store.remove(refs("main@1"))


def test_one_refusal_removes_nothing(three: Store) -> None:
    three.set_alias("main", "production", 1)
    with pytest.raises(Conflict):
        three.remove(refs("main@3", "main@1"))
    assert three.removals() == []


def test_nothing_new_is_made_from_what_is_removed(three: Store) -> None:
    gone = three.adapters()[2]
    three.remove(refs("main@3"))
    with pytest.raises(NotFound, match="was removed"):
        three.add_adapter(build.new_adapter("main", parents=build.parents(gone)), b"child")
    with pytest.raises(NotFound, match="was removed"):
        three.set_alias("main", "production", 3)


def test_removals_are_told_and_cannot_be_changed(three: Store) -> None:
    three.remove(refs("main@3"), reason="a mistake")
    three.restore(refs("main@3"), reason="it was none")
    assert [(r.ref, r.hidden, r.reason) for r in three.removals()] == [
        ("main@3", True, "a mistake"),
        ("main@3", False, "it was none"),
    ]
    for change in ("UPDATE removals SET reason = ''", "DELETE FROM removals"):
        with pytest.raises(Exception, match="removals only grow"):
            build.sql(three, change, rules=True)
    with pytest.raises(NotFound, match="is not removed"):
        three.restore(refs("main@3"))


def test_gc_frees_the_file_and_then_there_is_no_way_back(three: Store) -> None:
    gone = three.adapters()[2]
    three.remove(refs("main@3"))
    assert freed(three, dry_run=True) == [("removed", "main@3")]
    assert three.objects.exists(gone.digest)
    assert freed(three) == [("removed", "main@3")]
    assert not three.objects.exists(gone.digest)
    assert list(three.verify()) == []
    with pytest.raises(MissingObject):
        three.restore(refs("main@3"))
    assert three.adapter(AdapterRef("main", "3"), removed=True).hidden  # all was taken back
    again = three.add_adapter(build.new_adapter("main"), b"weights 2")
    assert (again.ref, three.adapter_bytes(again)) == ("main@4", b"weights 2")
    three.restore(refs("main@3"))  # the same weights are there again


def test_gc_passes_over_a_temporary_file_that_gets_its_name_meanwhile(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = store.root / f"{TEMPORARY}x"
    written.write_bytes(b"x")
    os.utime(written, (0, 0))
    age = collecting._age

    def named(paths: list[Path]) -> timedelta:
        written.rename(store.root / "whole")
        return age(paths)

    monkeypatch.setattr(collecting, "_age", named)
    assert freed(store) == []
    assert (store.root / "whole").exists()


def test_gc_keeps_what_any_row_needs(store: Store) -> None:
    task = build.add_task(store)
    store.add_mask(
        task=task, blob=b"m", projection="a" * 64, sparsity=0.9, scope="model", kept=1, total=9,
        config={},
    )  # fmt: skip
    store.add_adapter(build.new_adapter("main"), b"x")
    assert freed(store) == []
    assert list(store.verify()) == []


def test_gc_spares_what_is_young(three: Store) -> None:
    digest = three.objects.put(b"about to be committed")
    three.remove(refs("main@3"))
    day = timedelta(hours=24)
    assert freed(three, grace=day) == []
    two_days_ago = time.time() - 2 * day.total_seconds()
    for left in (digest, three.adapters(removed=True)[2].digest):
        os.utime(three.objects.where(left), (two_days_ago, two_days_ago))
    assert freed(three, grace=day) == [("orphan", digest)]  # main@3 was removed just now
    with pytest.raises(InvalidInput, match="0 or more"):
        three.collect(grace=-day)


def test_putting_an_old_file_again_begins_its_time_of_grace_anew(store: Store) -> None:
    digest = store.objects.put(b"weights")
    os.utime(store.objects.where(digest), (0, 0))
    store.objects.put(b"weights")
    assert freed(store, grace=timedelta(hours=1)) == []


def test_gc_frees_ended_runs_and_old_temporary_files_alone(store: Store) -> None:
    going = store.open_run({"tasks": ["safety#1"]})
    ended = store.open_run({"tasks": ["wiki#1"]})
    store.finish_run(ended.id)
    digest = store.objects.put(b"kept")
    store.add_adapter(build.new_adapter("main"), b"kept")
    old = {
        store.runs / going.id / "0-training" / "file": b"1",
        store.runs / ended.id / "0-training" / "file": b"22",
        store.root / ".tmp-1": b"333",
        Path(store.objects.where(digest)).parent / ".tmp-2": b"4444",
        store.root / ".registry.db.new": b"55555",
    }
    for path, content in old.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    young = store.root / ".tmp-3"
    young.write_bytes(b"being written")
    for path in [*old, *store.runs.rglob("*")]:
        os.utime(path, (0, 0))
    found = list(store.collect(grace=NO_GRACE))
    assert [(f.kind, f.subject, f.bytes) for f in found] == [
        ("run", ended.id, 2),
        ("temporary", ".tmp-1", 3),
        ("temporary", ".tmp-2", 4),
        ("temporary", ".registry.db.new", 5),
    ]
    assert (store.runs / going.id / "0-training" / "file").exists()
    assert not (store.runs / ended.id).exists()
    assert young.exists()


def test_a_writer_whose_file_gc_takes_before_the_row_puts_it_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    put: Callable[..., str] = store.objects.put

    def put_and_lose(content: bytes) -> str:
        digest = put(content)
        if not taken:
            taken.extend(freed(store))
        return digest

    monkeypatch.setattr(store.objects, "put", put_and_lose)
    adapter = store.add_adapter(build.new_adapter("main"), b"weights")
    assert taken == [("orphan", adapter.digest)]
    assert store.adapter_bytes(adapter) == b"weights"


def test_a_file_that_gc_takes_every_time_is_put_where_it_waits(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = build.lose_files(store, monkeypatch)
    adapter = store.add_adapter(build.new_adapter("main"), b"weights")
    assert looks == [[adapter.digest]] * 5
    assert store.adapter_bytes(adapter) == b"weights"


def test_what_comes_back_is_read_before_others_wait(
    three: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, writing = three.objects.check, []
    three.remove(refs("main@3"))

    def checked(digest: str) -> None:
        three.add_line("meanwhile")
        writing.append(digest)
        check(digest)

    monkeypatch.setattr(three.objects, "check", checked)
    (back,) = three.restore(refs("main@3"))
    assert writing == [back.digest]
    three.remove(refs("main@3"))

    def checked_and_freed(digest: str) -> None:
        check(digest)
        assert freed(three) == [("removed", "main@3")]

    monkeypatch.setattr(three.objects, "check", checked_and_freed)
    with pytest.raises(MissingObject, match=back.digest):
        three.restore(refs("main@3"))
    assert three.adapter(AdapterRef("main", "3"), removed=True).hidden


def stored_images(store: Store, *images: bytes) -> tuple[list[str], Split]:
    """Digests of images, and the split whose rows name them, stored."""
    digests = [store.objects.put(image) for image in images]
    named = "".join(f'{{"completion":"","image":"{digest}","prompt":"a"}}\n' for digest in digests)
    split = Split(store.objects.put(named.encode()), len(images))
    return digests, split


def add_image_task(store: Store, split: Split) -> None:
    store.add_task("cats", scorer="noise_loss", scorer_version="1", description="",
                   splits={"eval": split}, options={"images": {"folder": "cats"}})  # fmt: skip


def test_gc_keeps_the_images_that_rows_name(store: Store) -> None:
    images, split = stored_images(store, b"one", b"two")
    add_image_task(store, split)
    orphan = store.objects.put(b"three")
    assert freed(store) == [("orphan", orphan)]
    assert list(store.verify()) == []
    store.objects.remove(images[1])
    assert [(f.kind, f.subject) for f in store.verify()] == [("missing", "cats#1 eval")]


def test_gc_frees_nothing_while_rows_that_name_images_cannot_be_read(store: Store) -> None:
    images, split = stored_images(store, b"one")
    add_image_task(store, split)
    store.objects.remove(split.digest)
    with pytest.raises(MissingObject):
        freed(store)
    assert store.objects.exists(images[0])


def test_a_task_whose_image_gc_took_before_the_row_is_refused(store: Store) -> None:
    images, split = stored_images(store, b"one", b"two")
    store.objects.remove(images[0])
    with pytest.raises(MissingObject, match=images[0][:12]):
        add_image_task(store, split)
    assert store.tasks() == []


def test_gc_sees_a_task_of_images_that_came_while_it_looked(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, split = stored_images(store, b"one")
    every = store.objects.digests

    def looked() -> Iterator[str]:
        yield from list(every())
        add_image_task(store, split)

    monkeypatch.setattr(store.objects, "digests", looked)
    assert freed(store) == []
    assert store.objects.exists(images[0])
