"""Tables, numbers and progress lines."""

import io
import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from lori_manager.cli import output
from lori_manager.cli.progress import Teller, progress_line


def test_table_aligns_columns_and_never_cuts_a_cell(capsys):
    long = "safety@" + "9" * 300
    output.table(["ref", ">rows"], [[long, "1"], ["a@1", "1,000"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{long}      1"
    assert lines[2] == "a@1" + " " * (len(long) - 3) + "  1,000"


def test_table_without_rows_shows_its_headings(capsys):
    output.table(["task", ">rows"], [])
    assert capsys.readouterr().out == "task  rows\n"


def test_table_tells_unknown_from_empty(capsys):
    output.table(["a", "b", "c"], [[None, "", "x"]])
    assert capsys.readouterr().out.splitlines()[1] == "-     x"


def test_table_measures_wide_and_combining_letters(capsys):
    output.table(["a", "b"], [["日本", "x"], ["e\N{COMBINING ACUTE ACCENT}", "x"]])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "日本  x",
        "e\N{COMBINING ACUTE ACCENT}     x",
    ]


def test_text_cannot_steer_the_terminal(capsys):
    output.table(["description"], [["one\ntwo \x1b[31mred\x07"]])
    assert capsys.readouterr().out == "description\none two [31mred\n"


@dataclass(frozen=True)
class Record:
    value: float
    at: datetime
    parts: tuple

    @property
    def ref(self):
        return "x@1"


def test_json_has_null_for_nan_refs_and_iso_times(capsys):
    output.print_json(Record(math.nan, datetime(2026, 1, 2, tzinfo=UTC), (1, math.inf)))
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "ref": "x@1",
        "value": None,
        "at": "2026-01-02T00:00:00+00:00",
        "parts": [1, None],
    }


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (output.number(math.nan), "-"),
        (output.with_error(0.5, 0.01), "0.500 +- 0.010"),
        (output.with_error(0.5, math.nan), "0.500"),
        (output.change(-0.25, 0.1), "-0.250 +- 0.100"),
        (output.size(999), "999 B"),
        (output.size(1_430_000), "1.43 MB"),
        (output.size(5_000_000_000), "5 GB"),
        (output.count(4_884_480), "4,884,480"),
        (output.duration(4.25), "4.2 s"),
        (output.duration(200), "3 min 20 s"),
        (output.duration(7500), "2 h 5 min"),
        (output.duration(math.inf), "-"),
    ],
)
def test_numbers_are_short(shown, expected):
    assert shown == expected


def state(step, phase="training x", loss=1.25, job=""):
    return SimpleNamespace(
        phase=phase, step=step, steps=100, loss=loss, tokens_per_second=3402.4,
        seconds_left=80.0, job=job,
    )  # fmt: skip


def test_progress_line_tells_loss_speed_and_time_left():
    assert progress_line(state(7)) == (
        "training x  7/100  loss 1.250  3,402 tokens/s  1 min 20 s left"
    )


def test_progress_line_of_scoring_counts_rows():
    assert (
        progress_line(state(7, loss=math.nan)) == "training x  7/100  3,402 rows/s  1 min 20 s left"
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def teller(stream, times, **options):
    return Teller(stream=stream, clock=iter(times).__next__, **options)


def test_progress_off_a_terminal_is_a_line_every_ten_seconds():
    stream = io.StringIO()
    tell = teller(stream, [0, 5, 9.9, 10.1, 12, 21])
    for step in range(6):
        tell.progress(state(step))
    assert [line.split("  ")[1] for line in stream.getvalue().splitlines()] == ["3/100", "5/100"]


def test_progress_off_a_terminal_is_silent_in_short_phases():
    stream = io.StringIO()
    tell = teller(stream, [0, 9, 11, 20])
    for step, phase in enumerate(["a", "a", "b", "b"]):
        tell.progress(state(step, phase))
    assert stream.getvalue() == ""


def test_progress_on_a_terminal_moves_and_makes_way_for_messages(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    with teller(stream, [0, 0.01, 0.2]) as tell:
        for step in range(3):
            tell.progress(state(step))
        tell.message("done")
    drawn = stream.getvalue()
    assert drawn.count("\r") == 3  # two states and the wiping
    assert "1/100" not in drawn  # too soon after the first
    assert drawn.endswith("\r\x1b[Kdone\n")
    assert all(len(part) <= 19 + len("\x1b[K") for part in drawn.split("\r")[1:3])


def test_trainings_at_once_have_a_line_each_that_is_drawn_in_its_place(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with teller(stream, [0, 0.05, 0.2, 0.3]) as tell:
        tell.progress(state(1, "training a", job="a"))
        tell.progress(state(2, "training b", job="b"))
        tell.progress(state(3, "training a", job="a"))
        drawn = stream.getvalue()
        tell.message("a: done")
        tell.progress(state(4, "training b", job="b"))
    block = drawn.rpartition("\x1b[F")[2].splitlines()
    assert [line[:17] for line in block] == ["training a  3/100", "training b  2/100"]
    after = stream.getvalue()[len(drawn) :]
    assert after.startswith("\x1b[F\r\x1b[Ja: done\ntraining a  3/100".replace("\ntr", "\n\rtr"))


def test_trainings_at_once_are_told_every_ten_seconds_each_off_a_terminal():
    stream = io.StringIO()
    tell = teller(stream, [0, 1, 9, 10.5, 11.5])
    for step, job in enumerate("abaab"):
        tell.progress(state(step, f"training {job}", job=job))
    assert [line.split("  ")[:2] for line in stream.getvalue().splitlines()] == [
        ["training a", "3/100"], ["training b", "4/100"],
    ]  # fmt: skip


def test_quiet_says_nothing():
    stream = io.StringIO()
    with teller(stream, [0, 20], quiet=True) as tell:
        tell.progress(state(1))
        tell.message("done")
    assert stream.getvalue() == ""
