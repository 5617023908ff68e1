"""A disk that fills up in the middle of a training."""

import errno
import os

import pytest
from small_workspaces import copied
from stored import assert_nothing_is_lost, everything, results
from typer.testing import CliRunner

from lori_manager.errors import StorageFailed

EVERY = 3  # one write in so many is tried


class Disk:
    """Every write of a file ends in fsync; from the `room`th on there is no space for it."""

    def __init__(self, monkeypatch):
        self.room, self.writes, self.fsync = None, 0, os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, fd):
        self.writes += 1
        if self.room is not None and self.writes > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.fsync(fd)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture(scope="module")
def unhindered(begun, tmp_path_factory):
    workspace = copied(begun, tmp_path_factory.mktemp("unhindered") / "ws")
    workspace.train(["colour"])
    return results(workspace, "colour")


def test_wherever_the_disk_fills_up_nothing_is_lost_and_the_same_command_goes_on(
    begun, unhindered, disk, tmp_path
):
    failures = 0
    for room in range(0, 1000, EVERY):
        ws = copied(begun, tmp_path / str(room))
        before = everything(ws)
        disk.room, disk.writes = room, 0
        try:
            ws.train(["colour"])
            break
        except StorageFailed as e:
            failures += 1
            assert "no space left" in str(e)  # noqa: PT017 - the last round does not fail
        finally:
            disk.room = None
        assert_nothing_is_lost(before, ws)
        assert not list(ws.store.objects.leftovers())
        ws.train(["colour"])
        assert results(ws, "colour") == unhindered
        assert ws.store.open_runs() == []
        ws.close()
    assert failures > 5
    assert results(ws, "colour") == unhindered


def test_the_command_says_so_in_one_line_and_ends_with_9(ws, disk):
    from lori_manager.cli.app import app

    stored = type(ws.store).add_adapter

    def full(store, new, blob):
        disk.room, disk.writes = 0, 0
        return stored(store, new, blob)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(ws.store), "add_adapter", full)
        result = CliRunner().invoke(app, ["-C", str(ws.root), "-q", "train", "colour"])
    assert result.exit_code == 9
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "no space left" in result.stderr
    disk.room = None
    assert ws.store.line("colour").versions == 0
    assert [mask.ref for mask in ws.store.masks("colour")] == ["colour%1"]
    steps = []
    ws.on_progress = lambda p: steps.append(p.step) if p.phase.startswith("training") else None
    assert ws.train(["colour"])[0].adapter.ref == "colour@1"
    assert min(steps) == ws.settings.config.steps  # from the checkpoint before the last step
