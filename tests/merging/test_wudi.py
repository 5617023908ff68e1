"""wudi: its closed form against the published objective on dense updates."""

import numpy as np
import pytest
import torch

from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.merging.methods import MergeOptions
from lori_manager.merging.wudi import merge_wudi

pytestmark = pytest.mark.usefixtures("one_thread")


def member(seed, rank=2, shape=(9, 12), scale=1.0, A=None):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, shape[1], generator=g) if A is None else A
    B = scale * torch.randn(shape[0], rank, generator=g)
    return AdapterWeights((Block({"m": B}, 0.5, tensors={"m": A}),))


def dense(weights):
    return sum(b.scaling * b.B["m"].double() @ b.A["m"].double() for b in weights.blocks)


def objective(D, deltas, weights):
    return sum(
        abs(w) / x.square().sum() * ((D - np.sign(w) * x) @ x.t()).square().sum()
        for x, w in zip(deltas, weights, strict=True)
    )


def close(a, b, rtol=1e-5):
    return float((a - b).norm()) <= rtol * float(b.norm())


@pytest.mark.parametrize("weights", [[1 / 3] * 3, [0.2, 0.5, 0.3], [0.5, -0.2, 0.3]])
@pytest.mark.parametrize("shared", [False, True])
def test_it_solves_the_normal_equations_of_the_dense_objective(weights, shared):
    A = torch.randn(2, 12, generator=torch.Generator().manual_seed(9)) if shared else None
    members = [member(i, scale=1.0 + i, A=A) for i in range(3)]
    deltas = [dense(m) for m in members]
    gram = sum(abs(w) / x.square().sum() * x.t() @ x for x, w in zip(deltas, weights, strict=True))
    right = sum(w / x.square().sum() * x @ x.t() @ x for x, w in zip(deltas, weights, strict=True))
    expected = right @ torch.linalg.pinv(gram, rtol=1e-9, hermitian=True)
    merged = dense(merge_wudi(members, weights))
    assert close(merged, expected * sum(map(abs, weights)))


def test_descent_from_the_sum_on_dense_updates_ends_where_it_says():
    """The published loop, with steps enough: the sum has no part that the terms do not see."""
    members = [member(i, scale=1.0 + i) for i in range(3)]
    deltas = [dense(m) for m in members]
    D = sum(deltas).clone().requires_grad_()
    steps = torch.optim.LBFGS(
        [D],
        max_iter=2000,
        tolerance_grad=1e-12,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def loss():
        steps.zero_grad()
        value = objective(D, deltas, [1.0] * 3)
        value.backward()
        return value

    steps.step(loss)
    merged = dense(merge_wudi(members, [1 / 3] * 3))
    assert close(merged, D.detach())
    assert objective(merged, deltas, [1.0] * 3) < objective(sum(deltas), deltas, [1.0] * 3)


def test_members_on_orthogonal_inputs_are_all_kept_whole():
    eye = torch.eye(12)
    members = [member(i, A=eye[2 * i : 2 * i + 2]) for i in range(3)]
    assert close(dense(merge_wudi(members, [1 / 3] * 3)), sum(dense(m) for m in members))


def test_equal_members_are_one_and_a_weight_scales_one():
    one = member(0)
    assert close(dense(merge_wudi([one, one], [0.5, 0.5])), dense(one))
    assert close(dense(merge_wudi([one], [0.3])), 0.3 * dense(one))
    assert close(dense(merge_wudi([one], [-1.0])), -dense(one))


def test_weight_zero_zero_updates_and_missing_modules_do_not_take_part():
    one, other = member(0), member(1)
    both = dense(merge_wudi([one, other], [0.5, 0.5]))
    assert close(dense(merge_wudi([one, member(2), other], [0.5, 0.0, 0.5])), both)
    zero = member(3, scale=0.0)
    assert close(dense(merge_wudi([one, zero, other], [0.25, 0.5, 0.25])), both)
    elsewhere = AdapterWeights(
        (Block({"n": torch.ones(3, 1)}, 1.0, tensors={"n": torch.ones(1, 4)}),)
    )
    merged = merge_wudi([one, elsewhere, other], [0.25, 0.5, 0.25])
    assert merged.modules == ["m", "n"]
    assert close(merged.updates()["m"].delta().double(), both)
    assert not dense(merge_wudi([zero, zero], [0.5, 0.5])).any()


def test_max_rank_is_the_best_of_that_rank_and_members_of_one_a_keep_its_rank():
    members = [member(i) for i in range(3)]
    whole, cut = (dense(merge_wudi(members, [1.0] * 3, MergeOptions(max_rank=r))) for r in (6, 2))
    best = torch.linalg.svdvals(whole)[2:].norm()
    assert torch.linalg.matrix_rank(cut, rtol=1e-5) == 2
    assert float((cut - whole).norm()) == pytest.approx(float(best), rel=1e-4)
    A = torch.randn(2, 12, generator=torch.Generator().manual_seed(9))
    assert merge_wudi([member(i, A=A) for i in range(3)], [1 / 3] * 3).rank == 2
