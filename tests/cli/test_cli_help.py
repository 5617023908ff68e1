"""What the command line says of itself, and what it leaves unloaded."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lori_manager import __version__
from lori_manager.cli.app import COMMANDS
from lori_manager.cli.settings import TRAINING
from lori_manager.combining import methods
from lori_manager.errors import LoriError
from lori_manager.merging.methods import option_names, options_of

README = Path(__file__).parents[2] / "README.md"
HEAVY = ("torch", "transformers", "peft", "numpy", "alembic")
WATCH = """
import sys
from lori_manager.cli.app import app
try:
    app(sys.argv[1:], prog_name="lori")
except SystemExit as e:
    assert e.code in (0, None), e.code
print("loaded:", *sorted(set({heavy!r}) & set(sys.modules)))
"""


def test_help_lists_every_command(empty):
    told = empty("--help").stdout
    named = [line.split()[0] for line in told.partition("Commands:\n")[2].splitlines()]
    assert named == list(COMMANDS)


@pytest.mark.parametrize("command", [*COMMANDS, "score add", "db upgrade"])
def test_every_command_explains_itself(empty, command):
    told = empty(*command.split(), "--help").stdout
    assert told.startswith(f"Usage: lori {command} ")
    assert "\x1b" not in told


def test_help_of_score_shows_both_ways_to_call_it(empty):
    told = empty("score", "--help").stdout
    assert "REF... | add REF" in told
    assert "--tasks" in told
    assert "\n  add " in told


def test_help_of_train_has_an_option_for_every_setting_of_lori_toml(empty):
    told = empty("train", "--help").stdout
    for key in TRAINING:
        assert f"--{key.replace('_', '-')}" in told


@pytest.mark.parametrize(
    "command", ["place", "train", "calibrate", "score", "merge", "diff", "blame"]
)
def test_whatever_loads_the_base_can_be_told_its_precision_and_bits(empty, command):
    told = empty(command, "--help").stdout
    assert "--precision" in told
    assert "--base-bits" in told


def test_help_of_merge_has_an_option_for_everything_that_methods_may_be_told(empty):
    told = empty("merge", "--help").stdout
    for key in (
        *option_names(),
        "from",
        "drop",
        "reweight",
        "general_text",
        "probe_rows",
        "list_methods",
    ):
        assert f"--{key.replace('_', '-')} " in told, key
    assert "--replay " in empty("train", "--help").stdout


def test_help_of_merge_and_the_list_of_methods_say_which_takes_what(empty):
    told = " ".join(empty("merge", "--help").stdout.split())
    lines = empty("merge", "--list-methods").stdout.splitlines()[1:]
    assert len(lines) == len(list(methods()))
    for entry, line in zip(methods(), lines, strict=True):
        own = [option.replace("_", "-") for option in options_of(entry)]
        assert line.startswith(f"{entry.name} ")
        assert line.rstrip().endswith(f"  {' '.join(own) or 'none'}")
    for option in option_names():
        taking = {entry.name for entry in methods() if option in options_of(entry)}
        assert taking, f"no method takes {option}"
        if option != "max_rank":  # whose help would be a list of nearly all
            help_ = re.search(rf"--{option} <[a-z]+> ([^:]*):", told)
            assert set(help_[1].split(", ")) == taking, option


def test_the_readme_tells_of_every_merge_method_and_of_no_option_that_is_not_there(empty):
    text = re.sub(r"```.*?```", "", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    code = " ".join(re.findall(r"`([^`]+)`", text)).replace("\n", " ").split()
    listed = empty("merge", "--list-methods").stdout.splitlines()[1:]
    for name in ("auto", *(line.split()[0] for line in listed)):
        assert name in code, name
    for command in ("merge", "train"):
        told = empty(command, "--help").stdout
        for line in re.findall(rf"`lori {command} ([^`]*)`", text):
            for option in re.findall(r"--[a-z-]+", line):
                assert f"{option} " in told, (command, option)


def test_help_names_every_exit_code(empty):
    told = " ".join(empty("--help").stdout.split())
    for error in LoriError.__subclasses__():
        assert f" {error.exit_code} " in told.partition("Exit codes:")[2]


def test_version_is_told_outside_a_workspace(empty):
    assert empty("--version").stdout == f"lori {__version__}\n"


def test_unknown_commands_and_options_end_with_2(empty):
    assert "train" in empty("trian", code=2).stderr
    assert "--sparse" in empty("train", "colour", "--sparse", code=2).stderr
    assert "--rank" in empty("train", "colour", "--rank", "many", code=2).stderr
    assert "REF" in empty("score", code=2).stderr


@pytest.mark.parametrize("command", ["--help", "tasks", "lines", "log", "alias", "show base"])
def test_what_reads_only_the_registry_loads_neither_torch_nor_numpy(workspace_with_tasks, command):
    run = subprocess.run(
        [sys.executable, "-c", WATCH.format(heavy=HEAVY), *command.split()],
        cwd=workspace_with_tasks,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines()[-1] == "loaded:"


def complete(folder, words):
    run = subprocess.run(
        [sys.executable, "-m", "lori_manager"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={
            "_LORI_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
            "PATH": "",
        },
        check=False,
    )
    assert run.stderr == ""
    return run.stdout.split()


def test_completion_offers_names_out_of_the_workspace(workspace_with_adapters):
    assert complete(workspace_with_adapters, "lori train c") == ["colour"]
    assert complete(workspace_with_adapters, "lori merge --tasks colour,s") == ["colour,shape"]
    offered = complete(workspace_with_adapters, "lori show ma")
    assert offered == ["main", "main@1"]
    assert complete(workspace_with_adapters, "lori score a") == ["add"]
    assert complete(workspace_with_adapters, "lori add-task x --scorer per") == ["perplexity"]


def test_completion_offers_nothing_where_there_is_no_workspace(tmp_path):
    assert complete(tmp_path, "lori train c") == []
