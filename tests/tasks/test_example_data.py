"""The repository's example tasks are what their README says."""

from pathlib import Path

import pytest

from lori_manager.tasks.sources import read_source
from lori_manager.tasks.splits import make_splits

DATA = Path(__file__).parents[2] / "examples" / "data"
LABELS = {"clinc_domain": 10, "snips": 7, "sentiment_uci": 2}


@pytest.mark.parametrize("task", LABELS)
def test_example_rows_are_usable_and_leak_nothing(task):
    train = read_source(f"{task}/train.jsonl", root=DATA)
    scored = read_source(f"{task}/eval.jsonl", root=DATA)
    assert (len(train), len(scored)) == (1152, 200)
    prepared = make_splits(train, scored)
    assert prepared.notes == ["116 of 1152 train rows set aside as probe rows"]
    for row in train + scored:
        assert row.completion == f" {row.extra['answer']}"
        assert row.extra.keys() == {"answer"}
        assert row.choices == train[0].choices
    assert {row.completion.strip() for row in scored} == set(train[0].choices)
    assert len(train[0].choices) == LABELS[task]


def test_example_data_are_small_and_say_where_they_come_from():
    assert sum(f.stat().st_size for f in DATA.rglob("*.jsonl")) < 2_000_000
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    assert all(f"`{task}`" in readme for task in LABELS)
    assert readme.count("Licence:") == 3
