"""Scorers on the command line: harness tasks, programs, and functions of the user's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[1] / "harness"


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder of local harness tasks."""
    monkeypatch.syspath_prepend(str(HARNESS))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets
    from harness_tasks import write_tasks

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return write_tasks(tmp_path / "tasks", rows=6)


def test_a_harness_task_is_added_and_scored(lori, tasks, monkeypatch):
    monkeypatch.chdir(tasks.parent)
    asked = ("--lm-eval", "tiny_choice", "--lm-eval-include", "tasks")
    added = lori.json("add-task", "quiz", *asked)
    task = added["added"]["task"]
    assert task["scorer"] == "lm_eval:acc"
    assert task["splits"]["eval"]["rows"] == 6
    again = lori("add-task", "quiz", *asked)
    assert "task quiz#1 (unchanged), scored by lm_eval:acc" in again.stdout
    options = ("--lm-eval-metric", "acc_norm", "--lm-eval-limit", "4")
    new = lori(
        "add-task", "quiz", "--lm-eval", "tiny_choice", "--lm-eval-include", "tasks", *options
    )
    assert "task quiz#2 (new), scored by lm_eval:acc_norm" in new.stdout
    (score,) = lori.json("score", "base", "--tasks", "quiz")
    assert (score["scorer"], score["rows"], score["facts"]["unit"]) == (
        "lm_eval:acc_norm",
        4,
        "share",
    )


def test_a_harness_task_may_stand_in_lori_toml(lori, tasks):
    (lori.folder / "mine").mkdir()
    for path in tasks.iterdir():
        (lori.folder / "mine" / path.name).write_text(path.read_text())
    with (lori.folder / "lori.toml").open("a") as file:
        file.write(
            '\n[tasks.quiz]\nlm_eval = "tiny_shots"\nlm_eval_include = "mine"\n'
            'lm_eval_metric = "acc_norm"\nlm_eval_fewshot = 1\nlm_eval_limit = 3\n'
        )
    task = lori.json("add-task", "quiz")["added"]["task"]
    assert task["scorer"] == "lm_eval:acc_norm"
    told = task["options"]["lm_eval"]
    assert (told["include"], told["fewshot"], told["limit"]) == ("mine", 1, 3)
    # A workspace that has moved finds its folder again.
    moved = lori.folder.with_name("moved")
    lori.folder.rename(moved)
    lori.folder = moved
    (score,) = lori.json("score", "base", "--tasks", "quiz")
    assert score["rows"] == 3


def test_what_does_not_go_with_a_harness_task_is_refused(lori, tasks):
    asked = ("--lm-eval", "tiny_choice", "--lm-eval-include", tasks)
    assert "leave --eval and --scorer out" in lori.refuses(
        "add-task", "quiz", *asked, "--scorer", "exact_match", code=2
    )
    assert "--lm-eval-metric needs --lm-eval TASK" in lori.refuses(
        "add-task", "quiz", "--lm-eval-metric", "acc", code=2
    )
    assert "has no metric 'f1'; it has acc, acc_norm" in lori.refuses(
        "add-task", "quiz", *asked, "--lm-eval-metric", "f1", code=2
    )
    assert "is a group of harness tasks" in lori.refuses(
        "add-task", "quiz", "--lm-eval", "tiny_group", "--lm-eval-include", tasks, code=2
    )
    with (tasks / "functions.py").open("a") as file:
        file.write("# another\n")
    judged = ("--lm-eval", "tiny_judged", "--lm-eval-include", tasks)
    lori("add-task", "quiz", *judged)
    with (tasks / "functions.py").open("a") as file:
        file.write("# another still\n")
    refused = lori.refuses("score", "base", "--tasks", "quiz", code=2)
    assert "is not what it was when its rows were frozen" in refused
    lori("add-task", "quiz", *judged)
    lori("score", "base", "--tasks", "quiz")


def test_programs_run_when_asked_for_on_the_line_or_in_lori_toml(lori):
    rows = [{"prompt": f"p{i}", "completion": "x", "tests": "assert True"} for i in range(2)]
    (lori.folder / "code.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    lori("add-task", "code", "--eval", lori.folder / "code.jsonl", "--scorer", "pass_at_1")
    assert "give --run-code" in lori.refuses("score", "base", "--tasks", "code", code=2)
    toml = lori.folder / "lori.toml"
    text = toml.read_text()
    toml.write_text(text.replace("[defaults]\n", "[defaults]\nrun_code = true\n"))
    off = lori.refuses("score", "base", "--tasks", "code", "--no-run-code", code=2)
    assert "which is off" in off
    (score,) = lori.json("score", "base", "--tasks", "code")
    assert score["scorer"] == "pass_at_1"
    toml.write_text(text)
    assert lori.json("score", "base", "--tasks", "code", "--run-code") == [score]
    toml.write_text(text.replace("[defaults]\n", "[defaults]\nrun_code = 1\n"))
    assert "`run_code` must be true or false" in lori.refuses("score", "base", code=2)


def test_a_row_without_tests_is_refused_by_file_and_line(lori):
    path = lori.folder / "code.jsonl"
    path.write_text('{"prompt": "p", "completion": "c", "tests": "assert f()"}\n'
                    '{"prompt": "q", "completion": "c"}\n')  # fmt: skip
    told = lori.refuses("add-task", "code", "--eval", path, "--scorer", "pass_at_1", code=5)
    assert "code.jsonl, line 2: `pass_at_1` needs `tests`" in told


def test_a_function_of_the_users_own_by_name(lori):
    (lori.folder / "own.py").write_text("def longest(text, row):\n    return len(text)\n")
    toml = lori.folder / "lori.toml"
    said = '\n[scorers]\nlong = {function = "own.py:longest", unit = "letters", new_tokens = 3}\n'
    toml.write_text(toml.read_text() + said)
    rows = lori.folder / "tasks" / "colour" / "eval.jsonl"
    lori("add-task", "lengths", "--eval", rows, "--scorer", "long")
    (score,) = lori.json("score", "base", "--tasks", "lengths")
    assert (score["scorer"], score["facts"]["unit"]) == ("long", "letters")
    (lori.folder / "own.py").write_text("def longest(text, row):\n    return row\n")
    told = lori.refuses("score", "base", "--tasks", "lengths", code=5)
    assert "scorer `long` said Row(" in told
    toml.write_text(toml.read_text().replace("longest", "shortest"))
    told = lori.refuses("score", "base", "--tasks", "lengths", code=4)
    assert "defines no function 'shortest'" in told


def test_help_names_what_there_is(empty):
    told = " ".join(empty("add-task", "--help").stdout.split())
    for option in ("", "-include", "-metric", "-fewshot", "-limit"):
        assert f"--lm-eval{option} " in told
    assert "--run-code" in empty("score", "--help").stdout
    assert "--run-code" in empty("train", "--help").stdout


@pytest.mark.parametrize("command", [["--help"], ["add-task", "--help"], ["score", "--help"]])
def test_help_loads_neither_the_harness_nor_the_libraries(command):
    code = (
        "import sys\nfrom lori_manager.cli.app import app\n"
        "try: app(sys.argv[1:], prog_name='lori')\nexcept SystemExit: pass\n"
        "print(*{'lm_eval', 'datasets', 'rouge_score', 'sacrebleu', 'nltk'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True,
        env=os.environ,
    )  # fmt: skip
    assert run.stdout.splitlines()[-1] == ""
