"""Continual-learning figures against matrices worked by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lori_manager.metrics.continual import (
    average_accuracy,
    backward_transfer,
    best_seen_forgetting,
    continual_figures,
    first_last_forgetting,
    forgetting,
    forward_transfer,
    intransigence,
    learning_accuracy,
    other_figures,
    outside_delta,
    trace_backward_transfer,
)

NAN = math.nan
R = np.array([[0.9, 0.3, 0.2], [0.7, 0.8, 0.1], [0.5, 0.85, 0.6]])
BASE = np.array([0.1, 0.2, 0.15])


ORACLES = json.loads(Path(__file__).with_name("continual_oracles.json").read_text("utf-8"))


def others(*args, **kwargs):
    return {f.symbol: f for f in other_figures(*args, **kwargs)}


def by_symbol(*args, **kwargs):
    return {f.symbol: f for f in continual_figures(*args, **kwargs)}


def test_three_tasks_by_hand():
    figures = by_symbol(R, BASE, [0.95, 0.9, 0.6])
    expected = {
        "ACC": (0.5 + 0.85 + 0.6) / 3,
        "LA": (0.9 + 0.8 + 0.6) / 3,
        "BWT": ((0.5 - 0.9) + (0.85 - 0.8)) / 2,
        "BWT_TRACE": ((0.5 - 0.9) + (0.85 - 0.8)) / 3,
        "FWT": ((0.3 - 0.2) + (0.1 - 0.15)) / 2,
        "F": ((0.9 - 0.5) + (0.8 - 0.85)) / 2,
        "I": (0.05 + 0.1 + 0.0) / 3,
    }
    assert {s: f.value for s, f in figures.items()} == pytest.approx(expected)
    assert {s: f.denominator for s, f in figures.items()} == {
        "ACC": 3, "LA": 3, "BWT": 2, "BWT_TRACE": 3, "FWT": 2, "F": 2, "I": 3,
    }  # fmt: skip
    assert [s for s, f in figures.items() if not f.higher_is_better] == ["F", "I"]
    assert all(f.name and f.formula and f.source for f in figures.values())


def test_forgetting_counts_a_best_before_the_tasks_own_stage():
    M = R.copy()
    M[0, 1] = 0.95  # task 2 was better before it was taught
    assert forgetting(M).value == pytest.approx(((0.9 - 0.5) + (0.95 - 0.85)) / 2)


def test_a_single_task_has_no_transfer_and_no_forgetting():
    figures = by_symbol([[0.9]], [0.1], [0.95])
    assert figures["ACC"].value == figures["LA"].value == 0.9
    assert figures["I"].value == pytest.approx(0.05)
    for symbol in ("BWT", "BWT_TRACE", "FWT", "F"):
        assert math.isnan(figures[symbol].value)
        assert figures[symbol].denominator == 0


@pytest.mark.parametrize(
    ("row", "column", "needing"),
    [
        (2, 0, {"ACC", "BWT", "BWT_TRACE", "F"}),
        (2, 2, {"ACC", "LA", "I", "BWT_TRACE"}),
        (0, 0, {"LA", "BWT", "BWT_TRACE", "F", "I"}),
        (0, 1, {"FWT", "F"}),
        (1, 2, {"FWT"}),
        (0, 2, set()),
    ],
)
def test_what_was_not_measured_spoils_exactly_the_figures_that_need_it(row, column, needing):
    M = R.copy()
    M[row, column] = NAN
    figures = by_symbol(M, BASE, [0.95, 0.9, 0.6])
    assert {s for s, f in figures.items() if math.isnan(f.value)} == needing


def test_an_unmeasured_base_spoils_forward_transfer_alone():
    figures = by_symbol(R, [NAN, 0.2, NAN], [0.95, 0.9, 0.6])
    assert [s for s, f in figures.items() if math.isnan(f.value)] == ["FWT"]
    # The base on the first task is not needed.
    assert not math.isnan(forward_transfer(R, [NAN, 0.2, 0.15]).value)


def test_without_a_reference_there_is_no_intransigence():
    assert math.isnan(by_symbol(R, BASE)["I"].value)


def test_tasks_that_are_never_trained_are_left_out_of_every_figure_but_their_own():
    wide = np.column_stack([R, [0.5, 0.4, 0.3], [0.6, 0.6, 0.7]])
    base = [*BASE, 0.5, 0.6]
    without, within = by_symbol(R, BASE), by_symbol(wide, base)
    delta = within.pop("DELTA")
    assert delta.value == pytest.approx((-0.2 + 0.1) / 2)
    assert delta.denominator == 2
    assert {s: f.value for s, f in within.items() if s != "I"} == {
        s: f.value for s, f in without.items() if s != "I"
    }
    assert math.isnan(outside_delta(R, BASE).value)


def test_lower_is_better_keeps_means_as_they_are_and_turns_differences():
    figures, turned = by_symbol(R, BASE), by_symbol(-R, -BASE, higher_is_better=False)
    for symbol in ("BWT", "BWT_TRACE", "FWT", "F"):
        assert turned[symbol].value == pytest.approx(figures[symbol].value)
        assert turned[symbol].higher_is_better == figures[symbol].higher_is_better
    for symbol in ("ACC", "LA"):
        assert turned[symbol].value == -figures[symbol].value
        assert not turned[symbol].higher_is_better


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: average_accuracy([0.1, 0.2]), r"got shape \(2,\)"),
        (lambda: average_accuracy([[0.1], [0.2]]), r"a column for each stage's task"),
        (lambda: average_accuracy(np.empty((0, 3))), "at least one stage"),
        (lambda: forward_transfer(R, [0.1]), r"`base` must have one score per task, 3"),
        (lambda: intransigence(R, [0.1, 0.2]), r"`reference` must have one score per task, 3"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@st.composite
def squares(draw):
    T = draw(st.integers(2, 6))
    return draw(arrays(float, (T, T), elements=st.floats(0, 1)))


@given(squares())
def test_figures_are_tied_to_one_another(M):
    T = len(M)
    bwt, trace = backward_transfer(M).value, trace_backward_transfer(M).value
    assert trace == pytest.approx((T - 1) / T * bwt, abs=1e-12)
    assert average_accuracy(M).value - learning_accuracy(M).value == pytest.approx(trace, abs=1e-12)
    assert forgetting(M).value >= -bwt - 1e-12


@given(squares(), st.floats(-1, 1))
def test_a_shift_of_every_score_moves_means_alone(M, shift):
    base = np.full(len(M), 0.5)
    before, after = by_symbol(M, base), by_symbol(M + shift, base + shift)
    for symbol in ("BWT", "BWT_TRACE", "FWT", "F"):
        assert after[symbol].value == pytest.approx(before[symbol].value, abs=1e-9)
    for symbol in ("ACC", "LA"):
        assert after[symbol].value == pytest.approx(before[symbol].value + shift, abs=1e-9)


@given(squares())
def test_definitions_written_out_as_loops_agree(M):
    T = len(M)
    b = np.linspace(0, 1, T)
    loops = {
        "ACC": sum(M[T - 1, j] for j in range(T)) / T,
        "LA": sum(M[j, j] for j in range(T)) / T,
        "BWT": sum(M[T - 1, i] - M[i, i] for i in range(T - 1)) / (T - 1),
        "FWT": sum(M[i - 1, i] - b[i] for i in range(1, T)) / (T - 1),
        "F": sum(max(M[m, j] for m in range(T - 1)) - M[T - 1, j] for j in range(T - 1)) / (T - 1),
    }
    figures = by_symbol(M, b)
    assert {s: figures[s].value for s in loops} == pytest.approx(loops, abs=1e-12)


def test_the_figures_of_others_by_hand():
    figures = others(R)
    expected = {
        "MAA": (0.9 + (0.7 + 0.8) / 2 + (0.5 + 0.85 + 0.6) / 3) / 3,
        "A": (0.9 + 0.7 + 0.8 + 0.5 + 0.85 + 0.6) / 6,
        "F_FIRST": ((0.9 - 0.5) + (0.8 - 0.85)) / 2,
        "F_SEEN": ((0.9 - 0.5) + 0.0) / 2,
        "BWT_ALL": ((0.7 - 0.9) + (0.5 - 0.9) + (0.85 - 0.8)) / 3,
        "FWT_ALL": (0.3 + 0.2 + 0.1) / 3,
    }
    assert {s: f.value for s, f in figures.items()} == pytest.approx(expected)
    assert {s: f.denominator for s, f in figures.items()} == {
        "MAA": 3, "A": 6, "F_FIRST": 2, "F_SEEN": 2, "BWT_ALL": 3, "FWT_ALL": 3,
    }  # fmt: skip
    assert [s for s, f in figures.items() if not f.higher_is_better] == ["F_FIRST", "F_SEEN"]
    assert all(f.name and f.formula and f.source for f in figures.values())


@pytest.mark.parametrize("case", ORACLES["cases"], ids=lambda case: f"{len(case['R'])} tasks")
def test_figures_are_those_of_avalanches_and_fusion_benchs_own_code(case):
    M, base = np.array(case["R"]), case["base"]
    avalanche = case["avalanche"]
    assert first_last_forgetting(M).value == pytest.approx(avalanche["forgetting"])
    assert backward_transfer(M).value == pytest.approx(avalanche["bwt"])
    assert forward_transfer(M, base).value == pytest.approx(avalanche["fwt"])
    assert trace_backward_transfer(M).value == pytest.approx(case["fusion_bench"]["bwt"])


@given(squares())
def test_best_seen_forgetting_is_mammoths_on_rows_that_hold_the_tasks_seen(M):
    # Its definition, written anew: rows are padded with 0 and the maximum takes in the last.
    T = len(M)
    seen = np.array([[M[i, j] if j <= i else 0.0 for j in range(T)] for i in range(T)])
    expected = np.mean([seen[:, j].max() - seen[-1, j] for j in range(T - 1)])
    assert best_seen_forgetting(M).value == pytest.approx(expected, abs=1e-12)


@given(squares())
def test_the_three_forgettings_are_ordered(M):
    assert first_last_forgetting(M).value == -backward_transfer(M).value
    assert best_seen_forgetting(M).value >= first_last_forgetting(M).value - 1e-12
    assert best_seen_forgetting(M).value >= 0


@pytest.mark.parametrize(
    ("row", "column", "needing"),
    [
        (2, 0, {"MAA", "A", "F_FIRST", "F_SEEN", "BWT_ALL"}),
        (1, 0, {"MAA", "A", "F_SEEN", "BWT_ALL"}),
        (2, 2, {"MAA", "A"}),
        (0, 2, {"FWT_ALL"}),
    ],
)
def test_what_was_not_measured_spoils_exactly_the_others_that_need_it(row, column, needing):
    M = R.copy()
    M[row, column] = NAN
    assert {s for s, f in others(M).items() if math.isnan(f.value)} == needing


def test_the_figures_of_others_on_one_task_and_with_lower_is_better():
    single = others([[0.9]])
    assert single["MAA"].value == single["A"].value == 0.9
    assert {s for s, f in single.items() if math.isnan(f.value)} == {
        "F_FIRST", "F_SEEN", "BWT_ALL", "FWT_ALL",
    }  # fmt: skip
    figures, turned = others(R), others(-R, higher_is_better=False)
    for symbol in ("F_FIRST", "F_SEEN", "BWT_ALL"):
        assert turned[symbol].value == pytest.approx(figures[symbol].value)
        assert turned[symbol].higher_is_better == figures[symbol].higher_is_better
    for symbol in ("MAA", "A", "FWT_ALL"):
        assert turned[symbol].value == -figures[symbol].value
        assert not turned[symbol].higher_is_better
    wide = np.column_stack([R, [0.5, 0.4, 0.3]])
    assert {s: f.value for s, f in others(wide).items()} == {s: f.value for s, f in figures.items()}
