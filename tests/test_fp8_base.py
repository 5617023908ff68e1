"""A base in fp8: loaded, packed, trained and scored; the CPU emulates its products."""

import json
import logging

import architectures
import pytest
import small_workspaces
import torch

from lori_manager.adapters.lori import fresh_block, in_training, trainable_layers, trained_B
from lori_manager.config import Config
from lori_manager.engine import fp8
from lori_manager.engine.fp8 import Fp8Linear, quantize_base
from lori_manager.errors import InvalidInput
from lori_manager.forward import can_pack
from lori_manager.models import BaseModel, linear_shapes, load_base
from lori_manager.scoring import token_stats
from lori_manager.tasks.encoding import Encoded
from lori_manager.training import fit

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(count=12, seed=0):
    """Random prompts of four tokens, each followed by one of four completions of eight."""
    g = torch.Generator().manual_seed(seed)
    said = torch.randint(0, 250, (4, 8), generator=g).tolist()
    asked = torch.randint(0, 250, (count, 4), generator=g).tolist()
    return [Encoded(prompt + said[i % 4], 4) for i, prompt in enumerate(asked)]


ROWS = rows()


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(tiny_base, "fp8", "cpu")


def test_all_linear_layers_but_the_head_are_quantised(base, tiny_base):
    plain = load_base(tiny_base, "bf16", "cpu")
    assert (base.precision, base.device.type) == ("fp8", "cpu")
    assert base.linear_shapes == plain.linear_shapes
    modules = dict(base.model.named_modules())
    assert {n for n, m in modules.items() if isinstance(m, Fp8Linear)} == set(base.linear_shapes)
    held = base.model.get_output_embeddings().weight
    assert torch.equal(held, plain.model.get_output_embeddings().weight)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training
    for name in base.linear_shapes:
        kept, weight = modules[name].matrix.wide(), plain.model.get_submodule(name).weight.float()
        assert 0.01 < (kept - weight).norm() / weight.norm() < 0.03, name


def test_what_the_parameters_count_is_what_they_counted_before(base, tiny_base):
    """The size of a model decides about CUDA graphs; the second copy does not count."""
    plain = load_base(tiny_base, "bf16", "cpu").model
    assert sum(p.numel() for p in base.model.parameters()) == sum(
        p.numel() for p in plain.parameters()
    )


def test_a_device_without_such_products_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    with pytest.raises(InvalidInput, match="needs an NVIDIA GPU, not mps"):
        load_base(tmp_path, "fp8", "mps")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(InvalidInput, match=r"this one has 8\.6"):
        load_base(tmp_path, "fp8", "cuda")


def test_four_bits_and_fp8_do_not_go_together():
    with pytest.raises(InvalidInput, match="`base_bits` must be 16 with precision fp8, got 4"):
        Config(precision="fp8", base_bits=4)


def test_packing_is_judged_on_inputs_that_are_not_rounded(tiny_base, caplog, monkeypatch):
    base, rounded = load_base(tiny_base, "fp8", "cpu"), []
    base.model.register_forward_pre_hook(lambda *_: rounded.append(fp8._rounding))
    assert can_pack(base)
    assert set(rounded) == {False}
    assert fp8._rounding
    base = load_base(tiny_base, "fp8", "cpu")
    # Positions that do not restart: the tolerance must still find it.
    rotary = base.model.model.rotary_emb
    true = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda x, p: true(x, p * (1 + (p == 0).cumsum(-1))))
    with caplog.at_level(logging.INFO, "lori_manager"):
        assert not can_pack(base)
    assert caplog.records[-1].message.startswith("rows are padded, not packed")


@pytest.mark.parametrize("make", architectures.PACKS)
def test_every_architecture_runs_on_quantised_layers(tmp_path, make):
    torch.manual_seed(0)
    model, ids = make().eval().requires_grad_(False), torch.arange(14).view(2, 7)
    expected, shapes = model(ids).logits, linear_shapes(model)
    assert quantize_base(model, shapes) == len(shapes)
    assert linear_shapes(model) == shapes
    logits = model(ids).logits
    assert 1e-4 < (logits - expected).std() / expected.std() < 0.1
    assert can_pack(BaseModel(model, tmp_path, "fp8")) is architectures.PACKS[make]


def losses(base, config, steps=30):
    """Of a training from zero, each step's; and every B."""
    block = fresh_block(base.linear_shapes, config, "line")
    layers = trainable_layers(base.model, block, None)
    with in_training(base, layers) as parameters:
        result = fit(base, parameters, ROWS, config, steps=steps, peak=2e-2)
    return torch.tensor(result.losses), trained_B(layers)


def test_training_goes_as_in_float32(base, tiny_base):
    config = Config(rank=8, alpha=16.0, batch=6, checkpoint_seconds=0.0)
    found, B = losses(base, config)
    expected, B_plain = losses(load_base(tiny_base, "fp32", "cpu"), config)
    assert expected[-5:].mean() < expected[:5].mean() - 0.4  # it learns
    assert 1e-4 < (found - expected).abs().max() < 0.02
    assert abs(found[-10:].mean() - expected[-10:].mean()) < 0.01
    for name, got in B.items():
        plain = B_plain[name].flatten()
        assert torch.cosine_similarity(got.flatten(), plain, 0) > 0.95, name


def test_layers_that_see_one_input_share_its_rounding(base):
    block = fresh_block(base.linear_shapes, Config(rank=4, alpha=8.0), "line")
    layers = trainable_layers(base.model, block, None)
    with in_training(base, layers):
        sizes = {name.rsplit(".", 1)[-1]: len(m.group.layers) for name, m in layers.items()}
    assert sizes == {"q_proj": 3, "k_proj": 3, "v_proj": 3, "o_proj": 1, "gate_proj": 2,
                     "up_proj": 2, "down_proj": 1}  # fmt: skip


def test_scores_are_near_those_of_bf16_and_not_the_same(base, tiny_base):
    found = token_stats(base, ROWS, 4)
    expected = token_stats(load_base(tiny_base, "bf16", "cpu"), ROWS, 4)
    off = [abs(a.nll - b.nll).max() for a, b in zip(found, expected, strict=True)]
    assert 1e-4 < max(off) < 0.1


def test_scores_are_stored_under_their_own_name(tmp_path, tiny_base):
    ws = small_workspaces.make_workspace(tmp_path / "ws", tiny_base, precision="fp8", steps=2)
    (trained,) = ws.train(["colour"])
    (score,) = trained.scores
    assert score.precision == "fp8"
    assert trained.adapter.config["precision"] == "fp8"
    (again,) = ws.score([trained.adapter.ref], ["colour"])
    assert again == score
    settings = tmp_path / "ws" / "lori.toml"
    text = settings.read_text("utf-8").replace(json.dumps("fp8"), json.dumps("fp32"))
    settings.write_text(text, "utf-8")
    with type(ws).open(tmp_path / "ws") as other:
        (plain,) = other.score([trained.adapter.ref], ["colour"])
    assert (plain.precision, plain.subject) == ("fp32", score.subject)
    assert plain.value == pytest.approx(score.value, abs=0.5)
