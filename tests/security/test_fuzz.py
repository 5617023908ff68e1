"""Mutated files of every form; `make soak` reads 10000 of each group, see docs/security.md."""

import math
import os

import fuzzing
import mutating
import pytest

SOAK = float(os.environ.get("LORI_SOAK") or 0)
COUNT = math.ceil(10_000 * SOAK) or 300


@pytest.mark.timeout(36_000)
def test_every_mutated_file_is_refused_in_one_line_or_whole():
    found, known = fuzzing.run(COUNT)
    for group in ("files", "configs"):
        assert sum(n for name, n in found.cases.items() if known[name].group == group) >= COUNT
    assert found.failures == []
    # Mutations that are all refused at the first look would show nothing.
    assert all(found.accepted[name] for name in known if name.startswith("import "))


def test_a_case_is_the_same_in_every_run():
    import random

    data = [mutating.safetensors(random.Random(f"x|{i}"), SMALL) for i in range(50)]
    assert data == [mutating.safetensors(random.Random(f"x|{i}"), SMALL) for i in range(50)]
    assert len(set(data)) > 30


@pytest.mark.parametrize("fault", ["hang", "traceback", "accepted"])
def test_what_goes_wrong_is_told_with_the_case(tmp_path, monkeypatch, fault):
    def run(rng, folder):
        if fault == "hang":
            while True:
                pass
        if fault == "traceback":
            raise KeyError("x")
        raise fuzzing.Accepted("it")

    monkeypatch.setattr(fuzzing, "SECONDS", 0.1)
    found = fuzzing.Found()
    fuzzing.one("a target", fuzzing.Target("files", run), 3, 7, tmp_path / "case", found)
    (told,) = found.failures
    assert told.startswith(fault)
    assert told.endswith("--only 'a target' --case 7 --seed 3")


SMALL = mutating.joined(
    {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
     "b": {"dtype": "F32", "shape": [1], "data_offsets": [16, 20]}}, bytes(20)
)  # fmt: skip
