"""`lori compare` as people and programs meet it."""

import xml.etree.ElementTree as ET

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = ("--seeds", 1, "--rates", 2, "--steps", 4, "--calibration-steps", 2, "--rank", 4)


def test_compare_tells_a_table_a_document_and_a_drawing(lori, tmp_path):
    drawn = tmp_path / "kinds.svg"
    call = ("compare", "colour", "--kinds", "lora,rslora", *FEW, "--plot", drawn)
    told = lori(*call).stdout.splitlines()
    assert told[0].startswith("colour#1: exact_match, 8 rows; 4 steps each, on cpu")
    assert told[1].split("  ")[0] == "kind"
    assert [line.split()[0] for line in told[2:4]] == ["lora", "rslora"]
    assert "ties lora" in told[3]
    assert told[-1].startswith("rate: the best of 2 by the loss on held-out training rows after 1 "
                               "step, settled by at most 3 of all 4; p")  # fmt: skip
    ET.fromstring(drawn.read_text())
    found = lori.json(*call)
    assert [k["adapters"] for k in found["kinds"]] == [["colour.lora@1"], ["colour.rslora@1"]]
    assert found["kinds"][1]["against"]["verdict"] == "ties"
    assert [c["digest"] for c in lori.json("compare", "--list")] == [found["digest"]]
    assert lori("compare", "colour", "--list").stdout.splitlines()[:4] == told[:4]
    assert lori.json("compare", "shape", "--list") == []
    assert "Kinds of adapters compared" in _page(lori, tmp_path)


def _page(lori, folder):
    lori("report", "-o", folder / "report.html")
    return (folder / "report.html").read_text()


def test_a_spent_budget_is_told_with_what_is_missing(lori):
    told = lori("compare", "colour", "--kinds", "lora,lori", *FEW, "--budget-minutes", 1e-9)
    assert told.stdout.splitlines()[-2:] == [
        "not done: lora: 0 of 2 rates tried, nothing trained; the same command goes on",
        "not done: lori: 0 of 2 rates tried, nothing trained; the same command goes on",
    ]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ((), "name a task to compare kinds on"),
        (("colour", "--kinds", "lora,mora"), "no kind is called 'mora'"),
        (("colour", "--budget-minutes", "-1"), "budget must be above 0"),
        (("colour", "--rates", "0"), "rates to try must be from 1 to 20"),
        (("colour", "--full-rates", "1"), "at full length must be 0 or from 2"),
    ],
)
def test_what_cannot_be_compared_is_one_line(lori, args, told):
    assert told in lori.refuses("compare", *args, code=2)


def test_a_plot_that_cannot_be_written_is_refused_before_anything_trains(lori, tmp_path):
    nowhere = ("compare", "colour", "--plot", tmp_path / "none" / "a.svg")
    assert "there is no folder" in lori.refuses(*nowhere, code=2)
    assert lori.json("compare", "--list") == []


def test_an_unknown_task_is_not_found(lori):
    assert "no task is called 'size'" in lori.refuses("compare", "size", code=4)


def test_a_plot_of_several_comparisons_is_refused(lori, tmp_path):
    message = lori.refuses("compare", "--list", "--plot", tmp_path / "a.svg", code=2)
    assert "--plot draws one comparison" in message
