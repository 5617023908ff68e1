"""A from its seed: the same bits for ever, and a stream of its own for every module."""

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lori_manager.engine.orthogonal import orthogonal_rows
from lori_manager.engine.projection import (
    ORTHOGONAL,
    ProjectionSpec,
    projection_digest,
    seeded_matrix,
)

MODULES = {"layers.0.q_proj": 64, "layers.0.down_proj": 96, "layers.1.q_proj": 64}
SPEC = ProjectionSpec(seed=42, line="safety", rank=8, modules=MODULES)


def test_golden_bits_have_not_changed():
    """Stored adapters do not hold A: another stream here would ruin every one of them."""
    A = seeded_matrix(42, "safety", "model.layers.0.self_attn.q_proj", 3, 5)
    digest = hashlib.sha256(A.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "9fdd7575bb9395b6771f7612f87fe0aa194348b5bba5c382e8a72480135a66f9"
    assert SPEC.digest == "ee10ad93005392f21d41d0725f19c19cd02e61277c7870cb81db221b117e4db1"


def test_first_values_are_those_of_the_raw_generator():
    """Word by word with integers of Python, apart from the vectorised arithmetic."""
    label = b"42|safety|m|3x5"
    key = int.from_bytes(hashlib.sha256(label).digest()[:16], "little")
    words = [int(w) for w in np.random.Philox(key=key).random_raw(8)]
    halves = [half for w in words for half in (w & 0xFFFFFFFF, w >> 32)][:15]
    bound = np.float32(1) / np.sqrt(np.float32(5))
    expected = [np.float32(((h >> 8) - 2**23) / 2**23) * bound for h in halves]
    assert seeded_matrix(42, "safety", "m", 3, 5).flatten().tolist() == expected


@pytest.mark.parametrize(("rank", "in_features"), [(1, 1), (1, 7), (3, 5), (4, 8)])
def test_shape_and_type(rank, in_features):
    A = seeded_matrix(0, "", "m", rank, in_features)
    assert A.shape == (rank, in_features)
    assert A.dtype == torch.float32
    assert A.is_contiguous()


def test_values_are_uniform_between_the_bounds():
    A = seeded_matrix(1, "a", "m", 64, 4096)
    bound = 1 / math.sqrt(4096)
    assert A.min() >= -bound
    assert A.max() < bound
    assert A.abs().max() > 0.9999 * bound
    shares = torch.histc(A, bins=16, min=-bound, max=bound) / A.numel()
    assert torch.allclose(shares, torch.full((16,), 1 / 16), atol=0.002)
    # The variance of a uniform value on [-b, b) is b^2 / 3.
    assert A.var().item() == pytest.approx(bound**2 / 3, rel=0.01)


@pytest.mark.parametrize(
    "other",
    [
        (43, "safety", "m", 8, 64),
        (42, "", "m", 8, 64),
        (42, "nlu", "m", 8, 64),
        (42, "safety", "n", 8, 64),
        (42, "safety", "m", 16, 32),
    ],
)
def test_seed_line_module_and_shape_each_make_another_stream(other):
    a = seeded_matrix(42, "safety", "m", 8, 64).flatten()
    b = seeded_matrix(*other).flatten()
    cosine = torch.dot(a, b) / (a.norm() * b.norm())
    assert abs(cosine) < 5 / math.sqrt(len(a))


def test_no_other_random_state_matters():
    first = seeded_matrix(42, "safety", "m", 8, 64)
    np.random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(seeded_matrix(42, "safety", "m", 8, 64), first)


def test_order_of_modules_does_not_matter():
    backwards = ProjectionSpec(42, "safety", 8, dict(reversed(MODULES.items())))
    assert backwards.digest == SPEC.digest
    assert list(backwards.matrices) == sorted(MODULES)
    assert torch.equal(backwards.matrices["layers.1.q_proj"], SPEC.matrix("layers.1.q_proj"))


def test_matrices_are_made_once():
    spec = replace(SPEC)
    assert spec.matrices is spec.matrices


@pytest.mark.parametrize(
    "change",
    [{"seed": 43}, {"line": ""}, {"rank": 4}, {"modules": {**MODULES, "extra": 2}}],
)
def test_every_part_of_a_projection_changes_its_digest(change):
    assert replace(SPEC, **change).digest != SPEC.digest


def test_digest_sees_one_bit_a_name_and_a_shape():
    A = {"m": torch.ones(2, 3), "n": torch.zeros(1, 2)}
    digest = projection_digest(A)
    assert projection_digest(dict(reversed(A.items()))) == digest
    assert projection_digest({n: a.T.contiguous().T for n, a in A.items()}) == digest
    others = [
        A | {"m": torch.nextafter(A["m"], torch.tensor(2.0))},
        A | {"n": -A["n"]},
        A | {"m": torch.ones(3, 2)},
        {"m": A["m"], "o": A["n"]},
        {"m": A["m"]},
    ]
    assert len({digest, *map(projection_digest, others)}) == 6


ROWS = ProjectionSpec(seed=42, line="", rank=8, modules=MODULES, generator=ORTHOGONAL, first_row=16)


@pytest.mark.parametrize("spec", [SPEC, ROWS])
def test_json_and_modules_make_the_projection_again(spec):
    again = ProjectionSpec.from_json(spec.to_json(), MODULES)
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.digest == spec.digest
    assert "modules" not in spec.to_json()


def test_rows_of_a_module_are_those_of_its_own_list():
    assert ROWS.digest == "7763fc45b70c92ca5e4a43c9fbd38d628d5f9ad873764d47f5e10424181b1596"
    for name, size in MODULES.items():
        assert torch.equal(ROWS.matrix(name), orthogonal_rows(42, name, 16, 8, size))
    assert replace(ROWS, first_row=24).digest != ROWS.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generator": "philox-uniform-2"}, "unknown generator 'philox-uniform-2'"),
        ({"rank": 0}, "rank and seed"),
        ({"first_row": -1}, "first row -1"),
        ({"seed": -1}, "rank and seed"),
    ],
)
def test_impossible_projections_are_a_value_error(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **change)
