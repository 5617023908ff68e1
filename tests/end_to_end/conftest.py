"""A workspace to interrupt things in, and the real base."""

import importlib.util
from pathlib import Path

import pytest
from small_workspaces import copied, make_workspace

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module", autouse=True)
def own_cache():
    """The real base lies in the cache of whoever runs these."""


@pytest.fixture(scope="session")
def base_folder():
    """The demo's own base, out of its cache or fetched as the demo does."""
    spec = importlib.util.spec_from_file_location("fetch_base", EXAMPLES / "fetch_base.py")
    fetch_base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fetch_base)
    return fetch_base.base_folder()


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
