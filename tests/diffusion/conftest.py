"""A tiny pipeline for all tests of images."""

import pytest
from tiny_pipeline import make_pipeline, write_images

from lori_manager.workspace import Workspace

SETTINGS = """[defaults]
targets = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
rank = 4
alpha = 8.0
batch = 4
steps = 4
calibration_steps = 2
score_batch = 16
"""


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return {
        "water": write_images(root / "water", "water", 10),
        "oil": write_images(root / "oil", "oil", 8, metadata=True),
    }


@pytest.fixture(scope="session")
def taught(tmp_path_factory, pipeline, folders):
    """Two styles, each trained; not to be changed."""
    folder = tmp_path_factory.mktemp("styles") / "ws"
    with Workspace.create(folder, str(pipeline)) as ws:
        (folder / "lori.toml").write_text(SETTINGS, encoding="utf-8")
        for name, images in folders.items():
            ws.add_image_task(name, images, eval_share=0.4)
        ws.train(["water", "oil"])
        yield ws


@pytest.fixture
def styles(taught, tmp_path):
    """A copy to change freely; it borrows the loaded pipeline."""
    import shutil

    shutil.copytree(taught.root, tmp_path / "ws")
    with Workspace.open(tmp_path / "ws") as copy:
        copy._pipeline = taught._pipeline
        yield copy
