"""`lori diff` and `lori blame` as people and programs meet them."""

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from lori_manager.records import NewScore
from lori_manager.workspace import Workspace


def put(folder, ref, outcomes, task="colour"):
    """Outcomes of right and wrong, as if a scorer had been asked in a precision of its own."""
    with Workspace.open(folder) as ws:
        digest = ws.store.base().fingerprint if ref == "base" else ws.adapter(ref).digest
        values = np.array(outcomes, np.float32)
        new = NewScore(ref, digest, task, 1, "exact_match", "1", "fp64", float(values.mean()), 0.1,
                       len(values), facts={"higher_is_better": True})  # fmt: skip
        ws.store.add_score(new, values)


@pytest.fixture
def flipped(trained):
    """Of eight rows one was lost and one won, by made-up outcomes."""
    put(trained.folder, "colour@1", [1, 1, 1, 0, 0, 1, 1, 1])
    put(trained.folder, "main@1", [1, 0, 1, 0, 1, 1, 1, 1])
    return trained


def test_diff_tells_changes_scores_and_flipped_rows(flipped):
    told = flipped("diff", "colour@1", "main@1", "--no-answers").stdout
    lines = told.splitlines()
    assert lines[0] == "colour@1 -> main@1"
    assert lines[1] == "note: colour@1 is a member of main@1"
    words = [line.split() for line in lines]
    assert ["origin", "trained", "merged"] in words
    assert ["colour", "-", "0.5", "colour@1"] in words
    assert ["shape", "-", "shape#1"] in words
    scores = next(line for line in lines if line.startswith("colour#1  "))
    assert scores.split()[:7] == ["colour#1", "0.750", "+-", "0.100", "0.750", "+-", "0.100"]
    assert "\ncolour#1: rows that flipped\n" in told
    lost = told.partition("row 1  ")[2]
    assert lost.split("\n")[0].endswith("  worse")
    assert [line.strip() for line in lost.split("\n")[1:5]] == [
        "prompt    colour 101:", 'expected  " blue"', 'colour@1  " blue"', "main@1    -",
    ]  # fmt: skip


def test_diff_asks_the_model_once_and_says_so(flipped):
    first = flipped("diff", "colour@1", "main@1", "--task", "colour")
    assert "main@1 answers 1 row of colour#1, to be kept" in first.stderr
    assert "main@1    -" not in first.stdout
    second = flipped("diff", "colour@1", "main@1", "--task", "colour")
    assert "answers" not in second.stderr
    assert second.stdout == first.stdout


def test_long_prompts_show_their_end_and_whole_ones_their_lines(trained):
    prompt = "first line\n" + "x" * 300 + "\x1b[31m the end:"
    rows = [{"prompt": f"{prompt} {i}", "completion": " red"} for i in range(4)]
    path = trained.folder / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained("add-task", "long", "--eval", path)
    put(trained.folder, "colour@1", [1, 0, 0, 0], "long")
    put(trained.folder, "main@1", [0, 0, 0, 0], "long")
    call = ("diff", "colour@1", "main@1", "--task", "long", "--no-answers")
    short = trained(*call).stdout
    (line,) = [line for line in short.splitlines() if line.startswith("  prompt")]
    assert line.startswith("  prompt    ...xxx")
    assert line.endswith(" the end: 0")
    assert len(line) < 180
    full = trained(*call, "--full").stdout
    assert "  prompt    first line\n            xxx" in full
    assert "\x1b" not in short + full


def test_diff_is_a_document_for_programs(flipped):
    told = flipped.json("diff", "colour@1", "main@1", "--no-answers", "--rows", 1)
    assert (told["before"], told["after"]) == ("colour@1", "main@1")
    (colour,) = [task for task in told["tasks"] if task["task"] == "colour#1"]
    assert (colour["lost"], colour["gained"], len(colour["flips"])) == (1, 1, 1)
    assert colour["flips"][0]["prompt"] == "colour 101:"
    assert colour["difference"]["low"] < 0 < colour["difference"]["high"]
    assert {change["kind"] for change in told["changes"]} >= {"adapter", "member", "data"}


def fits(name, found):
    """The document against the schema that is shipped."""
    schema = json.loads((files("lori_manager") / "schemas" / f"{name}.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(found)
    return found


def test_the_documents_fit_the_schemas_that_are_shipped(flipped):
    flipped("train", "colour", "shape", "--sequence", "both")
    flipped("merge", "--tasks", "colour,shape", "--method", "routed", "--into", "all")
    for before, after in (("colour@1", "main@1"), ("base", "both@2"), ("base", "shape@1")):
        assert fits("diff", flipped.json("diff", before, after))["changes"]
    for ref, kind in (("main@1", "merge"), ("both@2", "stages"), ("all@1", "routed")):
        found = fits("blame", flipped.json("blame", ref, "--task", "colour"))
        assert (found["kind"], found["version"]) == (kind, 1)
    text = (Path(__file__).parents[2] / "docs" / "json.md").read_text("utf-8")
    assert "`lori-diff`" in text
    assert "`lori-blame`" in text


def test_diff_of_two_that_differ_in_nothing(trained):
    told = trained("diff", "main@1", "main@latest").stdout
    assert "main@1 and main@1 have the same weights" in told
    assert "made alike" in told


def test_blame_of_a_merge_tells_every_member_and_is_quick_again(trained):
    first = trained("blame", "main@1", "--task", "shape", "--halve")
    assert "2 merges to make and score on 8 rows of shape#1" in first.stderr
    told = first.stdout
    assert told.splitlines()[1].startswith("shape#1  shape@1  ")
    dropped = told.partition("main@1 without one member\n")[2].splitlines()
    assert dropped[0].split()[:3] == ["member", "taught", "weight"]
    assert dropped[1].split()[:3] == ["colour@1", "colour", "0.5"]
    assert "main@1 with one member at half its weight" in told
    assert told.endswith("\nshape has lost nothing beyond noise\n")
    second = trained("blame", "main@1", "--task", "shape", "--halve")
    assert second.stderr == ""
    assert second.stdout == told
    document = trained.json("blame", "main@1", "--task", "shape", "--halve")
    assert [s["how"] for s in document["suspects"]] == ["dropped", "halved"]


def test_blame_of_a_sequence_names_the_stage(trained):
    trained("train", "colour", "shape", "--sequence", "both")
    put(trained.folder, "both@1", [1] * 8)
    put(trained.folder, "both@2", [0] * 8)
    told = trained("blame", "both@2", "--task", "colour").stdout
    assert "colour at every stage since both@1" in told
    (stage,) = [line for line in told.splitlines() if line.startswith("both@2 ")]
    assert stage.split()[:5] == ["both@2", "shape", "0.000", "+-", "0.100"]
    assert stage.endswith("cause")
    assert told.endswith("\ncolour was lost most at both@2\n")


def test_blame_of_a_routed_merge_tells_where_prompts_went(trained):
    trained("merge", "--tasks", "colour,shape", "--method", "routed", "--into", "all")
    told = trained("blame", "all@1", "--task", "shape").stdout
    assert "one member acts on each prompt" in told
    assert "held-out probe prompts of shape, by where they go" in told


@pytest.mark.parametrize(
    "call", [("blame", "main@1", "--task", "shape"), ("diff", "colour@1", "main@1")]
)
def test_the_second_time_not_even_torch_is_loaded(flipped, call):
    first = flipped(*call).stdout
    with Workspace.open(flipped.folder) as ws, ws.store._db.write() as connection:
        # The made-up scores are of a precision of their own.
        connection.exec_driver_sql("UPDATE answers SET precision = 'fp64', encoding = ''")
    watch = (
        "import sys\nfrom lori_manager.cli.app import app\n"
        "try:\n    app(sys.argv[1:], prog_name='lori')\nexcept SystemExit as e:\n"
        "    assert e.code in (0, None), e.code\n"
        "print('loaded:', *{'torch', 'transformers', 'peft'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", watch, "-C", str(flipped.folder), *call],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == first + "loaded:\n"


def test_what_cannot_be_compared_is_refused_in_one_line(trained):
    assert "'nowhere'" in trained.refuses("diff", "main@1", "nowhere@1", code=4)
    assert "made in one step" in trained.refuses("blame", "colour@1", "--task", "shape", code=2)
    assert "`rows`" in trained.refuses("diff", "main@1", "base", "--rows", -1, code=2)
