"""A workspace to interrupt things in, and what it was before."""

import pytest
from small_workspaces import copied, make_workspace


@pytest.fixture(scope="session")
def begun(tiny_base, tmp_path_factory):
    """shape@1, scored and named; a checkpoint after every step. Not to be changed."""
    folder = tmp_path_factory.mktemp("begun") / "ws"
    workspace = make_workspace(folder, tiny_base, checkpoint_seconds=0.0)
    workspace.train(["shape"])
    workspace.score(["base", "shape"])
    workspace.set_alias("shape@1", "good")
    return workspace


@pytest.fixture
def ws(begun, tmp_path):
    """A fresh copy."""
    return copied(begun, tmp_path / "ws")
