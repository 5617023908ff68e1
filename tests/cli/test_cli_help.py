"""What the command line says of itself, and what it leaves unloaded."""

import subprocess
import sys

import pytest

from lori_manager import __version__
from lori_manager.cli.app import COMMANDS
from lori_manager.cli.settings import TRAINING
from lori_manager.errors import LoriError

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


@pytest.mark.parametrize("command", ["train", "calibrate", "score", "merge"])
def test_whatever_loads_the_base_can_be_told_its_precision_and_bits(empty, command):
    told = empty(command, "--help").stdout
    assert "--precision" in told
    assert "--base-bits" in told


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
    assert complete(workspace_with_adapters, "lori add-task x --scorer p") == ["perplexity"]


def test_completion_offers_nothing_where_there_is_no_workspace(tmp_path):
    assert complete(tmp_path, "lori train c") == []
