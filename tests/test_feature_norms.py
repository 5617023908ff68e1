"""Normalised feature norms, against values by hand and a loop over single tokens in numpy."""

import importlib.util
import math
from types import SimpleNamespace

import architectures
import numpy as np
import pytest
import torch
from torch import nn

from lori_manager.engine.fp8 import Fp8Linear
from lori_manager.errors import InvalidInput
from lori_manager.feature_norms import feature_norms, weight_norm
from lori_manager.models import BaseModel, load_base
from lori_manager.tasks.encoding import Encoded

pytestmark = pytest.mark.usefixtures("one_thread")
draw = np.random.default_rng(0)
ROWS = [Encoded(draw.integers(0, 61, n), p) for n, p in ((9, 9), (3, 3), (12, 12), (5, 5), (3, 3))]


class ByHand(nn.Module):
    """Two layers behind an embedding whose rows are chosen by the test."""

    base_model_prefix = ""

    def __init__(self, table, first, second, bias=None):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=len(table))
        self.embedding = nn.Embedding.from_pretrained(torch.tensor(table))
        self.first, self.second = (
            nn.Linear(len(w[0]), len(w), bias=False) for w in (first, second)
        )
        for layer, weight in ((self.first, first), (self.second, second)):
            layer.weight.data = torch.tensor(weight)
        if bias is not None:
            self.first.bias = nn.Parameter(torch.tensor(bias))
        self.unused = nn.Linear(2, 2)
        self.lm_head = nn.Linear(2, len(table))
        self.requires_grad_(False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, use_cache=False):
        x = self.embedding(input_ids)
        self.first(x)
        return SimpleNamespace(logits=self.lm_head(self.second(x)))


def by_hand(tmp_path, table, first, second, **other):
    return BaseModel(ByHand(table, first, second, **other), tmp_path, "fp32")


def made(make, tmp_path, **changes):
    torch.manual_seed(0)
    model = make(**changes).eval().requires_grad_(False)
    return BaseModel(model, tmp_path, "fp32")


def token_by_token(model, names, rows):
    """Each row alone, each token alone, in float64: name -> NFN."""
    seen = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen[name].append(inputs[0].double().numpy())
        )
        for name in names
    ]
    for row in rows:
        model(input_ids=torch.as_tensor(np.asarray(row.ids, np.int64))[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    out = {}
    for name in names:
        layer = model.get_submodule(name)
        W = layer.weight.detach().double().numpy()
        W = W.T if type(layer).__name__ == "Conv1D" else W
        ratios = []
        for x in seen[name]:
            for token in x.reshape(-1, W.shape[1]):
                if not token.any():  # the embedding of Gemma's padding, which draws may hold
                    continue
                unit = token / math.sqrt(sum(v * v for v in token))
                ratios.append(math.sqrt(sum(v * v for v in W @ unit)))
        out[name] = sum(ratios) / len(ratios) / math.sqrt((W**2).sum() / W.shape[1])
    return out


def test_values_by_hand(tmp_path):
    """Inputs along the first axis, and halfway between both; ||W||_F / sqrt(2) by hand."""
    base = by_hand(
        tmp_path,
        table=[[2.0, 0.0], [5.0, 5.0]],
        first=[[3.0, 0.0], [0.0, 4.0]],  # ||W e1|| = 3, ||W (1,1)/sqrt 2|| = 5 / sqrt 2
        second=[[1.0, 0.0], [0.0, 1.0]],  # an isometry: 1 for every input
    )
    found = feature_norms(base, [Encoded([0, 0, 1], 3)], 4)
    expected = ((3 + 3 + 5 / math.sqrt(2)) / 3) / (5 / math.sqrt(2))
    assert found == {
        "first": pytest.approx(expected, rel=1e-6),
        "second": pytest.approx(1.0, rel=1e-6),
    }


def test_the_bias_is_no_part_of_it_however_large(tmp_path):
    plain = {"table": [[2.0, 0.0], [5.0, 5.0]], "first": [[3.0, 0.0], [0.0, 4.0]],
             "second": [[1.0, 0.0], [0.0, 1.0]]}  # fmt: skip
    rows = [Encoded([0, 0, 1], 3)]
    without = feature_norms(by_hand(tmp_path, **plain), rows, 4)
    assert feature_norms(by_hand(tmp_path, **plain, bias=[1e7, -3e6]), rows, 4) == without


def test_a_token_without_a_direction_is_left_out(tmp_path):
    base = by_hand(
        tmp_path, [[2.0, 0.0], [0.0, 0.0]], [[3.0, 0.0], [0.0, 4.0]], [[1.0, 0.0], [0.0, 1.0]]
    )
    some, all_zero = [Encoded([0, 1, 1], 3)], [Encoded([1, 1], 2)]
    assert feature_norms(base, some, 4) == feature_norms(base, [Encoded([0], 1)], 4)
    with pytest.raises(InvalidInput, match="no linear layer of ByHand"):
        feature_norms(base, all_zero, 4)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_weights_that_give_no_number_are_refused_by_name(tmp_path, value):
    base = by_hand(tmp_path, [[2.0, 1.0]], [[value] * 2] * 2, [[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(InvalidInput, match="first has no feature norm"):
        feature_norms(base, [Encoded([0, 0], 2)], 4)


def test_inputs_that_are_no_numbers_are_refused(tmp_path):
    base = by_hand(tmp_path, [[2.0, 1.0], [math.nan, 1.0]], *[[[1.0, 0.0], [0.0, 1.0]]] * 2)
    with pytest.raises(InvalidInput, match="first has no feature norm"):
        feature_norms(base, [Encoded([0, 1], 2)], 4)


@pytest.mark.parametrize("make", architectures.PACKS)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_every_architecture_gives_what_a_loop_over_single_tokens_gives(tmp_path, make, batch):
    base = made(make, tmp_path)
    expected = token_by_token(base.model, list(base.linear_shapes), ROWS)
    assert feature_norms(base, ROWS, batch) == pytest.approx(expected, rel=1e-4)
    assert not any("head" in name for name in expected)
    assert len(expected) == len(base.linear_shapes) > 7


def test_packed_rows_give_the_same(tmp_path, monkeypatch):
    import lori_manager.feature_norms as module
    from lori_manager.forward import Forward

    base = made(architectures.llama, tmp_path)
    padded = feature_norms(base, ROWS, 5)
    monkeypatch.setattr(module, "runner", lambda base: Forward(base, packing="on"))
    assert feature_norms(base, ROWS, 5) == pytest.approx(padded, rel=1e-5)


def test_a_row_twice_counts_twice_and_the_order_not_at_all(tmp_path):
    base = made(architectures.gpt2, tmp_path)
    once = feature_norms(base, ROWS, 2)
    assert feature_norms(base, ROWS[::-1], 2) == pytest.approx(once, rel=1e-5)
    assert feature_norms(base, [*ROWS, *ROWS], 2) == pytest.approx(once, rel=1e-5)
    a, b = (feature_norms(base, [ROWS[i]], 1) for i in (0, 1))
    both = {n: (9 * a[n] + 3 * b[n]) / 12 for n in a}  # by tokens, not by rows
    assert feature_norms(base, ROWS[:2], 2) == pytest.approx(both, rel=1e-5)


def test_the_denominator_is_what_gaussian_inputs_give(tmp_path):
    """So a random model's layers, fed with random tokens, score near 1."""
    torch.manual_seed(1)
    W = torch.randn(48, 64) * torch.rand(48, 1)
    layer = nn.Linear(64, 48)
    layer.weight.data = W
    z = nn.functional.normalize(torch.randn(4000, 64), dim=1)
    sampled = float((z @ W.t()).norm(dim=1).mean())
    assert weight_norm(layer, torch.float32) / 8 == pytest.approx(sampled, rel=0.02)


def test_the_model_is_left_as_it_was(tmp_path):
    base = made(architectures.llama, tmp_path)
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    first = feature_norms(base, ROWS, 2)
    assert all(torch.equal(v, before[k]) for k, v in base.model.state_dict().items())
    assert not any(m._forward_hooks for m in base.model.modules())
    assert feature_norms(base, ROWS, 2) == first
    assert all(math.isfinite(v) and v > 0 for v in first.values())


def test_hooks_are_taken_out_after_a_refusal(tmp_path):
    base = made(architectures.llama, tmp_path)
    base.model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(InvalidInput):
        feature_norms(base, ROWS, 2)
    assert not any(m._forward_hooks for m in base.model.modules())


def test_a_layer_that_sees_some_of_the_tokens_is_refused_beside_padding(tmp_path):
    base = made(architectures.llama, tmp_path)
    base.model.model.layers[0].mlp = Sparse(base.model.model.layers[0].mlp)
    name = "model.layers.0.mlp.inner.gate_proj"
    with pytest.raises(InvalidInput, match=rf"{name} is called on 5 of 36 tokens"):
        feature_norms(base, ROWS[:3], 3)
    alone = feature_norms(base, ROWS[:3], 1)  # nothing is padded
    assert name in alone


class Sparse(nn.Module):
    """A feed-forward that is called on some of the tokens, as experts are."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        out = x.clone()
        flat = out.view(-1, x.shape[-1])
        flat[:5] = self.inner(flat[:5].clone())
        return out


def test_no_rows_are_a_bug(tmp_path):
    with pytest.raises(ValueError, match="`rows` is empty"):
        feature_norms(made(architectures.llama, tmp_path), [], 2)


def test_bf16_gives_nearly_the_same_also_with_large_biases(tmp_path):
    """Qwen2's biases are far larger than W x: a rounded sum would hide it."""
    base = made(architectures.qwen2, tmp_path, initializer_range=0.2)
    for name, parameter in base.model.named_parameters():
        if name.endswith("bias"):
            parameter.data.mul_(100)
    whole = feature_norms(base, ROWS, 2)
    half = BaseModel(base.model.to(torch.bfloat16), tmp_path, "bf16")
    assert feature_norms(half, ROWS, 2) == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("make", [architectures.llama, architectures.gpt2])
def test_a_base_in_fp8_gives_nearly_the_same(tmp_path, make):
    torch.manual_seed(0)
    make(initializer_range=0.2).save_pretrained(tmp_path)
    base = load_base(tmp_path, "fp8", "cpu")
    assert any(isinstance(m, Fp8Linear) for m in base.model.modules())
    whole = feature_norms(load_base(tmp_path, "fp32", "cpu"), ROWS, 2)
    assert feature_norms(base, ROWS, 2) == pytest.approx(whole, rel=0.03)


def test_the_norm_of_a_matrix_in_e4m3_is_that_of_the_numbers_it_stands_for():
    torch.manual_seed(0)
    layer = Fp8Linear((torch.randn(32, 528) * torch.rand(32, 1)).bfloat16(), torch.full((32,), 9.0))
    exact = float(layer.matrix.wide().norm())
    assert weight_norm(layer, torch.float32) == pytest.approx(exact, rel=1e-3)


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@needs_bitsandbytes
@pytest.mark.parametrize("make", [architectures.llama, architectures.qwen2, architectures.gpt2])
def test_a_base_in_nf4_is_scored_on_the_weights_that_it_multiplies_with(tmp_path, make):
    from bitsandbytes.functional import dequantize_4bit

    torch.manual_seed(0)
    make(initializer_range=0.2).save_pretrained(tmp_path)
    base = load_base(tmp_path, "fp32", "cpu", 4)
    reference = make(initializer_range=0.2).eval().requires_grad_(False)
    reference.load_state_dict(load_base(tmp_path, "fp32", "cpu").model.state_dict())
    for name in base.linear_shapes:
        packed, plain = base.model.get_submodule(name), reference.get_submodule(name)
        weight = dequantize_4bit(packed.weight.data, packed.weight.quant_state)
        plain.weight.data = weight.T if type(plain).__name__ == "Conv1D" else weight
        norm = weight_norm(packed, torch.float32)
        assert norm == pytest.approx(float(weight.norm()), rel=1e-5)
    expected = token_by_token(reference, list(base.linear_shapes), ROWS)
    assert feature_norms(base, ROWS, 2) == pytest.approx(expected, rel=1e-3)
