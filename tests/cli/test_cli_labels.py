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


def test_kinds_are_compared_layers_placed_settings_suggested_and_costs_measured(road, tmp_path):
    few = ("--seeds", 1, "--rates", 1, "--kinds", "lori,lora", *SETTINGS)
    told = road("compare", "colour", *few, "--plot", tmp_path / "kinds.svg").stdout.splitlines()
    assert told[0].startswith("colour#1: label_accuracy, 20 rows; 6 steps each, on cpu")
    assert [line.split()[0] for line in told[2:4]] == ["lori", "lora"]
    assert "label_accuracy on colour#1" in (tmp_path / "kinds.svg").read_text()
    message = road.refuses("compare", "colour", "--kinds", "lora,prefix", code=2)
    assert "kind `prefix` needs a causal language model" in message

    told = road("place", "colour", "--top", 2, "--plot", tmp_path / "placed.svg").stdout
    assert {line.split()[0] for line in told.splitlines()[1:7]} == {
        "query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense",
    }  # fmt: skip
    assert "answer this task's texts least" in told
    found = road.json("place", "colour")
    read = f"{found['prompts']} texts, {found['tokens']} tokens, seed 0"
    assert read in (tmp_path / "placed.svg").read_text()

    told = road("suggest", "colour", "--budget-minutes", 1, *SETTINGS).stdout
    assert "held-out rows, the labels' shares alone 0." in told
    assert told.splitlines()[-1].startswith("lori train colour --kind lori --rank ")

    told = road("bench", "colour.lori@1", "--rows", 2, "--repeats", 1).stdout.splitlines()
    assert told[0].endswith("tokens in all; medians of 1")
    assert ": 2 rows together, " in told[0]
    assert told[1].split("  ")[0] == "adapter"
    assert "the batch" in told[1]
    assert "token" not in told[1]
    assert [line.split()[:2] for line in told[2:5]] == [
        ["base", "alone"], ["colour.lori@1", "apart"], ["colour.lori@1", "merged"],
    ]  # fmt: skip
    message = road.refuses("bench", "colour.lori@1", "--tokens", 3, code=2)
    assert "`--tokens` needs a causal language model" in message
