"""Training killed at random steps, the newest checkpoint damaged as well: the same digest."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from small_workspaces import copied, make_workspace

from lori_manager import checkpoints
from lori_manager.workspace import Workspace

STEPS = 12
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "transformers.models.llama.modeling_llama", "lori_manager.training",
     "lori_manager.adapters.lori", "lori_manager.scoring", "lori_manager.workspace"]
)  # fmt: skip


def _train(folder: str, die_after: int, said: str) -> None:
    """Train; die after that many steps of the main phase (0: never). Tells the first step."""
    first: list[int] = []
    with Workspace.open(folder) as ws:

        def watch(progress: object) -> None:
            if progress.phase.startswith("training"):  # type: ignore[attr-defined]
                first.append(progress.step)  # type: ignore[attr-defined]
                if progress.step == die_after:  # type: ignore[attr-defined]
                    os.kill(os.getpid(), signal.SIGKILL)

        ws.on_progress = watch
        (made,) = ws.train(["colour"], dataclasses.replace(ws.settings.config, steps=STEPS))
        Path(said).write_text(f"{made.adapter.digest} {first[0] if first else 0}")


def train(folder: Path, die_after: int, said: Path) -> int:
    process = _context.Process(target=_train, args=(str(folder), die_after, str(said)))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the training hangs"
    return process.exitcode


@pytest.fixture(scope="module")
def begun(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("trainings") / "ws"
    ws = make_workspace(folder, tiny_base, checkpoint_seconds=0.0)
    ws.calibrate("colour")
    return ws


def test_a_training_killed_with_its_newest_checkpoint_damaged_ends_with_the_same_digest(
    begun: Workspace, tmp_path: Path, many: Callable[[int, int], int]
) -> None:
    chance = random.Random(0)
    whole = copied(begun, tmp_path / "whole")
    assert train(whole.root, 0, tmp_path / "said") == 0
    digest, _ = (tmp_path / "said").read_text().split()
    whole.close()
    rounds = many(3, 50)
    for number in range(rounds):
        ws = copied(begun, tmp_path / str(number))
        step = chance.randrange(3, STEPS)
        assert train(ws.root, step, tmp_path / "none") == -signal.SIGKILL
        (folder,) = ws.store.runs.glob("*/0-training")
        kept = checkpoints.steps(folder)
        assert len(kept) == 2
        file = folder / f"step-{kept[-1]:09d}" / chance.choice(["manifest.json",
                                                               "tensors.safetensors"])  # fmt: skip
        content = bytearray(file.read_bytes())
        content[chance.randrange(len(content))] ^= 0x41
        file.write_bytes(content)
        assert train(ws.root, 0, tmp_path / "said") == 0
        found, first = (tmp_path / "said").read_text().split()
        assert found == digest
        assert int(first) == kept[0] + 1  # one checkpoint back, and no further
        assert [f for f in ws.verify() if f.kind != "orphan"] == []
        assert not folder.exists()
        ws.close()
    print(
        f"\n{rounds} trainings of {STEPS} steps killed and damaged: the same digest {digest[:12]}"
    )
