"""Small workspaces on the tiny base, made through the Python API."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lori_manager.workspace import Workspace

WORDS = {"colour": ("red", "blue"), "shape": ("box", "ball"), "size": ("big", "tiny")}
DEFAULTS: dict[str, Any] = {
    "rank": 4,
    "alpha": 8.0,
    "steps": 4,
    "batch": 8,
    "max_length": 64,
}


def write_rows(path: Path, task: str, count: int, offset: int = 0) -> Path:
    """Rows whose completion follows from the last digit of the prompt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        {"prompt": f"{task} {offset + i}:", "completion": f" {WORDS[task][i % 2]}"}
        for i in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_workspace(folder: Path, base: Path, **settings: Any) -> Workspace:
    """The three tasks of a few rows each, nothing trained."""
    workspace = Workspace.create(folder, str(base))
    lines = [f"{key} = {json.dumps(value)}" for key, value in (DEFAULTS | settings).items()]
    (folder / "lori.toml").write_text("[defaults]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    for task in WORDS:
        write_rows(folder / "tasks" / task / "train.jsonl", task, 24)
        write_rows(folder / "tasks" / task / "eval.jsonl", task, 8, 100)
        workspace.add_task(task, probe_rows=4)
    return workspace


def copied(workspace: Workspace, folder: Path) -> Workspace:
    """A copy to change freely; it borrows the loaded base, which is never changed."""
    shutil.copytree(workspace.root, folder)
    copy = Workspace.open(folder)
    copy._model = workspace._model
    return copy


def object_file(workspace: Workspace, digest: str) -> Path:
    """Where the store keeps an object."""
    return workspace.store.objects.path(digest)
