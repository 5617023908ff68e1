"""kill -9 in the middle of a training: nothing stored is lost, the same command goes on."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import killing
import pytest
import torch
from small_workspaces import copied
from stored import assert_nothing_is_lost, everything, results

TRAIN = ("train", "colour")
APART = (*TRAIN, "size", "--sequence", "apart", "--projection", "nullspace",
         "--nullspace-energy", "0.9")  # fmt: skip
REPLAYED = (*TRAIN, "size", "--sequence", "again", "--replay", "2")
SEQUENCE = ("train", "colour", "size", "--sequence", "both")
AT = {
    "training": ("training",),
    "storing": ("store/", "engine/codec", "engine/bits", "engine/container"),
    "scoring": ("scoring", "evaluation", "tasks/scorers", "metrics/"),
    "projecting": ("projecting", "avoiding", "engine/nullspace"),
    "replaying": ("replaying", "distillation"),
    "anywhere": ("",),
}


class Uninterrupted:
    """A command that was left alone: what it did, line by line, and what came of it."""

    def __init__(self, begun, folder, command, line):
        self.command, self.line = command, line
        workspace = copied(begun, folder / "ws")
        self.lines = killing.moments(workspace.root, folder / "trace", *command)
        self.results = results(workspace, line)
        assert self.results

    def moment(self, where, number):
        """The `number`th of the randomly chosen lines in the modules of `where`."""
        own = [i for i, module in enumerate(self.lines) if module.startswith(AT[where])]
        return random.Random(f"{where} {number}").choice(own)


@pytest.fixture(scope="module")
def training(begun, tmp_path_factory):
    return Uninterrupted(begun, tmp_path_factory.mktemp("training"), TRAIN, "colour")


@pytest.fixture(scope="module")
def apart(begun, tmp_path_factory):
    return Uninterrupted(begun, tmp_path_factory.mktemp("apart"), APART, "apart")


@pytest.fixture(scope="module")
def sequence(begun, tmp_path_factory):
    return Uninterrupted(begun, tmp_path_factory.mktemp("sequence"), SEQUENCE, "both")


@pytest.fixture(scope="module")
def replayed(begun, tmp_path_factory):
    return Uninterrupted(begun, tmp_path_factory.mktemp("replayed"), REPLAYED, "again")


def kill_and_go_on(ws, uninterrupted, moment):
    """Kill the command there, look at what it left, and run it again."""
    before = everything(ws)
    assert killing.killed(ws.root, moment, *uninterrupted.command)
    assert_nothing_is_lost(before, ws)
    ended = not ws.store.open_runs() and len(results(ws, uninterrupted.line)) > 0
    between = everything(ws)
    code = killing.lori(ws.root, *uninterrupted.command)
    assert_nothing_is_lost(between, ws)
    assert ws.store.open_runs() == []
    return code, ended


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("where", ["training", "storing", "scoring", "anywhere"])
def test_a_killed_training_loses_nothing_and_goes_on_to_the_same_digest(
    ws, training, where, number
):
    code, ended = kill_and_go_on(ws, training, training.moment(where, number))
    assert code == 0
    # Killed after the last thing to do, the command is a new one and trains a second time.
    assert results(ws, "colour") == training.results * (2 if ended else 1)


@pytest.mark.parametrize("where", ["training", "storing", "scoring", "anywhere"])
def test_a_killed_sequence_goes_on_to_the_same_stages_and_a_complete_r(ws, sequence, where):
    code, ended = kill_and_go_on(ws, sequence, sequence.moment(where, 0))
    assert code == (10 if ended else 0)
    assert results(ws, "both") == sequence.results
    (audited,) = ws.audit("both").sequences
    assert audited.stages == ("both@1", "both@2")
    assert all(value == value for row in (*audited.R, audited.base) for value in row)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("where", ["projecting", "training", "storing", "anywhere"])
def test_a_killed_sequence_of_nullspace_blocks_goes_on_to_the_same_ones(ws, apart, where, number):
    code, ended = kill_and_go_on(ws, apart, apart.moment(where, number))
    assert code == (10 if ended else 0)
    assert results(ws, "apart") == apart.results


@pytest.mark.parametrize("where", ["replaying", "training", "storing", "anywhere"])
def test_a_killed_sequence_that_replays_goes_on_to_the_same_stages(ws, replayed, where):
    code, ended = kill_and_go_on(ws, replayed, replayed.moment(where, 0))
    assert code == (10 if ended else 0)
    assert results(ws, "again") == replayed.results


def test_a_training_that_is_killed_again_and_again_gets_to_its_end(ws, training):
    """Each attempt dies after a quarter of what comes from the first checkpoint on."""
    first = training.lines.index("checkpoints")
    attempts = 0
    while killing.killed(ws.root, first + (len(training.lines) - first) // 4, *TRAIN):
        attempts += 1
        assert attempts < 10, "it does not get forward"
    assert attempts > 1
    assert results(ws, "colour") == training.results


def test_the_command_itself_killed_in_mid_training_goes_on_from_its_checkpoint(ws):
    """A process of its own and a signal from outside, at a time of its own."""
    command = [
        sys.executable, "-m", "lori_manager", "-C", str(ws.root), "-q",
        "train", "colour", "--steps", "80", "--json",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    before = everything(ws)
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(ws.store.runs.glob("*/0-training/*/manifest.json")):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert_nothing_is_lost(before, ws)
    assert len(ws.store.masks("colour")) == 1
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (made,) = json.loads(run.stdout)
    assert ws.store.open_runs() == []
    (whole,) = ws.train(["colour"], dataclasses.replace(ws.settings.config, steps=80))
    assert (made["adapter"]["ref"], whole.adapter.ref) == ("colour@1", "colour@2")
    assert made["adapter"]["digest"] == whole.adapter.digest
