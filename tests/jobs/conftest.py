"""Small workspaces in which nothing is trained, saved after every step."""

import pytest
from small_workspaces import copied, make_workspace


@pytest.fixture(scope="session")
def untrained(tiny_base, tmp_path_factory):
    """Three tasks; not to be changed."""
    folder = tmp_path_factory.mktemp("jobs") / "ws"
    return make_workspace(folder, tiny_base, checkpoint_seconds=0.0)


@pytest.fixture
def ws(untrained, tmp_path):
    """A fresh copy."""
    return copied(untrained, tmp_path / "ws")


@pytest.fixture
def other(untrained, tmp_path):
    """Another fresh copy."""
    return copied(untrained, tmp_path / "other")
