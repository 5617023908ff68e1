"""What is told of members before a merge, against the dense definitions."""

import math

import pytest
import torch

from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.merging.interference import interference, worst_pair

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = {"a": (7, 6), "b": (5, 6)}


def member(seed, rank=2, scaling=1.5, names=("a", "b"), mask=None):
    g = torch.Generator().manual_seed(seed)
    A = {n: torch.randn(rank, SHAPES[n][1], generator=g) for n in names}
    B = {n: torch.randn(SHAPES[n][0], rank, generator=g) for n in names}
    if mask is not None:
        mask = {n: torch.rand(B[n].shape, generator=g) < mask for n in names}
        B = {n: B[n] * mask[n] for n in names}
    return AdapterWeights((Block(B, scaling, tensors=A, mask=mask),))


def inputs(seed):
    g = torch.Generator().manual_seed(seed + 100)
    return {n: torch.randn(40, s[1], generator=g) for n, s in SHAPES.items()}


def gram(X):
    return {n: x.t() @ x / len(x) for n, x in X.items()}


def test_every_figure_is_its_dense_definition():
    members, X = [member(s) for s in range(3)], [inputs(s) for s in range(3)]
    weights = [0.5, 0.3, 0.2]
    found = interference(members, weights, [gram(x) for x in X])
    D = [{n: u.delta() for n, u in m.updates().items()} for m in members]
    for t in range(3):

        def size(delta, n, t=t):
            return float((X[t][n] @ delta.t()).square().sum(1).mean())

        for s in range(3):
            expected = sum(size(D[s][n], n) / size(D[t][n], n) for n in SHAPES) / 2
            assert found.response[t][s] == pytest.approx(expected, rel=1e-4)
            share = []
            for n in SHAPES:
                qt, qs = (torch.linalg.qr(D[i][n])[0][:, :2] for i in (t, s))
                share.append(float((qt.t() @ qs).square().sum()) / 2)
            assert found.directions[t][s] == pytest.approx(sum(share) / 2, rel=1e-4)
        assert found.response[t][t] == pytest.approx(1)
        assert found.directions[t][t] == pytest.approx(1)
        error = sum(
            size(sum(w * d[n] for w, d in zip(weights, D, strict=True)) - D[t][n], n)
            / size(D[t][n], n)
            for n in SHAPES
        )
        assert found.error[t] == pytest.approx(error / 2, rel=1e-4)


def test_a_member_alone_at_weight_1_has_no_error_and_no_pair():
    found = interference([member(0)], [1.0], [gram(inputs(0))])
    assert found.error[0] == pytest.approx(0, abs=1e-9)
    assert worst_pair(["x"], found) is None


def test_members_whose_inputs_the_others_do_not_answer_do_not_disturb():
    """A's that live on different inputs: no response, and the sum at weight 1 errs in nothing."""
    one, two = member(1), member(2)
    for m, part in ((one, slice(3, 6)), (two, slice(0, 3))):
        for a in m.blocks[0].tensors.values():
            a[:, part] = 0
    X = [inputs(1), inputs(2)]
    for x, part in zip(X, (slice(3, 6), slice(0, 3)), strict=True):
        for values in x.values():
            values[:, part] = 0
    found = interference([one, two], [1.0, 1.0], [gram(x) for x in X])
    assert found.response[0][1] == pytest.approx(0, abs=1e-9)
    assert found.error == pytest.approx((0, 0), abs=1e-9)
    name_a, name_b, loud = worst_pair(["x", "y"], found)
    assert {name_a, name_b} == {"x", "y"}
    assert loud == pytest.approx(0, abs=1e-9)


def test_entries_are_those_of_the_masks_and_nan_where_shapes_differ():
    members = [member(1, mask=0.3), member(2, mask=0.3), member(3, rank=3)]
    found = interference(members, [1, 1, 1], [gram(inputs(s)) for s in range(3)])
    a, b = (m.blocks[0].B for m in members[:2])
    both = sum(int(((a[n] != 0) & (b[n] != 0)).sum()) for n in SHAPES)
    either = sum(int(((a[n] != 0) | (b[n] != 0)).sum()) for n in SHAPES)
    assert found.entries[0][1] == pytest.approx(both / either)
    assert math.isnan(found.entries[0][2])


def test_members_that_share_no_module_tell_nothing_of_each_other():
    members = [member(1, names=("a",)), member(2, names=("b",))]
    found = interference(members, [1, 1], [gram(inputs(s)) for s in range(2)])
    assert math.isnan(found.response[0][1])
    assert found.error[0] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="got 2 members, 1 weights"):
        interference(members, [1], [gram(inputs(0))])
