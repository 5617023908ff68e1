"""Holm's step-down against statsmodels and by property."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

from lori_manager.metrics.multiple import holm

ps = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@pytest.mark.parametrize("tests", [1, 2, 7, 30])
def test_holm_is_that_of_statsmodels(tests):
    p = np.random.default_rng(tests).beta(0.3, 3, tests)
    p[-1] = p[0]  # a tie
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1], abs=1e-15)


@given(ps, st.randoms())
def test_holm_follows_the_order_given_and_never_lowers_a_p(p, random):
    adjusted = holm(p)
    assert np.all(adjusted >= np.array(p) - 1e-15)
    order = list(range(len(p)))
    random.shuffle(order)
    assert holm([p[i] for i in order]) == pytest.approx(adjusted[order], abs=0)


def test_a_test_that_was_not_done_does_not_count():
    assert holm([0.01, math.nan, 0.04, 0.03]).tolist() == pytest.approx(
        [0.03, math.nan, 0.06, 0.06], nan_ok=True
    )
    assert holm([]).size == 0
    assert math.isnan(holm([math.nan])[0])


@pytest.mark.parametrize("p", [[-0.1], [1.1], [[0.1]]])
def test_what_is_no_p_value_is_refused(p):
    with pytest.raises(ValueError, match="`p_values` must be"):
        holm(p)
