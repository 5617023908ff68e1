"""Orthogonal A's: orthogonal without any error, the same bits for ever, the norm of a random A."""

import hashlib
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from lori_manager.engine import orthogonal
from lori_manager.engine.orthogonal import integer_rows, orthogonal_rows

SIZES = (100, 576, 1536, 4096)


def products(*parts):
    rows = torch.cat(parts).double()
    return rows @ rows.T


@pytest.mark.parametrize("size", SIZES)
def test_slots_are_orthogonal_to_each_other_and_in_themselves(size):
    rank = 16
    last = size // rank - 1
    slots = [orthogonal_rows(3, "m", s * rank, rank, size) for s in (0, 1, last)]
    expected = torch.eye(3 * rank, dtype=torch.float64) / 3
    assert float((products(*slots) - expected).abs().max()) < 1e-7


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 97, 100, 576])
def test_the_rows_are_orthogonal_as_integers_without_any_error(size):
    whole, bits = integer_rows(0, "m", 0, 0, size, size)
    assert np.array_equal(whole @ whole.T, 4**bits * np.eye(size, dtype=np.int64))


def test_ranks_may_differ_as_long_as_rows_do_not_overlap():
    a, b, c = (orthogonal_rows(0, "m", first, rank, 100)
               for first, rank in ((0, 8), (8, 32), (40, 1)))  # fmt: skip
    assert torch.equal(orthogonal_rows(0, "m", 0, 41, 100), torch.cat([a, b, c]))


def test_every_row_has_the_squared_norm_that_a_uniform_one_has_on_the_average():
    for size in SIZES:
        norms = orthogonal_rows(0, "m", 0, 32, size).double().square().sum(1)
        assert torch.allclose(norms, torch.tensor(1 / 3, dtype=torch.float64), rtol=1e-6)


@pytest.mark.parametrize("size", [576, 1536, 4096, 14336])
def test_rows_are_spread_over_all_coordinates_wherever_they_begin(size):
    """No coordinate of a row stands out more than a normal value would."""
    for first in (0, size - 32):
        rows = orthogonal_rows(1, "m", first, 32, size) * math.sqrt(3 * size)
        assert rows.abs().max() < 6
        assert rows.pow(4).mean() == pytest.approx(3, abs=0.3)
        assert (rows.square().mean(0) > 0.1).all()


def test_rows_beyond_the_last_are_those_of_another_matrix():
    A = orthogonal_rows(0, "m", 90, 32, 100)
    old, new = A[:10], A[10:]
    assert torch.equal(old, orthogonal_rows(0, "m", 90, 10, 100))
    assert torch.equal(new, orthogonal_rows(0, "m", 100, 22, 100))
    inside = products(new) - torch.eye(22, dtype=torch.float64) / 3
    assert float(inside.abs().max()) < 1e-7
    assert not torch.equal(new, orthogonal_rows(0, "m", 0, 22, 100))


def test_seed_module_and_matrix_each_make_other_rows():
    A = orthogonal_rows(0, "m", 0, 8, 64)
    others = [(1, "m", 0), (0, "n", 0), (0, "m", 64)]
    for seed, module, first in others:
        B = orthogonal_rows(seed, module, first, 8, 64)
        assert float((A * B).sum() / (A.norm() * B.norm())) < 0.3


def test_golden_bits_have_not_changed():
    """Stored adapters do not hold A: other rows here would ruin every one of them."""
    h = hashlib.sha256()
    for size in (7, 100, 576):
        A = orthogonal_rows(42, "model.layers.0.self_attn.q_proj", 5, 3, size)
        h.update(A.numpy().astype("<f4").tobytes())
    assert h.hexdigest() == "1047b5134d3d978a24a1c4f9324fec86be12f7d7e67ba6d4ce04417f8ce1602b"


def test_the_transform_is_hadamards():
    """Block by block against scipy's matrix, with permutation and signs by hand."""
    size = 4**2 + 4 + 1
    whole, bits = integer_rows(9, "m", 0, 0, size, size)
    blocks = [scipy.linalg.hadamard(b) / math.sqrt(b) for b in (16, 4, 1)]
    H = scipy.linalg.block_diag(*blocks)
    words = orthogonal.random_words(f"orthogonal|9|0|m|{size}", 3 * size).reshape(3, size)
    columns = np.eye(size)
    for drawn in words:
        order = sorted(range(size), key=lambda i: int(drawn[i]))
        signs = [-1 if int(w) % 2 else 1 for w in drawn]
        columns = H @ (np.array(signs)[:, None] * columns[order])
    assert np.allclose(whole / 2**bits, columns.T, atol=1e-12)
