"""`lori train --jobs` through Ray, started for it on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from small_workspaces import copied

pytest.importorskip("ray", reason='--jobs needs ray: pip install "lori-manager[ray]"')

TASKS = ["size", "colour", "shape"]
LONG = ["--steps", "400"]


def begin(ws, *args, **more):
    return subprocess.Popen(
        [sys.executable, "-m", "lori_manager", "-C", str(ws.root), "train", *TASKS, *args],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | more,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # some parents ignore it
    )  # fmt: skip


def in_training(ws, running, jobs):
    """Wait until so many jobs have saved a checkpoint of their training; their processes."""
    deadline = time.monotonic() + 240
    while True:
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        found = {}
        for told in ws.store.runs.glob("*/job-*.json"):
            stage = int(told.stem.removeprefix("job-"))
            if list(told.parent.glob(f"{stage}-training*")):
                found[stage] = json.loads(told.read_text())["process"]
        if len(found) >= jobs:
            return found
        time.sleep(0.05)


def gone(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def in_time(happened):
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def listening(mark):
    """Addresses, in hex as the kernel tells them, that processes with `mark` listen on."""
    sockets = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                sockets |= {os.readlink(fd) for fd in (process / "fd").iterdir()}
        except OSError:  # it has ended, or one of its files was closed
            continue
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            own, state, inode = line.split()[1], line.split()[3], line.split()[9]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                found.add(own.partition(":")[0])
    return found


def refs(ws):
    return [(a.ref, a.digest) for a in ws.store.adapters()]


@pytest.fixture(scope="module")
def one_by_one(untrained, tmp_path_factory):
    """What the tasks give without --jobs."""
    ws = copied(untrained, tmp_path_factory.mktemp("whole") / "ws")
    running = begin(ws, *LONG)
    out, _ = running.communicate(timeout=300)
    assert running.returncode == 0
    return ws, out


def test_a_killed_worker_s_task_goes_on_elsewhere_and_all_digests_are_those_of_one_by_one(
    ws, one_by_one
):
    mark = f"LORI_TEST={uuid.uuid4()}"
    running = begin(ws, "--jobs", "2", *LONG, **dict([mark.split("=")]))
    workers = in_training(ws, running, 2)
    addresses = listening(mark)
    assert addresses
    assert all(one.endswith("0100007F") for one in addresses)  # 127.0.0.1, also within IPv6
    os.kill(workers[0], signal.SIGKILL)
    out, told = running.communicate(timeout=300)
    assert running.returncode == 0, told
    assert "size: its worker was lost" in told
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [
        line.split()[:3] for line in one_by_one[1].splitlines()[1:]
    ]
    assert sorted(refs(ws)) == sorted(refs(one_by_one[0]))
    assert ws.store.open_runs() == []
    assert not [f for f in ws.verify() if f.kind != "orphan"]
    assert all(gone(worker) for worker in workers.values())


def test_ctrl_c_ends_every_worker_and_the_plain_command_goes_on_from_their_checkpoints(
    ws, one_by_one
):
    running = begin(ws, "--jobs", "2", *LONG)
    workers = in_training(ws, running, 2)
    os.killpg(running.pid, signal.SIGINT)
    _, told = running.communicate(timeout=120)
    assert running.returncode == 130, told
    assert told.splitlines()[-1].startswith("lori: interrupted; what was stored stays")
    in_time(lambda: all(gone(worker) for worker in workers.values()))
    assert list(ws.store.runs.glob("*/0-training*"))
    again = begin(ws, *LONG)
    again.communicate(timeout=300)
    assert again.returncode == 0
    assert sorted(refs(ws)) == sorted(refs(one_by_one[0]))


def test_a_cluster_that_is_not_there_is_told_in_one_line(ws):
    running = begin(ws, "--jobs", "2", RAY_ADDRESS="nowhere")
    _, told = running.communicate(timeout=300)
    assert running.returncode == 2, told
    assert told.count("\n") == 1
    assert told.startswith("lori: the Ray cluster at nowhere cannot be joined: ")
    assert ws.store.open_runs() == []
