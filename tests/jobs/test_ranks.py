"""One training by several processes: torchrun with two of them on the CPU, over gloo."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rank_program
import torch
from small_workspaces import WORDS, copied, write_rows

from lori_manager import ranks as module
from lori_manager.cli.app import app
from lori_manager.errors import EndedElsewhere, InvalidInput, NotFound
from lori_manager.jobs.driving import train_jobs
from lori_manager.ranks import Ranks, launched
from lori_manager.workspace import Workspace

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PROGRAM = Path(rank_program.__file__)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def worded(untrained, tmp_path_factory):
    """With a task whose score moves with every rounding."""
    ws = copied(untrained, tmp_path_factory.mktemp("worded") / "ws")
    WORDS["words"] = ("many words", "few")
    files = {
        split: write_rows(ws.root / "tasks" / "words" / f"{split}.jsonl", "words", count, start)
        for split, count, start in (("train", 23, 0), ("eval", 7, 100))
    }
    del WORDS["words"]
    ws.add_task("words", train=files["train"], eval=files["eval"], scorer="perplexity",
                probe_rows=4)  # fmt: skip
    return ws


def pictures(folder):
    """A workspace on a tiny diffusion pipeline."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "diffusion"))
    from tiny_pipeline import make_pipeline, write_images

    with Workspace.create(folder / "pictures", str(make_pipeline(folder / "pipeline"))) as ws:
        (ws.root / "lori.toml").write_text(
            '[defaults]\ntargets = ["attn2.to_q", "attn2.to_v"]\nrank = 4\nscore_batch = 16\n'
        )
        ws.add_image_task("words", write_images(folder / "water", "water", 10), eval_share=0.4)
        return ws.root


def labels(folder):
    """A workspace on a tiny encoder."""
    import encoders

    base = encoders.encoder(folder / "encoder", "bert")
    with Workspace.create(folder / "labels", str(base)) as ws:
        (ws.root / "lori.toml").write_text("[defaults]\nrank = 4\nmax_length = 32\n")
        files = {
            split: encoders.write_jsonl(folder / f"{split}.jsonl", rows)
            for split, rows in (
                ("train", encoders.sentences(["red", "blue"], 23, 1)),
                ("eval", encoders.sentences(["red", "blue"], 7, 2)),
            )
        }
        ws.add_task("words", train=files["train"], eval=files["eval"])
        return ws.root


def test_two_processes_come_to_the_losses_and_scores_of_one_for_every_kind(
    worded, tmp_path, one_thread
):
    folders = [worded.root, pictures(tmp_path), labels(tmp_path)]
    names = ["language", "pictures", "labels"]
    both = {
        count: [
            shutil.copytree(f, tmp_path / str(count) / n)
            for f, n in zip(folders, names, strict=True)
        ]
        for count in (1, 2)
    }
    told = tmp_path / "told.json"
    subprocess.run([*TORCHRUN, PROGRAM, told, *both[2]], env=ENVIRONMENT, check=True, timeout=500)
    found = json.loads(told.read_text())
    assert found["processes"] == 2
    for folder in both[1]:
        with Workspace.open(folder) as ws:
            chosen = rank_program.cases() if folder.name == "language" else {"lori": {}}
            alone = rank_program.trainings(ws, chosen)
        for name, case in alone.items():
            split = found["told"][folder.name][name]
            assert len(case["losses"]) >= rank_program.SHORT["steps"], name
            assert split["losses"] == pytest.approx(case["losses"], abs=1e-5), name
            for (task, value, rows), (t, v, r) in zip(split["scores"], case["scores"], strict=True):
                assert (task, rows) == (t, r)
                assert value == pytest.approx(v, rel=1e-5), name
            for one, other in zip(split["outcomes"], case["outcomes"], strict=True):
                assert one == pytest.approx(other, rel=1e-4, abs=1e-5), name
    with Workspace.open(both[2][0]) as ws:
        assert list(ws.verify()) == []
        assert ws.store.open_runs() == []
        assert {a.facts["processes"] for a in ws.store.adapters()} == {2}


def test_unlike_machines_begin_with_what_rank_0_has(worded, tmp_path):
    ws = copied(worded, tmp_path / "ws")
    program = [*TORCHRUN, PROGRAM.with_name("unlike_program.py"), tmp_path, ws.root]
    subprocess.run(program, env=ENVIRONMENT, check=True, timeout=300)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert set(first) == {"placement", "svd", "nullspace", "trained"}
    assert second == first


def begin(folder, *args):
    return subprocess.Popen(
        [*TORCHRUN, "-m", "lori_manager", "-C", str(folder), *args],
        env=ENVIRONMENT | {"LORI_TEST": str(folder)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def processes_at(folder):
    """Rank -> process."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            told = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"LORI_TEST={folder}".encode() in told:
            found |= {int(one[5:]): int(process.name) for one in told if one.startswith(b"RANK=")}
    return found


def test_one_process_killed_ends_all_and_the_same_command_goes_on_to_the_same_digest(ws, other):
    command = ["train", "colour", "--steps", "300"]
    whole = begin(other.root, *command)
    running = begin(ws.root, *command)
    deadline = time.monotonic() + 240
    while not list(ws.store.runs.glob("*/0-training/step-*")):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = processes_at(ws.root)
    assert set(ranks) == {0, 1}
    os.kill(ranks[1], signal.SIGKILL)
    _, told = running.communicate(timeout=120)
    assert running.returncode != 0
    assert len([line for line in told.splitlines() if line.startswith("lori: ")]) <= 1
    assert processes_at(ws.root) == {}
    assert ws.store.adapters() == []
    again = begin(ws.root, *command, "--json")
    out, told = again.communicate(timeout=300)
    assert again.returncode == 0, told
    (made,) = json.loads(out)  # rank 0 alone tells
    whole.communicate(timeout=300)
    (adapter,) = other.store.adapters()
    assert made["adapter"]["digest"] == adapter.digest
    assert told.count("colour@1: 300 steps in") == 1


def test_what_every_process_meets_is_told_once(ws):
    running = begin(ws.root, "train", "colour", "mass")
    out, told = running.communicate(timeout=120)
    assert running.returncode != 0
    assert out == ""
    assert [line for line in told.splitlines() if line.startswith("lori: ")] == [
        "lori: no task is called 'mass'; there are: colour, shape, size"
    ]


# What needs no second process.


@pytest.fixture
def as_launched(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)


def test_a_launcher_is_known_by_what_it_tells():
    told = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "here"}
    assert launched(told) == 4
    assert launched({}) == 1
    for name in told:
        assert launched({k: v for k, v in told.items() if k != name}) == 1


def test_other_commands_refuse_to_be_started_many_times(ws, as_launched):
    from typer.testing import CliRunner

    run = CliRunner().invoke(app, ["-C", str(ws.root), "merge", "--tasks", "colour,size"])
    assert run.exit_code == 2
    assert "only `lori train` and `lori calibrate` can be done by several" in run.stderr


@pytest.mark.parametrize("local", ["0", "1"])
def test_every_process_ends_where_there_are_fewer_gpus(monkeypatch, local):
    told = {"RANK": local, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
    for name, value in (told | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InvalidInput, match="1 GPUs for 2 processes here: start at most 1"):
        next(module.joined.__wrapped__())


def test_jobs_refuse_to_be_started_by_several(ws, monkeypatch):
    monkeypatch.setattr(module, "_now", Ranks(0, 2))
    with pytest.raises(InvalidInput, match="not to torchrun"):
        train_jobs(ws, ["colour"], None, None, 2, None)


def test_alone_nothing_is_split_summed_or_asked_for():
    alone = Ranks()
    assert alone.own([1, 2, 3]) == [1, 2, 3]
    assert alone.led(lambda: 5) == 5
    gradients = [torch.ones(3)]
    assert alone.summed(gradients, torch.tensor(2.0), 4) == (torch.tensor(2.0), 4)
    assert alone.by_row(3, lambda own: (np.array(list(own)), None))[0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="at least one row"):
        alone.summed(gradients, None, 0)


def test_shares_hold_every_row_once():
    rows = list(range(11))
    shares = [Ranks(rank, 4).own(rows) for rank in range(4)]
    assert sorted(row for share in shares for row in share) == rows
    assert [len(share) for share in shares] == [3, 3, 3, 2]


class Exchange:
    """A `torch.distributed` of ranks that are asked one after the other, in this process."""

    def __init__(self, monkeypatch, received):
        import torch.distributed as dist

        def broadcast(box, src, device):
            if received is None:
                self.sent = list(box)
            else:
                box[:] = received

        monkeypatch.setattr(dist, "broadcast_object_list", broadcast)


def test_what_rank_0_meets_every_rank_raises(monkeypatch):
    exchange = Exchange(monkeypatch, None)

    def refused():
        raise NotFound("no such thing")

    with pytest.raises(NotFound):
        Ranks(0, 2).led(refused, "x")
    Exchange(monkeypatch, exchange.sent)
    with pytest.raises(NotFound, match="no such thing"):
        Ranks(1, 2).led(pytest.fail, "x")


def test_a_rank_that_asks_for_something_else_ends(monkeypatch):
    Exchange(monkeypatch, ["store.task", 1, None])
    with pytest.raises(EndedElsewhere, match=r"rank 1 asks for 'store.tasks', rank 0 for"):
        Ranks(1, 2).led(pytest.fail, "store.tasks")


def test_after_a_failure_rank_0_tidies_up_alone():
    group = Ranks(0, 2)
    with group.apart():
        assert group.led(lambda: 7, "x") == 7


def test_large_gradients_are_sent_in_several_parts(monkeypatch):
    monkeypatch.setattr(module, "MOST_SUMMED", 5)
    sizes = [len(bucket) for bucket in module._buckets([torch.ones(n) for n in (2, 3, 9, 1, 1)])]
    assert sizes == [2, 1, 2]
