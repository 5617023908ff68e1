"""Frozen matrices in e4m3: rounding, products, gradients, layers; kernels on a Hopper GPU."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lori_manager.engine import fp8, kernels
from lori_manager.engine.fp8 import (
    E4M3,
    Fp8Linear,
    Matrix,
    check_device,
    fp8_plus_low_rank,
    fp8_side_by_side,
    inputs_unrounded,
    quantize_base,
    quantize_matrix,
    quantize_rows,
)
from lori_manager.engine.layers import LoriLinear, LowRankLinear, linear_shape
from lori_manager.engine.siblings import Group
from lori_manager.engine.update import LowRankUpdate
from lori_manager.errors import InvalidInput

pytestmark = pytest.mark.usefixtures("one_thread")
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and kernels.available(0)), reason="needs a Hopper GPU"
)


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def off(got, expected):
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm())


def same_bits(a, b):
    return torch.equal(a.view(torch.uint8).cpu(), b.view(torch.uint8).cpu())


def uneven(rows, columns):
    """Rows of very different sizes, entries of eight binades."""
    sizes = torch.logspace(-20, 20, rows, dtype=torch.float64)[:, None]
    spread = torch.exp2(8 * drawn(rows, columns, seed=1).clamp(-1, 1)).double()
    return (drawn(rows, columns).double() * spread * sizes).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_entry_is_rounded_to_the_nearest_of_its_rows_numbers(dtype):
    x = uneven(9, 400).to(dtype)
    values, scale = quantize_rows(x)
    assert (values.dtype, scale.dtype, scale.shape) == (E4M3, torch.float32, (9, 1))
    assert torch.allclose(scale, x.float().abs().amax(1, keepdim=True) / 448, rtol=1e-6)
    # Half a step: 1/16 of a number at most, of subnormal ones 2^-10 of the scale.
    half = torch.maximum(x.float().abs() / 16, scale * 2.0**-10)
    assert bool(((values.float() * scale - x.float()).abs() <= half * 1.0001).all())
    largest = x.float().abs().argmax(1, keepdim=True)
    assert bool((values.float().gather(1, largest).abs() == 448).all())


def test_rows_of_nothing_stay_rows_of_nothing():
    x = torch.zeros(3, 16)
    x[1, 2] = 1e-38
    values, scale = quantize_rows(x)
    assert not values.float().any()
    assert bool((scale > 0).all())
    assert bool((1 / scale).isfinite().all())
    assert quantize_rows(x[:0]).values.shape == (0, 16)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_a_row_that_is_not_finite_stays_so_and_spoils_no_other(bad):
    x, W = drawn(3, 32), quantize_matrix(drawn(16, 32, seed=1))
    x[1, 4] = bad
    (y,) = fp8_plus_low_rank(x, W, None, torch.zeros(2, 32), [torch.zeros(16, 2)], (16,))
    z = F.linear(x, torch.zeros(2, 32))  # NaN as well: the low-rank part hides nothing here
    alone = fp8._product(quantize_rows(x), W.rows, W.scale, x.dtype)
    assert bool(z[1].isnan().all())
    assert bool(alone[1].isnan().all())
    assert bool(y[[0, 2]].isfinite().all())
    assert bool(alone[[0, 2]].isfinite().all())


def test_parts_count_as_one_matrix_and_columns_are_multiplied_first():
    x, by = drawn(5, 48), drawn(48, seed=1).abs()
    parts = [x[:, :16], x[:, 16:24], x[:, 24:]]
    whole, cut = quantize_rows(x * by), quantize_rows(parts, by)
    assert same_bits(whole.values, cut.values)
    assert torch.equal(whole.scale, cut.scale)


def test_a_product_is_off_by_about_three_percent():
    x, W = drawn(64, 512), drawn(48, 512, seed=1)
    matrix = quantize_matrix(W)
    y = fp8._product(quantize_rows(x), matrix.rows, matrix.scale, x.dtype)
    assert 0.02 < off(matrix.wide(), W) < 0.03
    assert 0.02 < off(y, x @ W.t()) < 0.04


def test_rows_that_differ_in_size_need_scales_of_their_own():
    """One scale for all loses what small rows hold; that is why there is one a row."""
    x, W = uneven(8, 256), quantize_matrix(drawn(32, 256, seed=1))
    y = x @ W.wide().t()
    got = fp8._product(quantize_rows(x), W.rows, W.scale, x.dtype)
    one = x.abs().max() / 448
    tensorwise = ((x / one).to(E4M3).float() * one) @ W.wide().t()
    for row in range(8):
        assert off(got[row], y[row]) < 0.05
    assert off(tensorwise[0], y[0]) > 0.9


def test_both_orders_hold_the_same_numbers_in_the_bytes_of_bf16():
    W = drawn(48, 32)
    matrix = quantize_matrix(W)
    assert matrix.shape == (48, 32)
    assert same_bits(matrix.columns.t().contiguous(), matrix.rows)
    assert matrix.rows.nbytes + matrix.columns.nbytes == W.bfloat16().nbytes
    assert torch.equal(torch.cat([part.wide() for part in matrix.split([16, 32])]), matrix.wide())


def test_the_emulation_gives_what_torch_multiplies():
    x, W = quantize_rows(drawn(20, 64)), quantize_matrix(drawn(48, 64, seed=1))
    bias = drawn(48, seed=2).bfloat16()
    try:
        y = torch._scaled_mm(x.values, W.rows.t(), scale_a=x.scale, scale_b=W.scale, bias=bias,
                             out_dtype=torch.bfloat16, use_fast_accum=True)  # fmt: skip
    except RuntimeError as e:
        pytest.skip(f"this torch does not multiply e4m3 by rows on the CPU: {e}")
    got = fp8._product(x, W.rows, W.scale, torch.bfloat16, bias)
    assert off(got, y) < 2e-3


GROUPS = [(48,), (32, 16), (16, 16, 32)]


@pytest.mark.parametrize("widths", GROUPS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
def test_without_rounding_of_inputs_it_is_autograd_over_the_numbers_held(widths, bias, diagonal):
    out, rank, inner = sum(widths), 3, 32
    x, A = drawn(7, inner), drawn(rank * len(widths), inner, seed=1)
    W = quantize_matrix(drawn(out, inner, seed=2))
    b = drawn(out, seed=3) if bias else None
    Bs = [drawn(w, rank, seed=4 + i) for i, w in enumerate(widths)]
    B = torch.block_diag(*Bs)
    given = [B] if diagonal else Bs
    dys = [drawn(7, w, seed=9 + i) for i, w in enumerate(widths)]

    def ours(x, *Bs):
        return fp8_plus_low_rank(x, W, b, A, Bs, widths)

    def plain(x, *Bs):
        B = Bs[0] if diagonal else torch.block_diag(*Bs)
        y = F.linear(x, W.wide(), b) + F.linear(F.linear(x, A), B)
        return y.split(widths, 1)

    def gradients(function):
        leaves = [t.clone().requires_grad_() for t in (x, *given)]
        ys = function(*leaves)
        torch.autograd.backward(ys, dys)
        return [*(y.detach() for y in ys), *(leaf.grad for leaf in leaves)]

    with inputs_unrounded():
        exact = gradients(ours)
    rounded = gradients(ours)
    for one, two, expected in zip(exact, rounded, gradients(plain), strict=True):
        assert off(one, expected) < 1e-6
        assert off(two, expected) < 0.04
    assert off(rounded[0], exact[0]) > 0.005  # it does round
    assert off(rounded[len(widths)], exact[len(widths)]) > 0.005
    for one, two in zip(exact[len(widths) + 1 :], rounded[len(widths) + 1 :], strict=True):
        assert torch.equal(one, two)  # B's gradient sees no e4m3


def test_a_gated_feed_forward_is_its_parts():
    n, inner, f, rank = 6, 32, 48, 2
    W, W_down = quantize_matrix(drawn(2 * f, inner)), quantize_matrix(drawn(inner, f, seed=1))
    A, A_down = drawn(2 * rank, inner, seed=2), drawn(rank, f, seed=3)
    B = torch.block_diag(drawn(f, rank, seed=4), drawn(f, rank, seed=5))
    B_down, x, dy = drawn(inner, rank, seed=6), drawn(n, inner, seed=7), drawn(n, inner, seed=8)

    def plain(x, B, B_down):
        g, u = (F.linear(x, W.wide()) + x @ A.t() @ B.t()).chunk(2, 1)
        h = F.silu(g) * u
        return F.linear(h, W_down.wide()) + h @ A_down.t() @ B_down.t()

    def ours(x, B, B_down):
        return fp8.gated_mlp(x, W, A, B, W_down, A_down, B_down)

    def gradients(function):
        leaves = [t.clone().requires_grad_() for t in (x, B, B_down)]
        y = function(*leaves)
        y.backward(dy)
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    with inputs_unrounded():
        exact = gradients(ours)
    for one, two, expected in zip(exact, gradients(ours), gradients(plain), strict=True):
        assert off(one, expected) < 1e-5
        assert off(two, expected) < 0.1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,)])
def test_a_layer_computes_what_its_matrix_does(bias, lead):
    weight, b = drawn(48, 32), drawn(48, seed=1) if bias else None
    layer, x = Fp8Linear(weight, b), drawn(*lead, 32, seed=2).requires_grad_()
    y = layer(x)
    expected = F.linear(x, layer.matrix.wide(), b)
    assert y.shape == (*lead, 48)
    assert linear_shape(layer) == (48, 32)
    assert not any(p.requires_grad for p in layer.parameters())
    y.sum().backward()
    dx = torch.ones(*lead, 48) @ layer.matrix.wide()
    if x.numel():
        assert off(y.detach(), expected.detach()) < 0.05
        assert off(x.grad, dx) < 0.04


def test_a_layer_refuses_sides_and_values_that_it_cannot_hold():
    with pytest.raises(ValueError, match="divisible by 16"):
        Fp8Linear(drawn(48, 24))
    weight = drawn(16, 16)
    weight[3, 5] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        Fp8Linear(weight)


def lori_layers(bases, seed=0):
    return [
        LoriLinear(base, drawn(2, base.in_features, seed=seed + i), 0.5,
                   start=drawn(base.out_features, 2, seed=seed + 9 + i))
        for i, base in enumerate(bases)
    ]  # fmt: skip


def test_lori_and_applied_layers_stand_over_it():
    base, x = Fp8Linear(drawn(48, 32).bfloat16()), drawn(5, 32, seed=1).bfloat16()
    A, B = drawn(4, 32, seed=2), drawn(48, 4, seed=3)
    expected = base(x).float() + x.float() @ (0.5 * B @ A).t()
    trained = LoriLinear(base, A, 0.5, start=B)
    applied = LowRankLinear(base, LowRankUpdate(A, B, 0.5))
    assert trained.A.dtype == applied.A.dtype == torch.bfloat16
    with torch.no_grad():
        assert off(applied(x), expected) < 0.01
    y = trained(x.requires_grad_())
    assert off(y.detach(), expected) < 0.01
    y.float().sum().backward()
    assert bool(trained.values.grad.any())
    assert bool(x.grad.any())


class Fp8Group(Group):
    """The group over matrices in e4m3."""

    def laid(self):
        if self._laid is None:
            W, b = fp8_side_by_side([layer.base for layer in self.layers])
            self._laid = W, b, torch.cat([layer.A for layer in self.layers])
        return self._laid

    def _compute(self, x, *widths):
        W, b, A = self.laid()
        rows, Bs = x.reshape(-1, x.shape[-1]), self.factors(x.dtype)
        ys = fp8_plus_low_rank(rows, W, b, A, Bs, widths or (W.shape[0],))
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


def test_siblings_compute_together_what_they_compute_apart():
    bases = [Fp8Linear(drawn(w, 32, seed=w), drawn(w) if w == 16 else None) for w in (48, 16, 32)]
    x = drawn(2, 3, 32)
    apart = lori_layers(bases)
    for layer in apart:
        layer.group = Fp8Group([layer])
    together = lori_layers(bases)

    def run(layers):
        given = x.clone().requires_grad_()
        ys = [layer.group.output(given, layer) for layer in layers]
        sum((y * drawn(*y.shape, seed=3)).sum() for y in ys).backward()
        return [y.detach() for y in ys], given.grad, [layer.values.grad for layer in layers]

    before = run(apart)
    group = Fp8Group(together)
    for layer in together:
        layer.group = group
    after = run(together)
    for same in (0, 2):
        for one, two in zip(before[same], after[same], strict=True):
            assert off(two, one) < 1e-5
    assert off(after[1], before[1]) < 0.04  # rounded together, not each by itself


def test_joined_layers_keep_their_numbers_and_hold_nothing_twice():
    layers = [Fp8Linear(drawn(w, 32, seed=w)) for w in (48, 16, 32)]
    before = [layer.matrix.wide() for layer in layers]
    whole, bias = fp8_side_by_side(layers)
    assert bias is None
    assert whole.shape == (96, 32)
    assert torch.equal(whole.wide(), torch.cat(before))
    assert same_bits(whole.columns.t().contiguous(), whole.rows)
    for layer, expected in zip(layers, before, strict=True):
        assert torch.equal(layer.matrix.wide(), expected)
        assert same_bits(layer.columns.t().contiguous(), layer.rows)
        for part, joined in ((layer.rows, whole.rows), (layer.columns, whole.columns)):
            storages = [t.untyped_storage().data_ptr() for t in (part, joined)]
            assert storages[0] == storages[1]
    for chosen in (layers, layers[:2]):  # what lies side by side stays where it is
        again, _ = fp8_side_by_side(chosen)
        assert again.rows.data_ptr() == whole.rows.data_ptr()
        assert again.columns.data_ptr() == whole.columns.data_ptr()
        assert again.columns.stride() == (96, 1)
    first_and_last, _ = fp8_side_by_side([layers[0], layers[2]])
    assert torch.equal(first_and_last.wide(), torch.cat([before[0], before[2]]))
    x = drawn(4, 32).requires_grad_()
    layers[1](x).sum().backward()
    assert off(x.grad, torch.ones(4, 16) @ before[1]) < 0.04


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.fits, self.narrow = nn.Linear(32, 48), nn.Linear(32, 40, bias=False)
        self.conv = Conv1D(16, 32)
        self.head = nn.Linear(32, 64)


def test_linear_layers_that_fit_are_replaced_and_the_others_counted(caplog):
    model = Parts().requires_grad_(False)
    x = drawn(3, 32)
    before = {name: module(x) for name, module in model.named_children()}
    with caplog.at_level(logging.INFO, "lori_manager"):
        assert quantize_base(model, ["fits", "narrow", "conv"]) == 2
    kinds = [type(m) for m in model.children()]
    assert kinds == [Fp8Linear, nn.Linear, Fp8Linear, nn.Linear]
    for name, module in model.named_children():
        assert off(module(x), before[name]) < 0.05
    assert [r.message for r in caplog.records] == [
        "fp8: 1 of 3 linear layers have a side that 16 does not divide and stay in bf16"
    ]


def test_weights_that_are_not_finite_are_refused_by_name():
    model = Parts().requires_grad_(False)
    model.conv.weight[0, 0] = float("nan")
    with pytest.raises(InvalidInput, match="conv cannot be held in fp8"):
        quantize_base(model, ["conv"])


def test_devices_without_such_products_are_refused(monkeypatch, caplog):
    check_device("cpu")
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    with pytest.raises(InvalidInput, match="needs an NVIDIA GPU, not mps"):
        check_device("mps")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(InvalidInput, match=r"8\.9 or more .* this one has 8\.0: give bf16"):
        check_device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_device("cuda:0")


def on_gpu(*shape, seed=0, scale=1.0):
    return (drawn(*shape, seed=seed) * scale).cuda().bfloat16()


@gpu
@needs_gpu
@pytest.mark.parametrize("n", [1, 300])
@pytest.mark.parametrize("widths", [(576,), (4096,), (14336,), (28672,), (4096, 1024, 1024),
                                    (14336, 14336), (96, 48)])  # fmt: skip
def test_the_gpu_rounds_as_the_cpu_does(n, widths):
    parts = [on_gpu(n, w, seed=i, scale=10.0 ** (i - 1)) for i, w in enumerate(widths)]
    parts[0][-1] = 0
    parts = [*parts[:-1], torch.cat([parts[-1], parts[-1]], 1)[:, : widths[-1]]]  # not contiguous
    by = drawn(sum(widths), seed=7).abs()
    for factor in (None, by):
        got = quantize_rows(parts, None if factor is None else factor.cuda())
        expected = quantize_rows([part.cpu() for part in parts], factor)
        assert torch.equal(got.scale.cpu(), expected.scale)
        assert same_bits(got.values, expected.values)


@gpu
@needs_gpu
def test_the_gpu_passes_on_what_is_not_finite():
    x = on_gpu(4, 1024)
    x[1, 5], x[2, 7] = float("inf"), float("nan")
    W = quantize_matrix(on_gpu(64, 1024, seed=1))
    y = fp8._product(quantize_rows(x), W.rows, W.scale, x.dtype)
    assert y.isnan().any(1).tolist() == [False, True, True, False]


@gpu
@needs_gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", [1, 17, 300, 2501])
@pytest.mark.parametrize(("out", "inner"), [(1024, 4096), (1040, 1040), (48, 64)])
def test_products_of_any_number_of_rows(n, out, inner, bias):
    x, W = quantize_rows(on_gpu(n, inner)), quantize_matrix(on_gpu(out, inner, seed=1))
    b = on_gpu(out, seed=2, scale=10) if bias else None
    got = fp8._product(x, W.rows, W.scale, torch.bfloat16, b)
    expected = x.wide() @ W.wide().t() + (0 if b is None else b.float())
    assert off(got, expected) < 5e-3


@gpu
@needs_gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [8, 32, 96])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("n", "out", "inner"), [(2048, 1024, 4096), (2501, 1104, 1040)])
def test_one_kernel_adds_the_low_rank_part(n, out, inner, turned, rank, bias):
    x, W = quantize_rows(on_gpu(n, inner)), quantize_matrix(on_gpu(out, inner, seed=1))
    z, b = on_gpu(n, rank, seed=2), on_gpu(out, seed=3, scale=10) if bias else None
    C = on_gpu(out, rank, seed=4, scale=3).t() if turned else on_gpu(rank, out, seed=4, scale=3)
    assert fp8._takes(x.values, W.rows, z, C)
    got = fp8._product(x, W.rows, W.scale, z.dtype, b, (z, C))
    plain = x.wide() @ W.wide().t()
    assert off(got, plain + z.float() @ C.float() + (0 if b is None else b.float())) < 5e-3
    assert off(got, plain) > 0.02


@gpu
@needs_gpu
@pytest.mark.parametrize("n", [256, 2304])
@pytest.mark.parametrize("widths", [(1536,), (1024, 1024), (1024, 256, 256)])
def test_a_group_on_the_gpu_has_the_gradients_of_the_emulation(n, widths):
    inner, rank = 1024, 16
    total, count = sum(widths), len(widths)
    x, A = on_gpu(n, inner), on_gpu(rank * count, inner, seed=1, scale=0.05)
    layers = [Fp8Linear(on_gpu(w, inner, seed=i)) for i, w in enumerate(widths)]
    W, _ = fp8_side_by_side(layers)
    B = torch.block_diag(*[drawn(w, rank) * 0.3 for w in widths]).cuda().bfloat16()
    dys = [on_gpu(n, w, seed=5) for w in widths]

    def gradients(x, W, A, B, dys):
        x, B = (t.clone().requires_grad_() for t in (x, B))
        ys = fp8_plus_low_rank(x, W, None, A, [B], widths)
        torch.autograd.backward(ys, dys)
        return torch.cat(ys, 1).detach(), x.grad, B.grad

    got = gradients(x, W, A, B, dys)
    there = Matrix(*(t.cpu() for t in (W.rows, W.columns, W.scale, W.ones)))
    expected = gradients(x.cpu(), there, A.cpu(), B.cpu(), [dy.cpu() for dy in dys])
    assert W.shape == (total, inner)
    for one, two in zip(got, expected, strict=True):
        assert off(one.cpu(), two) < 1e-2


@gpu
@needs_gpu
@pytest.mark.parametrize(("n", "f"), [(2050, 1504), (300, 14336)])
def test_gating_and_rounding_in_one_kernel(n, f):
    both, dh, by = on_gpu(n, 2 * f), on_gpu(n, f, seed=1), drawn(2 * f, seed=2).abs()
    h, rows = fp8._gate(both)
    expected, _ = fp8._gate(both.cpu())
    assert off(h.cpu(), expected) < 3e-3
    again = quantize_rows(h.cpu())
    assert torch.equal(rows.scale.cpu(), again.scale)
    assert same_bits(rows.values, again.values)
    dboth, rows = fp8._gate_gradient(both, dh, by.cuda())
    expected, _ = fp8._gate_gradient(both.cpu(), dh.cpu(), by)
    assert off(dboth.cpu(), expected) < 3e-3
    again = quantize_rows(dboth.cpu(), by)
    assert torch.equal(rows.scale.cpu(), again.scale)
    assert same_bits(rows.values, again.values)


@gpu
@needs_gpu
@pytest.mark.parametrize("n", [256, 2304])
def test_a_gated_feed_forward_on_the_gpu_is_the_emulated_one(n):
    inner, f, rank = 1024, 1536, 16
    W = quantize_matrix(on_gpu(2 * f, inner, scale=0.03))
    W_down = quantize_matrix(on_gpu(inner, f, seed=1, scale=0.03))
    A, A_down = on_gpu(2 * rank, inner, seed=2, scale=0.03), on_gpu(rank, f, seed=3, scale=0.03)
    B = torch.block_diag(*[drawn(f, rank, seed=i) * 0.3 for i in (4, 5)]).cuda().bfloat16()
    B_down, x, dy = (on_gpu(inner, rank, seed=6), on_gpu(n, inner, seed=7),
                     on_gpu(n, inner, seed=8))  # fmt: skip

    def run(move):
        matrices = [Matrix(*map(move, (m.rows, m.columns, m.scale, m.ones))) for m in (W, W_down)]
        leaves = [move(t).clone().requires_grad_() for t in (x, B, B_down)]
        first, second, third = leaves
        y = fp8.gated_mlp(first, matrices[0], move(A), second, matrices[1], move(A_down), third)
        y.backward(move(dy))
        return [y.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)]

    # What differs by a rounding of bf16 goes to another e4m3 number now and then.
    for one, two in zip(run(lambda t: t), run(lambda t: t.cpu()), strict=True):
        assert off(one, two) < 0.03
