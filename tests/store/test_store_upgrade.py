"""From the schemas of earlier releases, kept as SQL in `schemas/`, to today's."""

from __future__ import annotations

import json
import sqlite3
import zlib
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import store_builders as build

from lori_manager.errors import DamagedObject
from lori_manager.records import Score
from lori_manager.store import database
from lori_manager.store.store import Store

SCHEMAS = Path(__file__).parent / "schemas"


def restore(root: Path, revision: str, *changes: str) -> sqlite3.Connection:
    """The old database in place, and a copy of it to read."""
    root.mkdir()
    copy = sqlite3.connect(":memory:")
    copy.row_factory = sqlite3.Row
    copy.executescript((SCHEMAS / f"{revision}.sql").read_text())
    for change in changes:
        copy.execute(change)
    copy.commit()
    with sqlite3.connect(root / "registry.db") as file:
        copy.backup(file)
    file.close()
    return copy


def old_outcomes(row: sqlite3.Row, column: str, rows: int) -> np.ndarray | None:
    """What the first schema meant, written down here once more."""
    blob = row[column]
    if blob is None:
        return None
    content = blob[:-4]
    assert zlib.crc32(content).to_bytes(4, "little") == blob[-4:]
    if column == "outcomes" and row["encoding"] == "bits":
        return np.unpackbits(np.frombuffer(content, np.uint8), count=rows).astype(np.float32)
    return np.frombuffer(content, "<f4")


def old_names(old: sqlite3.Connection, digest: str) -> list[str]:
    query = "SELECT line, version FROM adapters WHERE digest = ? ORDER BY id"
    return [f"{r['line']}@{r['version']}" for r in old.execute(query, [digest])] or ["base"]


def key(score: Score) -> tuple[Any, ...]:
    return (
        score.subject, score.task, score.task_revision, score.scorer, score.scorer_version,
        score.precision, score.origin,
    )  # fmt: skip


def test_every_score_of_the_first_schema_is_carried_over(tmp_path: Path) -> None:
    root = tmp_path / ".lori"
    old = restore(root, "0001")
    assert database.upgrade(root).before == "0001"
    rows = {
        (r["task"], r["task_revision"]): r["rows"]
        for r in old.execute("SELECT * FROM splits WHERE name = 'eval'")
    }
    with Store.open(root) as store:
        found = {key(score): score for score in store.scores()}
        count = 0
        for row in old.execute("SELECT * FROM scores ORDER BY id"):
            for name in old_names(old, row["digest"]):
                count += 1
                score = found[
                    name, row["task"], row["task_revision"], row["scorer"],
                    str(row["scorer_version"]), row["precision"], row["origin"],
                ]  # fmt: skip
                assert score.digest == row["digest"]
                assert score.encoding == ""
                nan = float("nan")
                figures = [nan if x is None else x for x in (row["value"], row["error"])]
                np.testing.assert_array_equal([score.value, score.error], figures)
                assert score.rows == row["rows"]
                assert score.facts == json.loads(row["facts"])
                assert score.created_at == datetime.fromisoformat(row["created_at"])
                values, weights = store.outcomes(score)
                size = rows[row["task"], row["task_revision"]]
                np.testing.assert_array_equal(values, old_outcomes(row, "outcomes", size))
                expected = old_outcomes(row, "weights", size)
                assert (weights is None) == (expected is None)
                if weights is not None:
                    np.testing.assert_array_equal(weights, expected)
        assert len(found) == count > 15
        assert [f for f in store.verify() if f.kind != "missing"] == []  # files are not kept here
        assert store.tasks()[0].scorer_version == "1"
        # and the cache goes on: nothing is scored again
        task = store.task("safety", 1)
        assert store.find_score(**build.key_of(task, build.FINGERPRINT), encoding="new")


def test_every_move_of_an_alias_is_carried_over_into_the_journal(tmp_path: Path) -> None:
    root = tmp_path / ".lori"
    old = restore(root, "0001")
    database.upgrade(root)
    with Store.open(root) as store:
        moves = [
            (m.id, m.line, m.name, m.from_version, m.to_version, m.user, m.at)
            for m in store.journal()
        ]
        expected = [
            (*tuple(r)[:6], datetime.fromisoformat(r["moved_at"]))
            for r in old.execute("SELECT * FROM alias_moves ORDER BY id")
        ]
        assert moves == expected
        assert [m.action for m in store.journal()] == ["set", "set", "set", "removed"]
        assert {(m.forced, m.reason, m.verdict) for m in store.journal()} == {(False, "", None)}
        assert [a.ref for a in store.aliases()] == ["main@production"]
        store.set_alias("main", "production", 1, reason="after the upgrade")
        assert store.journal()[-1].reason == "after the upgrade"


@pytest.mark.parametrize("column", ["outcomes", "weights"])
def test_what_was_damaged_before_the_upgrade_is_told_after_it_and_can_be_mended(
    tmp_path: Path, column: str
) -> None:
    root = tmp_path / ".lori"
    old = restore(
        root, "0001",
        f"UPDATE scores SET {column} = zeroblob(length({column})) "
        "WHERE digest = (SELECT digest FROM adapters WHERE version = 1) AND scorer = 'perplexity'",
    )  # fmt: skip
    database.upgrade(root)
    with Store.open(root) as store:
        damaged = [f for f in store.verify() if f.kind == "damaged"]
        assert [f.subject for f in damaged] == ["main@1"]
        (score,) = [s for s in store.scores(subject="main@1") if s.scorer == "perplexity"]
        (row,) = old.execute(
            "SELECT value, error FROM scores WHERE task = 'wiki' AND digest = ?", [score.digest]
        )
        assert (score.value, score.error) == tuple(row)
        with pytest.raises(DamagedObject, match="main@1 on wiki#1"):
            store.outcomes(score)
        others = [s for s in store.scores() if s.id != score.id]
        assert len(store.outcomes_of(others)) > 15
        values = np.arange(9, dtype=np.float32)
        new = build.new_score(
            "main@1", score.digest, store.task("wiki"), scorer="perplexity", value=4.0, rows=9
        )
        again = store.add_score(new, values, values)
        assert (again.id, again.created_at) == (score.id, score.created_at)
        np.testing.assert_array_equal(store.outcomes(again)[1], values)
        assert [f for f in store.verify() if f.kind == "damaged"] == []


def test_an_upgraded_store_takes_scores_where_the_old_ones_end(tmp_path: Path) -> None:
    root = tmp_path / ".lori"
    restore(root, "0001")
    database.upgrade(root)
    with Store.open(root) as store:
        before = store.scores(task="safety", revision=1)
        task = store.task("safety", 1)
        values = np.ones(30, np.float32)
        new = build.new_score("main@2", store.adapters("main")[1].digest, task, precision="new")
        added = store.add_score(new, values)
        after = store.scores(task="safety", revision=1)
        assert [s.id for s in after] == [s.id for s in [*before, added]]
        np.testing.assert_array_equal(store.outcomes(added)[0], values)
