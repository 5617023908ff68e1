"""Directions of inputs: as few as hold the energy, and nothing of A in them."""

import pytest
import torch

from lori_manager.engine.nullspace import leading_directions, outside, response

SIZE = 24


def inputs(seed, decay=0.7, rows=400):
    """Inputs whose energy falls off from direction to direction, each task its own."""
    g = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=g))[0]
    return (torch.randn(rows, SIZE, generator=g) * decay ** torch.arange(SIZE)) @ turned.T


def moments(x):
    return x.T @ x / len(x)


def share_outside(x, Q):
    return float(outside(x, Q).square().sum() / x.double().square().sum())


def orthonormal(Q):
    return torch.allclose(Q.T @ Q, torch.eye(Q.shape[1], dtype=Q.dtype), atol=1e-12)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.9999])
def test_the_directions_hold_the_energy_and_one_fewer_would_not(energy):
    x = inputs(0)
    Q = leading_directions(moments(x), energy)
    assert orthonormal(Q)
    assert share_outside(x, Q) <= 1 - energy
    values = torch.linalg.svdvals(x.double()).square()
    assert float(values[Q.shape[1] - 1 :].sum() / values.sum()) > 1 - energy


def test_known_directions_are_kept_and_every_task_is_held_to_its_share():
    first, second = inputs(1), 1e-3 * inputs(2)  # a task with small inputs counts as much
    Q = leading_directions(moments(first), 0.95)
    wider = leading_directions(moments(second), 0.95, Q)
    assert orthonormal(wider)
    assert float(outside(Q.T, wider).abs().max()) < 1e-12
    assert share_outside(first, wider) <= 0.05
    assert share_outside(second, wider) <= 0.05
    alone = leading_directions(moments(second), 0.95)
    assert Q.shape[1] < wider.shape[1] <= Q.shape[1] + alone.shape[1]


def test_a_task_seen_before_adds_no_direction():
    x = inputs(3)
    Q = leading_directions(moments(x), 0.9)
    assert torch.equal(leading_directions(moments(x), 0.9, Q), Q)
    assert leading_directions(moments(x), 0.0).shape == (SIZE, 0)


def test_what_is_outside_has_no_part_in_the_directions_and_the_rest_is_kept():
    Q = leading_directions(moments(inputs(4)), 0.9)
    A = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(5))
    free = outside(A, Q)
    assert float((free @ Q).abs().max()) < 1e-14
    assert torch.allclose(A.double() - free, A.double() @ Q @ Q.T, atol=1e-12)


def test_inputs_that_span_little_leave_all_else_free():
    Q = leading_directions(moments(inputs(6, rows=3)), 0.999999)
    assert Q.shape == (SIZE, 3)


def test_the_response_is_the_mean_square_of_the_outputs():
    x, A = inputs(7), torch.randn(5, SIZE, generator=torch.Generator().manual_seed(8))
    assert response(A, moments(x)) == pytest.approx(float((x @ A.T).square().sum(1).mean()), 1e-5)


@pytest.mark.parametrize("energy", [1.0, -0.1])
def test_an_impossible_energy_is_a_value_error(energy):
    with pytest.raises(ValueError, match="`energy` must be in"):
        leading_directions(torch.eye(3), energy)
