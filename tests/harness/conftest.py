"""Harness tasks out of local files, with a cache of their own."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What `datasets` makes of the files goes with the test."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    from harness_tasks import write_tasks

    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")
