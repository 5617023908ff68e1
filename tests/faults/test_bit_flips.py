"""Every bit of a file, one after the other, is flipped: `verify` finds each."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import acting
import pytest

from lori_manager import checkpoints
from lori_manager.store.store import Store


def flips(content: bytes, many: Callable[[int, int], int]) -> list[tuple[int, bytes]]:
    """(bit, content with that bit flipped) of some bits or of all."""
    out = []
    bits = 8 * len(content)
    count = min(bits, many(40, bits))
    for bit in (number * bits // count for number in range(count)):
        altered = bytearray(content)
        altered[bit // 8] ^= 1 << bit % 8
        out.append((bit, bytes(altered)))
    return out


def test_verify_finds_every_flipped_bit_of_a_stored_file(
    prepared: Path, ground: Path, many: Callable[[int, int], int]
) -> None:
    place = ground / "flips"
    shutil.copytree(prepared, place)
    tried = 0
    with Store.open(place / ".lori") as store:
        task = store.task("safety")
        mask = store.add_mask(
            task=task, blob=bytes(range(60)), projection="a" * 64, sparsity=0.9, scope="model",
            kept=1, total=9, config={},
        )  # fmt: skip
        adapter = store.add_adapter(acting.adapter("safety"), bytes(range(200)))
        sample = {
            adapter.digest: adapter.ref,
            mask.digest: mask.ref,
            task.splits["eval"].digest: f"{task.ref} eval",
        }
        for digest, name in sample.items():
            path = Path(store.objects.where(digest))
            content = path.read_bytes()
            for bit, altered in flips(content, many):
                path.write_bytes(altered)
                found = [(f.kind, f.subject) for f in store.verify()]
                assert found == [("damaged", name)], f"bit {bit} of {name}"
                tried += 1
            path.write_bytes(content)
        assert list(store.verify()) == []
    shutil.rmtree(place)
    print(f"\n{tried} flipped bits of {len(sample)} files, all found")


def test_every_flipped_bit_of_a_checkpoint_is_found_on_reading(
    ground: Path, many: Callable[[int, int], int], caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    place = ground / "checkpoint"
    tried = 0
    for name in (checkpoints.MANIFEST, checkpoints.TENSORS):
        shutil.rmtree(place, ignore_errors=True)
        for step in (1, 2):
            checkpoints.save(place, step, {"values": torch.ones(9)}, {"loss": [0.5, 0.25]})
        file = place / "step-000000002" / name
        content = file.read_bytes()
        for bit, altered in flips(content, many):
            file.write_bytes(altered)
            found = checkpoints.newest(place, lambda _: None)
            # a bit that leaves the manifest's meaning as it was (a space) is no damage
            same = found is not None and found.step == 2
            if same:
                assert name == checkpoints.MANIFEST, f"bit {bit} of {name}"
                assert found is not None
                assert found.facts == {"loss": [0.5, 0.25]}
                assert found.tensors["values"].tolist() == [1.0] * 9
            else:
                (place / "step-000000002.damaged").rename(place / "step-000000002")
            tried += 1
        file.write_bytes(content)
    print(f"\n{tried} flipped bits of a checkpoint: none was taken for something else")
