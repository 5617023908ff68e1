"""`lori bench` as people and programs meet it."""

import pytest

from lori_manager.cli.benching import _time

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = ("--rows", 2, "--tokens", 3, "--repeats", 1)


def test_bench_tells_both_tables_and_a_document(trained):
    told = trained("bench", "colour@1", "main", *FEW).stdout.splitlines()
    assert told[0].startswith("cpu, 1 threads, fp32: 2 prompts together, 22 tokens in all, 3 new")
    ways = [line.split()[:2] for line in told[2:7]]
    assert ways == [["base", "alone"], ["colour@1", "apart"], ["colour@1", "merged"],
                    ["main@1", "apart"], ["main@1", "merged"]]  # fmt: skip
    assert [line.split()[0] for line in told[-2:]] == ["colour@1", "main@1"]
    found = trained.json("bench", "colour@1", *FEW)
    assert [use["way"] for use in found["uses"]] == ["alone", "apart", "merged"]


def test_what_cannot_be_measured_is_one_line(trained):
    assert "`tokens` must be" in trained.refuses("bench", "colour@1", "--tokens", "1", code=2)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, None), (2.5e-5, "25 us"), (0.0123, "12.3 ms"), (2.0, "2 s")]
)
def test_times_are_told_in_their_unit(seconds, shown):
    assert _time(seconds) == shown
