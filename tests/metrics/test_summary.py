"""Means and their errors, by hand, by property and against scipy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lori_manager.metrics.summary import Summary, perplexity, summarize

NAN = math.nan


def test_right_wrong_outcomes_give_the_share_and_its_binomial_error():
    value, error, rows = summarize([1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    assert (value, rows) == (0.3, 10)
    assert error == pytest.approx(math.sqrt(0.3 * 0.7 / 10))


def test_facts_of_noise_are_reproduced():
    # 330 prompts at 93% have a standard error of 1.4 points.
    assert summarize([1] * 307 + [0] * 23).error == pytest.approx(0.014, abs=5e-4)


def test_rows_not_measured_count_nowhere():
    assert summarize([1, NAN, 0, 1, NAN, 1]) == summarize([1, 0, 1, 1])


def test_nothing_measured_is_nan_and_not_zero():
    for outcomes in ([], [NAN, NAN]):
        value, error, rows = summarize(outcomes)
        assert math.isnan(value)
        assert math.isnan(error)
        assert rows == 0


def test_one_row_has_a_value_but_no_error_unless_it_is_right_or_wrong():
    assert summarize([1.0]) == Summary(1.0, 0.0, 1)
    value, error, rows = summarize([2.5])
    assert (value, rows) == (2.5, 1)
    assert math.isnan(error)


def test_graded_outcomes_have_the_usual_error_of_a_mean():
    x = np.random.default_rng(0).normal(size=57)
    assert summarize(x).error == pytest.approx(stats.sem(x))


def test_weights_make_the_mean_per_token():
    # Rows of 1 and 3 tokens: (1 * 2.0 + 3 * 1.0) / 4 nats per token.
    # Error: sqrt(2 * (1^2 * .75^2 + 3^2 * .25^2)) / 4 = sqrt(2 * 1.125) / 4.
    value, error, rows = summarize([2.0, 1.0], [1, 3])
    assert (value, rows) == (1.25, 2)
    assert error == pytest.approx(math.sqrt(2.25) / 4)


def test_rows_of_weight_zero_count_as_not_measured():
    assert summarize([2.0, 1.0, 9.0], [1, 3, 0]) == summarize([2.0, 1.0, NAN], [1, 3, NAN])


def test_delta_method_error_covers_the_spread_over_samples():
    random = np.random.default_rng(1)
    values, errors = [], []
    for _ in range(2000):
        tokens = random.integers(1, 40, size=80)
        nll = random.gamma(2.0, 1.0, size=80) + 5 / tokens  # short rows are harder
        value, error, _ = summarize(nll, tokens)
        values.append(value)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.06)


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30),
    st.floats(0.1, 100.0),
)
def test_equal_weights_change_nothing(outcomes, weight):
    weighted = summarize(outcomes, [weight] * len(outcomes))
    assert weighted == summarize(outcomes)


@given(st.lists(st.tuples(st.floats(-50, 50), st.integers(1, 9)), min_size=3, max_size=20))
def test_the_weighted_mean_lies_within_its_rows_and_ignores_the_weights_scale(pairs):
    x, w = np.array(pairs).T
    one, other = summarize(x, w), summarize(x, w * 7)
    assert x.min() - 1e-9 <= one.value <= x.max() + 1e-9
    assert one.value == pytest.approx(other.value)
    assert one.error == pytest.approx(other.error, abs=1e-12)


def test_perplexity_is_exp_and_its_error_is_the_derivative_times_the_error():
    ppl, error = perplexity(math.log(20.0), 0.05)
    assert ppl == pytest.approx(20.0)
    assert error == pytest.approx(1.0)
    assert perplexity(1e6, 0.1)[0] == math.inf
    assert math.isnan(perplexity(NAN, NAN)[0])


def test_input_is_not_modified():
    x = np.array([1.0, NAN, 0.0], dtype=np.float32)
    w = np.array([1.0, 2.0, 3.0])
    summarize(x, w)
    np.testing.assert_array_equal(x, np.array([1.0, NAN, 0.0], dtype=np.float32))
    np.testing.assert_array_equal(w, [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("outcomes", "weights", "message"),
    [
        ([[1, 0]], None, r"one number per row, got shape \(1, 2\)"),
        ([1, math.inf], None, "1 infinite, the first in row 1"),
        ([1, 0], [1], r"got shape \(1,\) for \(2,\) rows"),
        ([1, 0], [1, -1], "at least 0"),
        ([1, 0], [1, NAN], "finite"),
    ],
)
def test_what_cannot_be_summarised_is_refused(outcomes, weights, message):
    with pytest.raises(ValueError, match=message):
        summarize(outcomes, weights)
