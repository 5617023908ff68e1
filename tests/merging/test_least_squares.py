"""One module's regression, against numpy's least squares on the very rows."""

import numpy as np
import pytest
import torch

from lori_manager.engine.update import LowRankUpdate
from lori_manager.merging.least_squares import LeastSquares, Moments, Part

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = 1e-10  # an eps that decides nothing


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def updates(out, inner, ranks, seed=0):
    return [
        LowRankUpdate(drawn(seed + 10 * i, r, inner), drawn(seed + 10 * i + 1, out, r), 0.5 + i)
        for i, r in enumerate(ranks)
    ]


class Problem:
    """Members with inputs of their own, and the same as one dense least-squares problem."""

    def __init__(self, out=7, inner=5, ranks=(2, 3), tokens=40, weights=(0.3, 0.7), seed=0):
        self.W = drawn(seed + 100, out, inner)
        self.updates = updates(out, inner, ranks, seed)
        self.x = [drawn(seed + 200 + i, tokens, inner) for i in range(len(ranks))]
        self.z = [x + 0.3 * drawn(seed + 300 + i, *x.shape) for i, x in enumerate(self.x)]
        self.weights = weights

    def fit(self, order=None):
        order = list(range(len(self.updates))) if order is None else order
        moments = Moments(self.W.shape[1], self.W.device)
        parts = [Part(t, self.updates[i]) for t, i in enumerate(order)]
        found = LeastSquares(self.W, parts, moments)
        for t, i in enumerate(order):
            share = torch.full((len(self.x[i]),), self.weights[i] / len(self.x[i]))
            moments.add(self.z[i], share)
            found.add(t, self.x[i], self.z[i], share)
        return found

    def rows(self):
        """The weighted inputs (n, inner) and what shall be added to them, (n, out)."""
        Z, Y = [], []
        for u, x, z, w in zip(self.updates, self.x, self.z, self.weights, strict=True):
            root = (w / len(x)) ** 0.5
            W = self.W.double()
            y = x.double() @ (W + u.scaling * u.B.double() @ u.A.double()).t() - z.double() @ W.t()
            Z.append(root * z.double().numpy())
            Y.append(root * y.numpy())
        return np.concatenate(Z), np.concatenate(Y)


@pytest.mark.parametrize("out", [7, 4])  # taller and wider than the inputs are many
@pytest.mark.parametrize("rank", [None, 1, 2, 3, 99])
def test_free_is_the_least_squares_solution_cut_where_it_errs_least_on_the_inputs(out, rank):
    problem = Problem(out=out)
    Z, Y = problem.rows()
    whole = np.linalg.lstsq(Z, Y, rcond=None)[0].T
    # Cut on the inputs: the leading directions of what it gives for the very rows.
    given = Z @ whole.T
    wanted = min(sum(u.rank for u in problem.updates) if rank is None else rank, *whole.shape)
    right = np.linalg.svd(given, full_matrices=False)[2][:wanted].T
    expected = right @ right.T @ whole
    found = problem.fit().free(TINY, rank)
    assert found.rank == wanted
    assert np.allclose(found.delta().numpy(), expected, rtol=1e-4, atol=1e-5)
    error = np.square(Y - Z @ found.delta().double().numpy().T).sum()
    assert error <= np.square(Y - Z @ expected.T).sum() * (1 + 1e-6)


def test_a_free_update_of_more_rank_than_there_is_adds_nothing():
    """Inputs of two directions alone: what is beyond them is noise of rounding, not of size."""
    problem = Problem(ranks=(1, 1))
    plane = drawn(9, 2, 5)
    problem.x = [x[:, :2] @ plane for x in problem.x]
    problem.z = [z[:, :2] @ plane for z in problem.z]
    found = problem.fit().free(1e-6, 5)
    assert torch.isfinite(found.delta()).all()
    less = problem.fit().free(1e-6, 2)
    seen = problem.z[0] @ (found.delta() - less.delta()).t()
    assert seen.norm() < 1e-3 * (problem.z[0] @ found.delta().t()).norm()


def test_re_aimed_is_least_squares_among_the_updates_that_the_given_bs_can_make():
    problem = Problem(out=9, ranks=(2, 1))
    Z, Y = problem.rows()
    B = np.concatenate([(u.B * u.scaling).double().numpy() for u in problem.updates], axis=1)
    # vec(Z A' B') = (B kron Z) vec(A'), by columns.
    flat = np.linalg.lstsq(np.kron(B, Z), Y.T.reshape(-1), rcond=None)[0]
    expected = flat.reshape(B.shape[1], Z.shape[1])
    found = problem.fit().re_aimed(TINY)
    assert [a.shape for a in found] == [(2, 5), (1, 5)]
    assert np.allclose(torch.cat(found).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_order_of_the_members_does_not_matter():
    problem = Problem(ranks=(2, 1, 1), weights=(0.2, 0.3, 0.5))
    one, other = problem.fit(), problem.fit([2, 0, 1])
    assert torch.allclose(one.free(1e-2, 2).delta(), other.free(1e-2, 2).delta(), atol=1e-5)
    a, b = one.re_aimed(1e-2), other.re_aimed(1e-2)
    for i, place in enumerate([2, 0, 1]):
        assert torch.allclose(b[i], a[place], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.25])
@pytest.mark.parametrize("eps", [1e-1, 1e-6])
def test_one_member_on_its_own_inputs_comes_back_whatever_its_weight(weight, eps):
    problem = Problem(ranks=(2,), weights=(weight,))
    problem.z = problem.x
    (update,) = problem.updates
    assert torch.allclose(problem.fit().free(eps, None).delta(), update.delta(), atol=1e-5)
    (A,) = problem.fit().re_aimed(eps)
    assert torch.allclose(A, update.A, atol=1e-5)


def test_without_any_input_the_mean_of_the_updates_is_what_is_left():
    problem = Problem()
    problem.x = problem.z = [torch.zeros(4, 5) for _ in problem.updates]
    mean = sum(u.delta() for u in problem.updates) / 2
    assert torch.allclose(problem.fit().free(1e-2, None).delta(), mean, atol=1e-5)


def test_a_member_without_the_module_answers_with_the_base_alone():
    """It has inputs there and no update: it holds the others back."""
    problem = Problem(ranks=(2, 1))
    problem.z = problem.x
    moments = Moments(5, problem.W.device)
    fit = LeastSquares(problem.W, [Part(0, problem.updates[0])], moments)
    share = torch.full((40,), 0.5 / 40)
    for member in (0, 1):
        moments.add(problem.x[member], share)
        fit.add(member, problem.x[member], problem.x[member], share)
    X = torch.cat(problem.x).double().numpy()
    delta = problem.updates[0].delta().double().numpy()
    Y = np.concatenate([problem.x[0].double().numpy() @ delta.T, np.zeros((40, 7))])
    expected = np.linalg.lstsq(X, Y, rcond=None)[0].T
    assert np.allclose(fit.free(TINY, None).delta().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_stored_bf16_b_is_scaled_in_float32():
    B, A = drawn(1, 7, 2).bfloat16(), drawn(2, 2, 5)
    problem = Problem(ranks=(2,), weights=(1.0,))
    problem.updates, problem.z = [LowRankUpdate(A, B, 0.7)], problem.x
    exact = 0.7 * B.float() @ A
    assert torch.allclose(problem.fit().free(TINY, None).delta(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shrink", [0.0, 0.7])
def test_a_shrinkage_multiplies_the_moments_and_cross_moments_off_the_diagonal(shrink):
    """Against the normal equations written down with shrunk matrices, base and all."""
    problem = Problem(ranks=(2, 1), out=4)
    moments = Moments(5, problem.W.device, shrink)
    parts = [Part(t, u) for t, u in enumerate(problem.updates)]
    fit = LeastSquares(problem.W, parts, moments)
    silent = drawn(77, 40, 5)  # of a member without the module: the base is to answer it
    off = shrink + (1 - shrink) * np.eye(5)
    left, right = np.zeros((5, 5)), np.zeros((4, 5))
    given = [*zip(problem.x, problem.z, (0.3, 0.7), strict=True), (silent, 1.3 * silent, 0.2)]
    for t, (x, z, weight) in enumerate(given):
        share = torch.full((40,), weight / 40)
        moments.add(z, share)
        fit.add(t, x, z, share)
        X, Z, W = (m.double().numpy() for m in (x, z, problem.W))
        own = problem.updates[t].delta().double().numpy() if t < 2 else 0.0
        left += weight / 40 * off * (Z.T @ Z)
        right += (W + own) @ (weight / 40 * off * (X.T @ Z)) - W @ (weight / 40 * off * (Z.T @ Z))
    expected = right @ np.linalg.inv(left)
    found = fit.free(TINY, 5)
    assert np.allclose(found.delta().numpy(), expected, rtol=1e-4, atol=1e-5)
