"""Rows on a server, files in a bucket: several folders, as on several machines, are one store."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from lori_manager.errors import Conflict, DamagedObject
from lori_manager.records import Base, NewAdapter
from lori_manager.store.postgres import Postgres
from lori_manager.store.store import Store

BASE = Base("f" * 64, "tiny", None, "/first/tiny", "llama", datetime(2026, 1, 1, tzinfo=UTC))
ADAPTER = NewAdapter(
    line="safety", origin="trained", task=None, task_revision=None, mask=None, parents=(),
    method="lori-s", rank=4, projection="a" * 64, base=BASE.fingerprint,
)  # fmt: skip


@pytest.fixture
def server(postgres_server: Any) -> Postgres:
    return Postgres.at(postgres_server.url(postgres_server.database()))


@pytest.fixture
def pair(server: Postgres, bucket: str, tmp_path: Path) -> tuple[Store, Store]:
    first = Store.create(tmp_path / "one" / ".lori", server)
    first.keep_objects_at(f"s3://{bucket}/team")
    first.set_base(BASE)
    second = Store.create(tmp_path / "two" / ".lori", server)
    second.set_base(replace(BASE, path="/second/tiny", source="/second/tiny"))
    return first, second


def test_what_one_folder_stores_the_other_has(pair: tuple[Store, Store], tmp_path: Path) -> None:
    first, second = pair
    made = [
        store.add_adapter(ADAPTER, b"of %d" % i) for i, store in enumerate((first, second, first))
    ]
    assert [a.version for a in made] == [1, 2, 3]
    assert [second.adapter_bytes(a) for a in made] == [b"of 0", b"of 1", b"of 2"]
    assert [f for f in second.verify() if f.kind != "orphan"] == []
    with Store.open(tmp_path / "two" / ".lori") as again:
        assert len(again.adapters()) == 3


def test_each_folder_knows_where_it_has_the_base(pair: tuple[Store, Store]) -> None:
    first, second = pair
    assert first.base() == BASE
    assert second.base() == replace(BASE, path="/second/tiny", source="/second/tiny")
    second.move_base(path="/elsewhere", source="/elsewhere")
    assert (first.base().path, second.base().path) == (BASE.path, "/elsewhere")
    (second.root / "base.json").write_text("{")
    with pytest.raises(DamagedObject, match="remove it, then `lori base --move DIR`"):
        second.base()


def test_equal_trainings_in_two_folders_are_two_runs(pair: tuple[Store, Store]) -> None:
    plan = {"tasks": ["safety#1"], "options": {}}
    first, second = (store.open_run(plan).id for store in pair)
    assert first != second
    assert pair[0].open_run(plan).id == first


def test_another_base_or_another_bucket_does_not_join(
    pair: tuple[Store, Store], server: Postgres, bucket: str, tmp_path: Path
) -> None:
    with Store.create(tmp_path / "three" / ".lori", server) as third:
        with pytest.raises(Conflict, match="another base"):
            third.set_base(replace(BASE, fingerprint="e" * 64))
        with pytest.raises(Conflict, match="this store keeps its objects in s3://"):
            third.keep_objects_at(f"s3://{bucket}/other")


def test_without_a_bucket_the_files_are_in_one_folder_and_no_other_joins(
    server: Postgres, tmp_path: Path
) -> None:
    Store.create(tmp_path / "one" / ".lori", server).close()
    with pytest.raises(Conflict, match="the database is that of the workspace in"):
        Store.create(tmp_path / "two" / ".lori", server)


def test_a_join_that_failed_is_gone_on_with(
    pair: tuple[Store, Store], server: Postgres, tmp_path: Path
) -> None:
    root = tmp_path / "three" / ".lori"
    with Store.create(root, server) as third, pytest.raises(Conflict):
        third.set_base(replace(BASE, fingerprint="e" * 64))
    with Store.open(root) as third:
        assert not third.settled
        third.set_base(replace(BASE, path="/third/tiny"))
        assert third.settled
        assert third.base().path == "/third/tiny"


def test_two_trainings_do_not_mix_in_one_sequence(pair: tuple[Store, Store]) -> None:
    plan = {"tasks": ["safety#1"], "sequence": "both"}
    runs = [store.open_run(plan).id for store in pair]
    stage = replace(ADAPTER, line="both", sequence=True, stage=0)
    pair[0].add_adapter(replace(stage, run=runs[0]), b"one")
    with pytest.raises(Conflict, match=r"has 1 stage\(s\) and this is stage 0"):
        pair[1].add_adapter(replace(stage, run=runs[1]), b"two")
    pair[0].add_adapter(replace(stage, run=runs[0], stage=1), b"three")
    assert [a.version for a in pair[1].adapters("both")] == [1, 2]
