"""Splits: leakage, probe rows, notes."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lori_manager.errors import BadData, InvalidInput
from lori_manager.tasks.rows import Row
from lori_manager.tasks.splits import make_splits


def rows(name, *prompts):
    return [Row(p, f" answer of {p}", where=f"{name}.jsonl, line {i}")
            for i, p in enumerate(prompts, 1)]  # fmt: skip


def many(n, name="train"):
    return rows(name, *(f"{name} {i}" for i in range(n)))


EVAL = rows("eval", "e1", "e2", "e3")


def test_eval_alone_makes_a_task_that_is_only_scored():
    prepared = make_splits(None, EVAL)
    assert prepared.splits == {"eval": EVAL}
    assert prepared.notes == []


def test_without_eval_rows_nothing_is_made():
    for nothing in (None, []):
        with pytest.raises(InvalidInput, match="--eval"):
            make_splits(many(3), nothing)


def test_calibration_needs_training_rows():
    with pytest.raises(InvalidInput, match="--train"):
        make_splits(None, EVAL, many(3))


@pytest.mark.parametrize("bad", [-1, 2.5, True, "9"])
def test_probe_rows_must_be_a_count(bad):
    with pytest.raises(InvalidInput, match="probe_rows"):
        make_splits(many(3), EVAL, probe_rows=bad)


@pytest.mark.parametrize("split", ["train", "calibration", "probe"])
def test_a_prompt_that_is_learned_and_scored_is_refused(split):
    leak = [*many(5), *rows("leak", "e3", "e1"), Row("e3", " another completion", where="x")]
    files = {"train": many(4, "t"), split: leak}
    with pytest.raises(BadData) as e:
        make_splits(eval=EVAL, **files)
    message = str(e.value)
    assert f"2 of 3 eval rows share their prompt with {split} rows" in message
    assert "the first: eval.jsonl, line 1 and leak.jsonl, line 2, 'e1'" in message
    assert "--allow-overlap" in message
    assert message.isprintable()


def test_overlaps_of_several_files_are_told_at_once():
    with pytest.raises(BadData) as e:
        make_splits(rows("train", "e1"), EVAL, rows("calibration", "e2", "e3"))
    assert "1 of 3 eval rows share their prompt with train" in str(e.value)
    assert "2 of 3 eval rows share their prompt with calibration" in str(e.value)


def test_an_allowed_overlap_is_noted_and_everything_is_kept():
    train = [*many(5), Row("e2", " c")]
    prepared = make_splits(train, EVAL, probe_rows=0, allow_overlap=True)
    assert prepared.splits == {"train": train, "eval": EVAL}
    [note] = prepared.notes
    assert note.startswith("1 of 3 eval rows share their prompt with train rows")
    assert note.endswith("allowed")
    assert "eval.jsonl, line 2 and train row 6" in note


def test_rows_without_a_prompt_are_compared_by_their_completion():
    train = [Row("", "one"), Row(" ", "two"), Row("", "three")]
    assert make_splits(train, [Row("", "four")], probe_rows=0).splits["train"] == train
    with pytest.raises(BadData, match="1 of 1 eval rows"):
        make_splits(train, [Row("", "two")])
    assert make_splits([Row("x", "y")], [Row("", "x")], probe_rows=0)


def test_calibration_and_probe_files_are_taken_as_they_are():
    train, calibration, probe = many(40), many(3, "c"), many(300, "p")
    prepared = make_splits(train, EVAL, calibration, probe)
    assert prepared.splits == {
        "train": train, "eval": EVAL, "calibration": calibration, "probe": probe
    }  # fmt: skip
    assert list(prepared.splits) == ["train", "eval", "calibration", "probe"]
    assert prepared.notes == []
    notes = make_splits(train, EVAL, None, train[:7]).notes
    assert notes == ["7 of 40 train rows are probe rows too"]


def test_a_probe_file_needs_no_training_rows():
    assert make_splits(None, EVAL, None, many(3)).splits["probe"] == many(3)


@pytest.mark.parametrize(
    ("n", "limit", "count"),
    [(1, 256, 0), (2, 256, 1), (10, 256, 1), (11, 256, 2), (2559, 256, 256), (3000, 256, 256),
     (3000, 10, 10), (3000, 0, 0)],
)  # fmt: skip
def test_probe_rows_are_at_most_the_limit_and_a_tenth_and_never_all(n, limit, count):
    splits = make_splits(many(n), EVAL, probe_rows=limit).splits
    assert len(splits.get("probe", [])) == count
    assert len(splits["train"]) == n - count
    assert count == 0 or "probe" in splits


def test_probe_rows_are_those_with_the_smallest_keys():
    train = many(95)
    prepared = make_splits(train, EVAL)
    assert prepared.splits["probe"] == sorted(train, key=lambda r: r.key)[:10]
    assert prepared.splits["train"] == [r for r in train if r not in prepared.splits["probe"]]
    assert prepared.notes == ["10 of 95 train rows set aside as probe rows"]


prompts = st.lists(st.integers(0, 60).map(str), min_size=1, max_size=80)
quick = settings(max_examples=60, deadline=None, database=None)


@quick
@given(prompts, st.integers(0, 12), st.randoms(use_true_random=False))
def test_probe_rows_do_not_depend_on_the_order_and_no_row_is_lost(names, limit, rng):
    train = rows("train", *names)
    shuffled = random.Random(rng.random()).sample(train, len(train))
    first = make_splits(train, EVAL, probe_rows=limit).splits
    second = make_splits(shuffled, EVAL, probe_rows=limit).splits
    probe = first.get("probe", [])
    assert second.get("probe", []) == probe
    assert len(probe) <= min(limit, math.ceil(len(train) / 10), len(train) - 1)
    assert sorted(first["train"] + probe, key=repr) == sorted(train, key=repr)
    assert first["train"] == [r for r in train if r not in probe], "the file's order"
    assert second["train"] == [r for r in shuffled if r not in probe]


def test_copies_of_a_row_are_not_parted_by_the_probe():
    train = [r for r in many(30) for _ in range(2)]
    splits = make_splits(train, EVAL).splits
    assert len(splits["probe"]) == 6
    assert not {r.key for r in splits["probe"]} & {r.key for r in splits["train"]}
    prepared = make_splits(rows("train", *["same"] * 30), EVAL)
    assert "probe" not in prepared.splits
    assert len(prepared.splits["train"]) == 30
    assert prepared.notes[-1] == "no probe rows: 30 train rows are too few, or are all alike"


def test_copies_are_kept_and_noted():
    eval_rows = [*EVAL, EVAL[1], EVAL[1]]
    prepared = make_splits(many(5), eval_rows, probe_rows=0)
    assert prepared.splits["eval"] == eval_rows
    assert prepared.notes == [
        "2 of 5 eval rows are exact copies of earlier ones, the first: eval.jsonl, line 2 of "
        "eval.jsonl, line 2; kept"
    ]


def test_what_comes_in_is_not_modified():
    train, scored = many(50), list(EVAL)
    prepared = make_splits(train, scored)
    prepared.splits["eval"].clear()
    assert (train, scored) == (many(50), EVAL)
