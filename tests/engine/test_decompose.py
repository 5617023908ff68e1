"""Decompositions of small and tall matrices: against torch's own, and where they give up."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from lori_manager.engine.decompose import (
    MOST_THREADS,
    cholesky_qr,
    left_singular,
    qr,
    side_by_side,
    singular_values,
    svd,
)


def draw(rows, columns, seed=0, dtype=torch.float64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 7), (7, 7), (300, 64)])
def test_cholesky_qr_is_orthonormal_and_gives_the_matrix_again(shape, dtype):
    matrix = draw(*shape, dtype=dtype) * torch.logspace(0, -4, shape[1], dtype=dtype)
    Q, R = cholesky_qr(matrix)
    tight = 1e-6 if dtype == torch.float32 else 1e-12
    assert Q.dtype == R.dtype == dtype
    assert torch.allclose(Q.mT @ Q, torch.eye(shape[1], dtype=dtype), atol=tight)
    assert torch.allclose(Q @ R, matrix, atol=tight, rtol=0)
    assert torch.equal(R, R.triu())
    theirs = torch.linalg.qr(matrix)[1]
    assert torch.allclose(R.abs(), theirs.abs(), atol=10 * tight)


@pytest.mark.parametrize("off", [0.0, 1e-13, 1e-9])
def test_cholesky_qr_of_dependent_columns_is_exact_or_gives_up(off):
    column = draw(30, 1)
    matrix = torch.cat([column, column + off * draw(30, 1, 1)], dim=1)
    found = cholesky_qr(matrix)
    if found is not None:
        Q, R = found
        assert torch.allclose(Q.mT @ Q, torch.eye(2, dtype=Q.dtype), atol=1e-12)
        assert torch.allclose(Q @ R, matrix, atol=1e-12, rtol=0)


def test_cholesky_qr_gives_up_where_a_column_is_zero():
    assert cholesky_qr(torch.zeros(30, 2, dtype=torch.float64)) is None
    assert cholesky_qr(torch.full((30, 2), float("nan"), dtype=torch.float64)) is None


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5)])
def test_what_is_decomposed_is_what_torch_gives(shape):
    matrix = draw(*shape)
    left, values, right = svd(matrix)
    assert torch.allclose(left * values @ right, matrix)
    assert torch.allclose(singular_values(matrix), torch.linalg.svdvals(matrix))
    assert torch.allclose(singular_values(torch.stack([matrix, 2 * matrix]))[1], 2 * values)
    Q, R = qr(matrix)
    assert torch.allclose(Q @ R, matrix)


@pytest.mark.parametrize("shape", [(9, 40), (5, 5), (7, 3)])
def test_left_singular_vectors_are_torch_s_and_values_are_exact_to_a_ten_millionth(shape):
    falling = torch.logspace(0, -9, shape[0], dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(falling[:, None] * draw(*shape), full_matrices=False)
    matrix = U * S @ Vh
    left, values = left_singular(matrix)
    assert torch.allclose(left.mT @ left, torch.eye(shape[0], dtype=left.dtype), atol=1e-12)
    assert torch.allclose(values[: len(S)], S, atol=1e-7 * float(S[0]), rtol=0)
    large = int((S / S[0] > 1e-4).sum())
    assert torch.allclose((left[:, :large].mT @ U[:, :large]).abs(), torch.eye(large).double(),
                          atol=1e-6)  # fmt: skip
    assert torch.allclose(left @ (left.mT @ matrix), matrix, atol=1e-14)


def test_work_side_by_side_comes_in_order_on_threads_of_a_gpu_alone():
    seen = set()

    def work(n):
        seen.add(threading.get_ident())
        return n * n

    assert list(side_by_side(work, range(20), torch.device("cpu"))) == [n * n for n in range(20)]
    assert seen == {threading.get_ident()}
    seen.clear()
    before = torch.get_num_threads()
    assert list(side_by_side(work, range(20), torch.device("cuda"))) == [n * n for n in range(20)]
    assert len(seen) > 1  # the first alone, the others on threads
    assert torch.get_num_threads() == before


COUNTED = """
import torch
from lori_manager.engine.decompose import side_by_side

matrix = torch.eye(200)

def work(number):
    torch.linalg.svd(matrix)
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("Threads"))

alone, *rest = side_by_side(work, range(40), torch.device("cuda"))
print(max(rest) - alone)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_several_items_at_a_time_do_not_start_threads_of_their_own():
    env = os.environ | {"OMP_NUM_THREADS": "8"}
    told = subprocess.run([sys.executable, "-c", COUNTED], env=env, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert int(told.stdout) <= min(os.cpu_count() or 1, MOST_THREADS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(500, 60), (60, 500), (2000, 1200)])
def test_on_a_gpu_the_results_are_there_too_and_the_same(shape):
    matrix = draw(*shape).cuda()
    Q, R = qr(matrix)
    left, values, right = svd(matrix)
    assert {t.device.type for t in (Q, R, left, values, right)} == {"cuda"}
    assert torch.allclose(Q @ R, matrix)
    assert torch.allclose(left * values @ right, matrix)
