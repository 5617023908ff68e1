"""A text encoder on the command line: tasks of labels from `init` to `export`."""

import pytest
from calling import Lori
from encoders import FILLERS, encoder, sentences, write_jsonl

SETTINGS = ("--rank", "4", "--alpha", "8", "--steps", "6", "--calibration-steps", "2",
            "--batch", "8", "--head-learning-rate", "0.01")  # fmt: skip


@pytest.fixture
def road(tmp_path):
    base = encoder(tmp_path / "base", "bert")
    lori = Lori(tmp_path / "w")
    lori.folder.mkdir()
    made = lori("init", "--base", base)
    assert "bert, a text encoder" in made.stdout
    for number, (task, labels) in enumerate({"colour": ("blue", "red"), "size": ("big", "old")}
                                            .items()):  # fmt: skip
        rows = sentences(labels, 60, number, FILLERS[number])
        write_jsonl(tmp_path / task / "train.jsonl", rows[:40])
        write_jsonl(tmp_path / task / "eval.jsonl", rows[40:])
        lori("add-task", task, "--train", tmp_path / task / "train.jsonl",
             "--eval", tmp_path / task / "eval.jsonl")  # fmt: skip
    return lori


def test_the_road_of_a_text_encoder(road, tmp_path):
    assert "label_accuracy" in road("tasks").stdout
    shown = road("show", "colour").stdout
    assert "blue, red" in shown
    trained = road.json("train", "colour", "size", *SETTINGS)
    assert [one["adapter"]["line"] for one in trained] == ["colour", "size"]
    scored = road("score", "base", "colour", "--tasks", "colour")
    assert "base has no head for colour: it answers nothing there" in scored.stderr
    merged = road("merge", "--tasks", "colour,size", "--method", "regmean")
    assert "main@1: regmean of 2" in merged.stderr + merged.stdout
    told = road.refuses("export", "main@1", tmp_path / "out", code=2)
    assert "say by --task whose head goes with main@1; it has: colour, size" in told
    road("export", "main@1", tmp_path / "out", "--task", "size")
    assert (tmp_path / "out" / "labels.json").is_file()
    audited = road("audit").stdout
    assert "colour#1: label_accuracy, 20 rows" in audited
    assert "size#1: label_accuracy, 20 rows" in audited
    road("verify")


def test_what_needs_words_is_one_sentence_and_no_traceback(road):
    road("train", "colour", "size", *SETTINGS)
    told = road.refuses("merge", "--tasks", "colour,size", "--dry-run", code=2)
    expected = "needs a causal language model; the base of this workspace is a text encoder"
    assert expected in told
    told = road.refuses("merge", "--tasks", "colour,size", "--method", "routed", code=2)
    assert "`--method routed` reads probe prompts and needs a causal language model" in told
