"""Layers: what they compute, what of them trains, and that they come out without a trace."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lori_manager.engine.layers import (
    LoraLinear,
    LoriLinear,
    LowRankLinear,
    attached,
    linear_shape,
    linear_weight,
    low_rank_layers,
)
from lori_manager.engine.update import LowRankUpdate

IN, OUT, RANK = 6, 5, 3


pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def frozen(kind="linear", dtype=torch.float64):
    torch.manual_seed(0)
    layer = Conv1D(OUT, IN) if kind == "conv" else nn.Linear(IN, OUT, bias=kind == "linear")
    return layer.to(dtype).requires_grad_(False)


def bits(tensor):
    return tensor.detach().contiguous().view(torch.int32).flatten().tolist()


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_weight_of_a_square_layer_is_turned_the_right_way(kind):
    torch.manual_seed(0)
    layer = Conv1D(IN, IN) if kind == "conv" else nn.Linear(IN, IN)
    x = drawn(4, IN, dtype=torch.float32)
    assert torch.allclose(F.linear(x, linear_weight(layer), layer.bias), layer(x), atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "bare", "conv"])
def test_both_factors_train_with_the_gradients_of_the_plain_formula(kind):
    base = frozen(kind)
    x = drawn(2, 4, IN, seed=3).requires_grad_()
    A, B = (nn.Parameter(drawn(*s, seed=5)) for s in ((RANK, IN), (OUT, RANK)))
    layer = LoraLinear(base, A, B, 0.7)
    plain = base(x) + 0.7 * (x @ A.t()) @ B.t()
    assert torch.allclose(layer(x), plain, atol=1e-12)
    seen = drawn(2, 4, OUT, seed=4)
    found, expected = (torch.autograd.grad((y * seen).sum(), (x, A, B)) for y in (layer(x), plain))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_float32_factors_train_over_a_bf16_layer_in_float32():
    base = frozen("bare").to(torch.bfloat16)
    x = drawn(4, IN, dtype=torch.bfloat16).requires_grad_()
    A, B = (nn.Parameter(drawn(*s, dtype=torch.float32)) for s in ((RANK, IN), (OUT, RANK)))
    y = LoraLinear(base, A, B, 2.0)(x)
    y.float().square().sum().backward()
    wide = [t.detach().float().requires_grad_() for t in (x, A, B)]
    exact = F.linear(wide[0], base.weight.float()) + 2.0 * wide[0] @ wide[1].t() @ wide[2].t()
    exact.square().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    for found, other in zip((x, A, B), wide, strict=True):
        assert found.grad.dtype == found.dtype
        error = torch.linalg.norm(found.grad.float() - other.grad)
        assert error < 0.02 * torch.linalg.norm(other.grad)


MASK = drawn(OUT, RANK, seed=9) > 0.3


def test_shapes_of_linear_layers_are_out_by_in_and_of_others_none():
    assert linear_shape(frozen()) == linear_shape(frozen("conv")) == (OUT, IN)
    assert linear_shape(nn.LayerNorm(3)) is None
    assert linear_shape(nn.Embedding(3, 4)) is None


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Linear(4, 3), Conv1D(4, 4), Conv1D(3, 4)])
def test_a_weight_is_out_by_in_also_where_it_is_square(layer):
    x = torch.randn(5, 4)
    assert torch.allclose(x @ linear_weight(layer).t() + layer.bias, layer(x), atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv"])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("grad", [True, False])
def test_both_layers_add_the_dense_update_to_their_base(kind, lead, grad):
    base, A, B, x = frozen(kind), drawn(RANK, IN), drawn(OUT, RANK, seed=1), drawn(*lead, IN)
    before = x.clone()
    expected = base(x) + x @ (0.7 * B @ A).T
    with torch.set_grad_enabled(grad):
        applied = LowRankLinear(base, LowRankUpdate(A, B, 0.7))(x)
        trained = LoriLinear(base, A, 0.7, start=B).double()(x)
    assert torch.allclose(applied, expected, rtol=1e-12)
    assert torch.allclose(trained, expected, rtol=1e-6, atol=1e-6)
    assert applied.shape == trained.shape == (*lead, OUT)
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", ["linear", "no bias"])
@pytest.mark.parametrize("grad", [True, False])
def test_inputs_may_lie_in_memory_in_any_order(kind, grad):
    base, update = frozen(kind), LowRankUpdate(drawn(RANK, IN), drawn(OUT, RANK, seed=1), 0.7)
    x = drawn(IN, 3, 2).permute(2, 1, 0)
    expected = base(x) + x @ update.delta().T
    with torch.set_grad_enabled(grad):
        applied = LowRankLinear(base, update)(x)
        trained = LoriLinear(base, update.A, 0.7, start=update.B).double()(x)
    assert torch.allclose(applied, expected, rtol=1e-12)
    assert torch.allclose(trained, expected, rtol=1e-6, atol=1e-6)


def test_a_layer_that_starts_from_zero_computes_what_its_base_does():
    base, x = frozen(dtype=torch.float32), drawn(4, IN, dtype=torch.float32)
    for mask in (None, MASK, torch.zeros_like(MASK)):
        assert torch.equal(LoriLinear(base, drawn(RANK, IN), 2.0, mask)(x), base(x))


@pytest.mark.parametrize("start", [None, drawn(OUT, RANK, seed=1, dtype=torch.float32)])
def test_only_the_masked_entries_are_parameters(start):
    layer = LoriLinear(frozen(), drawn(RANK, IN), 1.0, MASK, start)
    trainable = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    assert list(trainable) == ["values"]
    assert layer.values.shape == (int(MASK.sum()),)
    assert layer.values.dtype == torch.float32
    assert torch.equal(layer.B(), torch.zeros(OUT, RANK) if start is None else start)


def test_a_step_of_any_size_leaves_the_other_entries_bit_for_bit():
    start = drawn(OUT, RANK, seed=1, dtype=torch.float32)
    start[~MASK] = torch.tensor([-0.0, 1e-42, 3e38]).repeat(5)[: int((~MASK).sum())]
    layer = LoriLinear(frozen(dtype=torch.float32), drawn(RANK, IN), 1.0, MASK, start.clone())
    with torch.no_grad():
        layer.values.add_(1.0)
    assert bits(layer.B()[~MASK]) == bits(start[~MASK])
    assert torch.equal(layer.B()[MASK], start[MASK] + 1)


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("start", [None, drawn(OUT, RANK, seed=1, dtype=torch.float32)])
def test_a_fixed_update_beside_acts_and_no_bit_of_it_trains(mask, start):
    base, A, x = frozen(dtype=torch.float32), drawn(RANK, IN), drawn(4, IN, dtype=torch.float32)
    fixed = LowRankUpdate(drawn(2, IN, seed=5).float(), drawn(OUT, 2, seed=6).float(), 0.5)
    layer = LoriLinear(base, A.float(), 0.25, mask, start, fixed)
    alone = LoriLinear(base, A.float(), 0.25, mask, start)
    expected = alone(x) + x @ fixed.delta().T
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert layer.values.shape == alone.values.shape
    before = layer.B().detach().clone()
    layer(x).square().sum().backward()
    with torch.no_grad():
        layer.values.add_(1.0)
    assert bits(layer.B()[:, : layer.fixed]) == bits(before[:, : layer.fixed])
    moved = (layer.B() - before)[:, layer.fixed :]
    assert torch.allclose(moved, torch.ones_like(moved) if mask is None else mask.float())
    assert (layer.fixed, alone.fixed) == (2, 0)


def test_a_fixed_update_of_another_matrix_is_refused():
    other = LowRankUpdate(drawn(2, IN), drawn(OUT + 1, 2))
    with pytest.raises(ValueError, match="does not fit"):
        LoriLinear(frozen(), drawn(RANK, IN), 1.0, beside=other)


def test_gradients_are_those_of_a_dense_B_at_the_masked_places():
    base, A, x = frozen(), drawn(RANK, IN), drawn(7, IN, seed=3)
    start = drawn(OUT, RANK, seed=1)
    dense = start.clone().requires_grad_()
    F.linear(x, base.weight + 0.7 * dense @ A, base.bias).pow(2).sum().backward()
    layer = LoriLinear(base, A, 0.7, MASK, start).double()
    with torch.no_grad():
        layer.values.copy_(start[MASK])
        layer.rest.copy_(start.masked_fill(MASK, 0).flatten())
    layer(x).pow(2).sum().backward()
    assert torch.allclose(layer.values.grad, dense.grad[MASK], rtol=1e-10)


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv"])
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("lead", [(7,), (2, 3)])
def test_gradients_of_values_and_of_inputs_are_those_of_finite_differences(kind, mask, lead):
    layer = LoriLinear(frozen(kind), drawn(RANK, IN), 0.7, mask, drawn(OUT, RANK, seed=1)).double()
    x = drawn(*lead, IN, seed=3).requires_grad_()

    def answer(x, values):
        return torch.func.functional_call(layer, {"values": values}, (x,))

    assert torch.autograd.gradcheck(answer, (x, layer.values.detach().requires_grad_()))


def test_values_get_a_gradient_where_inputs_need_none_and_inputs_where_values_need_none():
    layer = LoriLinear(frozen(), drawn(RANK, IN), 0.7, MASK, drawn(OUT, RANK, seed=1)).double()
    layer(drawn(4, IN)).sum().backward()
    assert bool(layer.values.grad.any())
    layer.values.requires_grad_(False)
    x = drawn(4, IN).requires_grad_()
    layer(x).sum().backward()
    expected = layer.base.weight.sum(0) + (0.7 * layer.B() @ layer.A).sum(0)
    assert torch.allclose(x.grad, expected.expand(4, IN))


def test_a_bfloat16_layer_keeps_float32_values_and_answers_in_bfloat16():
    layer = LoriLinear(frozen(dtype=torch.bfloat16), drawn(RANK, IN), 1.0, MASK)
    assert (layer.A.dtype, layer.values.dtype) == (torch.bfloat16, torch.float32)
    out = layer(drawn(2, IN).bfloat16())
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.values.grad.dtype == torch.float32


def test_what_was_trained_and_what_is_applied_answer_bit_for_bit_alike():
    for dtype in (torch.float32, torch.bfloat16):
        base, A, B = frozen(dtype=dtype), drawn(RANK, IN).float(), drawn(OUT, RANK, seed=1).float()
        x = drawn(4, IN, seed=2).to(dtype)
        trained = LoriLinear(base, A, 0.7, MASK, B)
        with torch.inference_mode():
            applied = LowRankLinear(base, LowRankUpdate(A, B, 0.7))(x)
        assert torch.equal(trained(x), applied)


def test_a_deep_copy_trains_apart_and_still_under_its_mask():
    layer = LoriLinear(frozen(dtype=torch.float32), drawn(RANK, IN), 1.0, MASK)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.values.fill_(1.0)
    assert not layer.B().any()
    assert torch.equal(other.B() != 0, MASK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"A": drawn(RANK, IN + 1)}, "does not fit a layer of shape"),
        ({"mask": MASK.T}, r"mask \(3, 5\) does not fit B \(5, 3\)"),
        ({"start": drawn(OUT, RANK + 1)}, r"start \(5, 4\) does not fit B \(5, 3\)"),
        ({"base": nn.LayerNorm(IN)}, "layer of shape None"),
    ],
)
def test_shapes_that_do_not_belong_together_are_a_value_error(arguments, message):
    given = {"base": frozen(), "A": drawn(RANK, IN), "scaling": 1.0} | arguments
    with pytest.raises(ValueError, match=message):
        LoriLinear(**given)


def test_an_update_of_another_shape_is_a_value_error():
    with pytest.raises(ValueError, match="does not fit a layer"):
        LowRankLinear(frozen(), LowRankUpdate(drawn(RANK, OUT), drawn(IN, RANK)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(frozen()), nn.Sequential(frozen())])
        self.head = frozen()

    def forward(self, x):
        return [self.blocks[0](x), self.blocks[1](x), self.head(x)]


def update(seed):
    return LowRankUpdate(drawn(RANK, IN, seed=seed), drawn(OUT, RANK, seed=seed + 1), 0.5)


def test_attached_layers_act_inside_and_leave_the_very_same_model():
    net, x = Net(), drawn(2, IN)
    before, modules = net(x), dict(net.named_modules())
    layers = low_rank_layers(net, {"blocks.1.0": update(1), "head": update(2)})
    with attached(net, layers):
        a, b, c = net(x)
        assert torch.equal(a, before[0])
        assert torch.allclose(b, before[1] + x @ update(1).delta().T)
        assert torch.allclose(c, before[2] + x @ update(2).delta().T)
    assert dict(net.named_modules()) == modules
    assert all(torch.equal(p, q) for p, q in zip(net(x), before, strict=True))


def test_attached_layers_come_out_when_the_work_inside_fails():
    net = Net()
    modules = dict(net.named_modules())
    with (
        pytest.raises(RuntimeError, match="stop"),
        attached(net, low_rank_layers(net, {"head": update(1)})),
    ):
        raise RuntimeError("stop")
    assert dict(net.named_modules()) == modules


@pytest.mark.parametrize("name", ["tail", "blocks.2.0", "blocks.0.0.deeper", "nowhere.head"])
def test_a_name_that_the_model_lacks_is_a_key_error_and_changes_nothing(name):
    net = Net()
    modules = dict(net.named_modules())
    layers = {**low_rank_layers(net, {"head": update(1)}), name: nn.Identity()}
    with pytest.raises(KeyError, match=name), attached(net, layers):
        pass
    assert dict(net.named_modules()) == modules


def test_attaching_nothing_is_allowed():
    with attached(Net(), {}):
        pass
