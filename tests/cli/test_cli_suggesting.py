"""`lori suggest` as people and programs meet it."""

import pytest

from lori_manager.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")


def test_suggest_tells_probes_reasons_and_the_command_and_applies_it(lori):
    told = lori("suggest", "colour", "--budget-minutes", "2", "--steps", "12", "--apply").stdout
    assert "Another machine gets to other probes in that time." in told
    lines = told.splitlines()
    command = next(line for line in lines if line.startswith("lori train colour --kind lori"))
    assert lines[-1].split()[:2] == ["colour@1", "colour#1"]
    with Workspace.open(lori.folder) as ws:
        config = ws.adapter("colour@1").config
    flags = dict(zip(command.split()[3::2], command.split()[4::2], strict=True))
    assert str(config["rank"]) == flags["--rank"]
    assert f"{config['learning_rate']:g}" == flags["--learning-rate"]


def test_as_a_document(lori):
    found = lori.json("suggest", "colour", "--budget-minutes", "2", "--steps", "10")
    assert found["command"].startswith("lori train colour --kind lori")
    assert found["trained"] == []
    assert {p["what"] for p in found["suggestion"]["probes"]} >= {"time", "rate"}


def test_what_cannot_be_is_one_line(lori):
    said = lori.refuses("suggest", "colour", "--budget-minutes", "0", code=2)
    assert "budget must be above 0" in said
    assert "no task" in lori.refuses("suggest", "nothing", code=4)
