"""The cache of singular values: filled once, checked, made again."""

import logging

import pytest
import torch

from lori_manager.adapters import spectra as module
from lori_manager.adapters.spectra import cache_folder, spectra
from lori_manager.errors import InvalidInput
from lori_manager.models import load_base

NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("LORI_CACHE", str(tmp_path))
    return load_base(tiny_base, "fp32", "cpu")


@pytest.fixture
def computed(monkeypatch):
    """The shapes whose SVD was computed."""
    shapes, own = [], module.top_svd

    def counted(W, rank, method):
        shapes.append((tuple(W.shape), rank, method))
        return own(W, rank, method)

    monkeypatch.setattr(module, "top_svd", counted)
    return shapes


def files():
    return sorted(cache_folder().iterdir())


def test_a_weight_is_decomposed_once(base, computed):
    told = []
    with module.progress_told(lambda: lambda *n: told.append(n)):
        first = spectra(base, {NAME: 4})[NAME]
    again = spectra(base, {NAME: 4})[NAME]
    assert len(computed) == len(files()) == 1
    assert told == [(1, 1)]
    for field in ("U", "s", "V"):
        assert torch.equal(getattr(first, field), getattr(again, field))
    assert first.energy == again.energy


def test_another_rank_method_precision_or_weight_is_another_entry(base, computed, tiny_base):
    spectra(base, {NAME: 4})
    spectra(base, {NAME: 5})
    spectra(base, {NAME: 4}, "randomised")
    spectra(load_base(tiny_base, "bf16", "cpu"), {NAME: 4})
    with torch.no_grad():
        base.model.get_submodule(NAME).weight[0, 0] += 1
    changed = spectra(base, {NAME: 4})[NAME]
    assert len(computed) == len(files()) == 5
    W = base.model.get_submodule(NAME).weight
    assert torch.allclose(W @ changed.V, changed.U * changed.s, atol=1e-5)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_a_damaged_entry_is_made_again(base, computed, caplog, damage):
    first = spectra(base, {NAME: 4})[NAME]
    (path,) = files()
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    if damage == "foreign":
        spectra(base, {NAME: 3})
        data = next(f for f in files() if f != path).read_bytes()
    path.write_bytes({"cut": bytes(data[:-7]), "empty": b""}.get(damage, bytes(data)))
    computed.clear()
    with caplog.at_level(logging.WARNING):
        again = spectra(base, {NAME: 4})[NAME]
    assert "computed again" in caplog.text
    assert len(computed) == 1
    assert torch.equal(first.V, again.V)
    spectra(base, {NAME: 4})
    assert len(computed) == 1  # what was written is whole


def test_a_result_that_cannot_be_kept_is_given_all_the_same(base, tmp_path, caplog):
    (tmp_path / "svd").write_text("in the way")
    assert spectra(base, {NAME: 4})[NAME].V.shape == (32, 4)
    assert "not kept" in caplog.text


@pytest.mark.parametrize("packed", [torch.uint8, torch.float8_e4m3fn])
def test_a_packed_weight_has_no_singular_values(base, packed):
    layer = base.model.get_submodule(NAME)
    layer.weight = torch.nn.Parameter(torch.zeros(512, 1).to(packed), requires_grad=False)
    with pytest.raises(InvalidInput, match="--base-bits 4"):
        spectra(base, {NAME: 4})
