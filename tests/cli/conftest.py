"""Small workspaces to call commands in."""

import json
import shutil

import pytest
from calling import Lori

WORDS = {"colour": ("red", "blue"), "shape": ("box", "ball")}


def write_rows(path, task, count, offset=0):
    first, second = WORDS[task]
    rows = (
        {"prompt": f"{task} {offset + i}:", "completion": f" {second if i % 2 else first}"}
        for i in range(count)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def workspace_with_tasks(tiny_base, tmp_path_factory):
    """Two tasks of a few rows, nothing trained; rank 4 and few steps by default."""
    folder = tmp_path_factory.mktemp("workspaces") / "tasks"
    lori = Lori(folder)
    lori("init", folder, "--base", tiny_base)
    (folder / "lori.toml").write_text(
        "[defaults]\nrank = 4\nalpha = 8.0\nsteps = 4\ncalibration_steps = 2\nbatch = 8\n"
        "max_length = 64\n"
    )
    for task in WORDS:
        write_rows(folder / "tasks" / task / "train.jsonl", task, 24)
        write_rows(folder / "tasks" / task / "eval.jsonl", task, 8, 100)
        lori("add-task", task, "--probe-rows", 4)
    return folder


@pytest.fixture(scope="session")
def workspace_with_adapters(workspace_with_tasks, tmp_path_factory):
    """The two tasks with colour@1, shape@1 and the merge main@1."""
    folder = tmp_path_factory.mktemp("workspaces") / "adapters"
    shutil.copytree(workspace_with_tasks, folder)
    lori = Lori(folder)
    lori("train", "colour", "shape")
    lori("merge", "--tasks", "colour,shape")
    return folder


@pytest.fixture
def empty(tmp_path):
    """Commands in a folder that is no workspace."""
    return Lori(tmp_path)


@pytest.fixture
def lori(workspace_with_tasks, tmp_path):
    """Commands in a fresh copy of the workspace with two tasks."""
    return Lori(shutil.copytree(workspace_with_tasks, tmp_path / "ws"))


@pytest.fixture
def trained(workspace_with_adapters, tmp_path):
    """Commands in a fresh copy of the workspace with three adapters."""
    return Lori(shutil.copytree(workspace_with_adapters, tmp_path / "ws"))
