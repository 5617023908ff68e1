"""LowRankUpdate: values by hand, and factors that must stay the same update."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lori_manager.engine.update import LowRankUpdate, concat_updates

A = torch.tensor([[1.0, 2.0, 3.0]])
B = torch.tensor([[10.0], [-1.0]])


def random_update(rank, scaling=1.0, seed=0, dtype=torch.float64, shape=(5, 7)):
    g = torch.Generator().manual_seed(seed)
    return LowRankUpdate(
        torch.randn(rank, shape[1], generator=g, dtype=dtype),
        torch.randn(shape[0], rank, generator=g, dtype=dtype),
        scaling,
    )


def test_delta_is_the_one_worked_out_by_hand():
    update = LowRankUpdate(A, B, 0.5)
    assert update.delta().tolist() == [[5.0, 10.0, 15.0], [-0.5, -1.0, -1.5]]
    assert (update.rank, update.shape) == (1, (2, 3))


def test_delta_agrees_with_numpy():
    update = random_update(3, scaling=2.5)
    expected = 2.5 * np.einsum("or,ri->oi", update.B.numpy(), update.A.numpy())
    assert np.allclose(update.delta().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_delta_has_the_type_of_B_whatever_A_has(dtype):
    delta = LowRankUpdate(A, B.to(dtype), 0.5).delta()
    assert delta.dtype == dtype
    assert delta[0].tolist() == [5.0, 10.0, 15.0]


def test_folded_and_padded_are_the_same_update():
    update = LowRankUpdate(A, B, 0.5)
    folded, padded = update.folded(), update.padded(3)
    assert (folded.scaling, folded.B.tolist()) == (1.0, [[5.0], [-0.5]])
    assert (padded.rank, padded.scaling) == (3, 0.5)
    assert padded.A[1:].tolist() == [[0.0] * 3] * 2
    assert padded.B[:, 1:].tolist() == [[0.0] * 2] * 2
    for other in (folded, padded):
        assert torch.equal(other.delta(), update.delta())
    assert update.padded(1) is update
    with pytest.raises(ValueError, match="cannot pad rank 3 to 2"):
        padded.padded(2)


def test_concat_is_the_sum_worked_out_by_hand():
    other = LowRankUpdate(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[2.0], [4.0]]), 3.0)
    total = concat_updates([LowRankUpdate(A, B, 0.5), other], [2.0, -1.0])
    assert total.delta().tolist() == [[10.0, 14.0, 30.0], [-1.0, -14.0, -3.0]]
    assert (total.rank, total.scaling) == (2, 1.0)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=5
    )
)
def test_concat_is_the_weighted_sum_of_deltas_and_ranks_add(parts):
    updates = [random_update(r, s, seed=i) for i, (r, s, _) in enumerate(parts)]
    weights = [w for _, _, w in parts]
    total = concat_updates(updates, weights)
    expected = sum(w * u.delta() for w, u in zip(weights, updates, strict=True))
    assert total.rank == sum(r for r, _, _ in parts)
    assert torch.allclose(total.delta(), expected, rtol=1e-12, atol=1e-12)


def test_concat_of_one_at_weight_one_is_that_one():
    update = random_update(3, 0.7)
    assert torch.equal(concat_updates([update], [1.0]).delta(), update.folded().delta())


def test_inputs_are_not_changed():
    updates = [random_update(2, 0.5, seed=i) for i in range(2)]
    before = [(u.A.clone(), u.B.clone()) for u in updates]
    concat_updates(updates, [2.0, 3.0])
    for u in updates:
        u.folded()
        u.padded(9)
        u.delta()
    assert all(
        torch.equal(u.A, a) and torch.equal(u.B, b)
        for u, (a, b) in zip(updates, before, strict=True)
    )


@pytest.mark.parametrize(
    ("updates", "weights", "message"),
    [
        ([], [], "got 0 updates and 0 weights"),
        ([random_update(1)], [], "got 1 updates and 0 weights"),
        ([random_update(1)], [1.0, 2.0], "got 1 updates and 2 weights"),
        ([random_update(1), random_update(1, shape=(5, 6))], [1, 1], r"\(5, 6\), \(5, 7\)"),
    ],
)
def test_sums_that_have_no_meaning_are_a_value_error(updates, weights, message):
    with pytest.raises(ValueError, match=message):
        concat_updates(updates, weights)


@pytest.mark.parametrize(
    ("a", "b"), [((2, 3), (5, 3)), ((3,), (5, 3)), ((2, 3), (2,)), ((2, 3, 1), (5, 2))]
)
def test_factors_that_do_not_meet_are_a_value_error(a, b):
    with pytest.raises(ValueError, match="expected A"):
        LowRankUpdate(torch.zeros(a), torch.zeros(b))
