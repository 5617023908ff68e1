"""An unfinished training is given up: its checkpoints go, what it stored stays."""

import pytest
from small_workspaces import make_workspace

from lori_manager.errors import Conflict, NotFound
from lori_manager.teaching import held_lock


class Stopped(Exception):
    """The interruption."""


@pytest.fixture
def begun(tiny_base, tmp_path):
    ws = make_workspace(tmp_path / "w", tiny_base)

    def stop(state):
        if state.phase == "training size":
            raise Stopped

    ws.on_progress = stop
    with pytest.raises(Stopped):
        ws.train(["colour", "size"])
    ws.on_progress = lambda state: None
    return ws


def test_its_versions_can_be_removed_and_the_same_command_begins_anew(begun):
    (run,) = begun.store.open_runs()
    with pytest.raises(Conflict, match="the unfinished training"):
        begun.remove(["colour@1"])
    assert begun.abandon(run.id[:6]).id == run.id
    assert begun.store.open_runs() == []
    assert not (begun.store.runs / run.id).exists()
    assert begun.adapter("colour@1").version == 1
    begun.remove(["colour@1"])
    trained = begun.train(["colour", "size"])
    assert [one.adapter.ref for one in trained] == ["colour@2", "size@1"]


def test_one_at_work_is_left(begun):
    (run,) = begun.store.open_runs()
    lock = held_lock(begun.store.runs / run.id / "lock", "a test")
    try:
        with pytest.raises(Conflict):
            begun.abandon(run.id)
    finally:
        lock.release()
    assert begun.store.open_runs() == [run]


@pytest.mark.parametrize("name", ["", "zz"])
def test_what_is_none_is_told_with_those_there_are(begun, name):
    with pytest.raises(NotFound, match=r"there are: [0-9a-f]{8} \(colour#1 size#1\)"):
        begun.abandon(name)


def test_the_command_says_what_it_gave_up(begun):
    from typer.testing import CliRunner

    from lori_manager.cli.app import app

    (run,) = begun.store.open_runs()
    said = CliRunner().invoke(app, ["-C", str(begun.root), "db", "abandon", run.id[:8]])
    assert said.exit_code == 0
    assert said.stdout == f"given up: the training {run.id[:8]} of colour#1 size#1\n"
