"""Leading singular triples: against numpy, with fixed signs, the same twice."""

import numpy as np
import pytest
import torch

from lori_manager.engine.svd import FULL, RANDOMISED, choose_method, top_svd


def decaying(rows, columns, seed=0):
    """Singular values 1, 1/2, 1/3, ... with random vectors."""
    draw = np.random.default_rng(seed)
    U = np.linalg.qr(draw.normal(size=(rows, rows)))[0]
    V = np.linalg.qr(draw.normal(size=(columns, columns)))[0]
    short = min(rows, columns)
    s = 1 / np.arange(1, short + 1)
    return torch.from_numpy(U[:, :short] * s @ V[:, :short].T).float(), s


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("method", [FULL, RANDOMISED])
def test_the_triples_are_those_of_the_matrix(shape, method):
    W, s = decaying(*shape)
    found = top_svd(W, 6, method)
    assert np.allclose(found.s, s[:6], rtol=1e-5)
    assert torch.allclose(W @ found.V, found.U * found.s, atol=1e-5)
    for basis in (found.U, found.V):
        assert torch.allclose(basis.T @ basis, torch.eye(6), atol=1e-5)
    assert found.energy == pytest.approx((s[:6] ** 2).sum() / (s**2).sum(), rel=1e-5)


@pytest.mark.parametrize("method", [FULL, RANDOMISED])
def test_signs_are_fixed_and_nothing_hangs_on_the_generator_of_the_process(method):
    W, _ = decaying(30, 20)
    torch.manual_seed(1)
    first = top_svd(W, 5, method)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))  # nor is that generator moved
    again = top_svd(W, 5, method)
    assert torch.equal(first.U, again.U)
    assert torch.equal(first.V, again.V)
    assert bool((first.V.gather(0, first.V.abs().argmax(0, keepdim=True)) > 0).all())
    # -W has the same right vectors with the same signs, and turned left ones
    turned = top_svd(-W, 5, method)
    assert torch.allclose(turned.V, first.V, atol=1e-5)
    assert torch.allclose(turned.U, -first.U, atol=1e-5)


def test_large_matrices_of_small_rank_are_randomised():
    assert choose_method((1024, 9000), 1000) == FULL
    assert choose_method((4096, 4096), 256) == RANDOMISED
    assert choose_method((4096, 4096), 2048) == FULL


def test_a_zero_matrix_holds_all_its_energy():
    assert top_svd(torch.zeros(4, 3), 2, FULL).energy == 1.0


@pytest.mark.parametrize(("rank", "method"), [(0, FULL), (4, FULL), (2, "exact")])
def test_what_there_is_not_is_refused(rank, method):
    with pytest.raises(ValueError, match=r"rank in 1\.\.3"):
        top_svd(torch.ones(5, 3), rank, method)
