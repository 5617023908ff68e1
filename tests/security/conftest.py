"""A workspace with an adapter and a task, and a check that nothing of it or around it changed."""

import hashlib
import sys
from pathlib import Path

import pytest
from small_workspaces import copied, make_workspace

sys.path.insert(0, str(Path(__file__).parent))


def state(folder):
    """Path -> digest or target of everything below, links not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path] = str(path.readlink())
        elif path.is_file():
            found[path] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def taught(tiny_base, tmp_path_factory):
    from lori_manager.teaching import TrainOptions

    folder = tmp_path_factory.mktemp("attacked")
    ws = make_workspace(folder / "w", tiny_base)
    for kind in ("lora", "prefix", "bottleneck"):
        ws.train(["colour"], ws.settings.config.replace(kind=kind), TrainOptions(line=f"a-{kind}"))
        ws.export(f"a-{kind}@1", folder / kind)
    return ws, folder


@pytest.fixture
def site(taught, tmp_path):
    """(workspace, folder with exports, all to be changed freely)."""
    import shutil

    ws = copied(taught[0], tmp_path / "ws")
    for kind in ("lora", "prefix", "bottleneck"):
        shutil.copytree(taught[1] / kind, tmp_path / "in" / kind)
    return ws, tmp_path / "in"


@pytest.fixture
def unchanged(site, tmp_path):
    """The store holds what it held, whole, and no other file came to be."""
    ws, _ = site
    before = {adapter.ref: adapter.digest for adapter in ws.store.adapters()}
    around, outside = set(tmp_path.parent.iterdir()), state(tmp_path)

    def check():
        assert {a.ref: a.digest for a in ws.store.adapters()} == before
        assert list(ws.verify()) == []
        assert set(tmp_path.parent.iterdir()) == around
        kept = {p for p in state(tmp_path) if (tmp_path / "ws") not in p.parents}
        assert kept <= outside.keys() | {p for p in kept if (tmp_path / "in") in p.parents}

    return check
