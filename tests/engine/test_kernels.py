"""The Triton kernels against float32 sums; they need a Hopper GPU, all else a CPU."""

import pytest
import torch
from torch.nn import functional as F

from lori_manager.engine import kernels
from lori_manager.engine.products import frozen_plus_low_rank

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and kernels.available(0)), reason="needs a Hopper GPU"
)


def draw(*shape, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


def off(got, expected):
    return float((got.float() - expected).norm() / expected.norm())


@gpu
@needs_gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [8, 32, 96])
@pytest.mark.parametrize(("n", "out", "inner"), [(2048, 1024, 4096), (2500, 1096, 1032)])
def test_a_product_with_its_low_rank_part(n, out, inner, rank, bias):
    x, W, z, B = draw(n, inner), draw(out, inner), draw(n, rank), draw(out, rank)
    b = draw(out, scale=10) if bias else None
    got = kernels.linear_plus(x, W, b, z, B)
    expected = x.float() @ W.float().t() + z.float() @ B.float().t()
    expected += 0 if b is None else b.float()
    assert got is not None
    assert off(got, expected) < 3e-3
    assert off(got, x.float() @ W.float().t()) > 0.02


@gpu
@needs_gpu
@pytest.mark.parametrize("outs", [(2048,), (1024, 512), (1024, 264, 136)])
@pytest.mark.parametrize("n", [2048, 2500])
def test_the_gradient_of_the_input_over_several_parts(n, outs):
    inner, rank = 1096, 96
    dys = [draw(n, out) for out in outs]
    W, dz, A = draw(sum(outs), inner), draw(n, rank), draw(rank, inner)
    got = kernels.gradient_plus(dys, W, dz, A)
    expected = torch.cat(dys, 1).float() @ W.float() + dz.float() @ A.float()
    assert got is not None
    assert off(got, expected) < 3e-3


@gpu
@needs_gpu
def test_the_gating_and_its_gradient():
    both = draw(2050, 2 * 1500).requires_grad_()
    dh = draw(2050, 1500)
    h = kernels.swiglu(both)
    h.backward(dh)
    wide = both.detach().float().requires_grad_()
    g, u = wide.chunk(2, dim=1)
    expected = F.silu(g) * u
    expected.backward(dh.float())
    assert off(h, expected) < 3e-3
    assert off(both.grad, wide.grad) < 3e-3


@gpu
@needs_gpu
@pytest.mark.parametrize("n", [256, 2304])
@pytest.mark.parametrize("widths", [(1536,), (1024, 256, 256)])
def test_a_group_on_the_gpu_has_the_gradients_of_plain_autograd(n, widths):
    """Block-diagonal B; the small size goes the plain way, the large one by the kernels."""
    inner, rank = 1024, 16
    total, count = sum(widths), len(widths)
    x, W, A = draw(n, inner), draw(total, inner), draw(rank * count, inner, scale=0.05)
    B = torch.block_diag(*[draw(w, rank, scale=0.3).float() for w in widths]).bfloat16()
    given = [t.detach().requires_grad_() for t in (x, B)]
    ys = frozen_plus_low_rank(given[0], W, None, A, [given[1]], widths)
    dys = [draw(n, w) for w in widths]
    torch.autograd.backward(ys, dys)
    plain = [t.detach().float().requires_grad_() for t in (x, B)]
    y = plain[0] @ W.float().t() + plain[0] @ A.float().t() @ plain[1].t()
    y.backward(torch.cat(dys, 1).float())
    assert off(torch.cat(ys, 1), y) < 4e-3
    assert off(given[0].grad, plain[0].grad) < 4e-3
    inside = B != 0
    assert off(given[1].grad * inside, plain[1].grad * inside) < 6e-3


@gpu
@needs_gpu
@pytest.mark.parametrize("n", [2048, 2300])
def test_a_whole_gated_feed_forward_has_the_gradients_of_plain_autograd(n):
    inner, f, rank = 1024, 1280, 16
    x, W, A = draw(n, inner), draw(2 * f, inner, scale=0.02), draw(2 * rank, inner, scale=0.02)
    B = torch.block_diag(draw(f, rank).float(), draw(f, rank).float()).bfloat16()
    W_down, A_down, B_down = draw(inner, f), draw(rank, f, scale=0.03), draw(inner, rank)
    dy = draw(n, inner)
    given = [t.detach().requires_grad_() for t in (x, B, B_down)]
    y = kernels.gated_mlp(given[0], W, A, given[1], W_down, A_down, given[2])
    assert y is not None
    y.backward(dy)
    plain = [t.detach().float().requires_grad_() for t in (x, B, B_down)]
    both = plain[0] @ W.float().t() + plain[0] @ A.float().t() @ plain[1].t()
    g, u = both.chunk(2, dim=1)
    h = F.silu(g) * u
    expected = h @ W_down.float().t() + h @ A_down.float().t() @ plain[2].t()
    expected.backward(dy.float())
    assert off(y, expected) < 6e-3
    assert off(given[0].grad, plain[0].grad) < 1e-2
    inside = B != 0
    assert off(given[1].grad * inside, plain[1].grad * inside) < 1e-2
    assert off(given[2].grad, plain[2].grad) < 1e-2


def test_without_such_a_gpu_every_product_is_made_the_plain_way():
    x = torch.randn(4096, 1024, dtype=torch.bfloat16)
    assert not kernels.usable(x)
    assert kernels.linear_plus(x, x[:1024], None, x[:, :8], x[:1024, :8]) is None
    assert kernels.gradient_plus([x], x, x[:, :8], x[:8]) is None
