"""Layers that see the same input: found, computed together, equal to each alone."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lori_manager.engine.layers import LoriLinear, attached
from lori_manager.engine.siblings import join_siblings
from lori_manager.engine.trained import TrainedValues

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_llama(dtype=torch.float64):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def llama_layers(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            A = torch.randn(4, module.in_features, generator=generator)
            start = torch.randn(module.out_features, 4, generator=generator)
            mask = torch.rand(start.shape, generator=generator) < 0.5
            layers[name] = LoriLinear(module, A, 0.5, mask, start)
    return layers


def logits_and_gradients(model, joined, ids):
    layers = llama_layers(model)
    with attached(model, layers):
        groups = join_siblings(layers, lambda: model(ids)) if joined else None
        logits = model(ids).logits
        logits.square().mean().backward()
    return groups, logits.detach(), {name: layer.values.grad for name, layer in layers.items()}


def test_layers_that_see_the_same_input_are_found_and_grouped():
    model, ids = tiny_llama(), torch.arange(6)[None]
    groups, _, _ = logits_and_gradients(model, True, ids)
    short = [[name.rsplit(".", 1)[-1] for name in group] for group in groups]
    assert short == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * 2


def test_siblings_give_the_outputs_and_gradients_that_they_give_apart():
    model, ids = tiny_llama(), torch.randint(0, 64, (3, 7))
    _, apart, gradients = logits_and_gradients(model, False, ids)
    _, together, joined = logits_and_gradients(model, True, ids)
    assert torch.allclose(apart, together, rtol=1e-12, atol=1e-14)
    assert all(bool(g.abs().sum() > 0) for g in gradients.values())
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, joined[name], rtol=1e-6), name


def test_siblings_take_a_second_input_and_forget_what_waited_for_the_first():
    model = tiny_llama()
    layers = llama_layers(model)
    x, other = torch.randn(2, 3, 32).double(), torch.randn(2, 3, 32).double()
    three = {name: layer for name, layer in layers.items() if "layers.0.self_attn" in name}
    three.pop("model.layers.0.self_attn.o_proj")
    q, k, v = three.values()
    expected = [layer(other) for layer in (q, k, v)]
    assert len(join_siblings(three, lambda: [layer(x) for layer in three.values()])) == 1
    q(x)  # k and v are never called with this input
    for layer, before in zip((q, k, v), expected, strict=True):
        assert torch.allclose(layer(other), before)
    assert torch.allclose(q(x), q(x))


def test_the_gradient_of_a_group_is_that_of_finite_differences():
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    generator = torch.Generator().manual_seed(3)
    bases = [
        nn.Linear(6, out, bias=bias).double().requires_grad_(False)
        for out, bias in ((5, True), (3, False))
    ]

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(LoriLinear(base, draw(2, 6), 0.7) for base in bases)

        def forward(self, x):
            return tuple(layer(x) for layer in self.layers)

    pair, x = Pair(), draw(4, 6).requires_grad_()
    groups = join_siblings({str(i): one for i, one in enumerate(pair.layers)}, lambda: pair(x))
    assert groups == [["0", "1"]]
    values = [draw(layer.values.numel()).requires_grad_() for layer in pair.layers]

    def run(x, *values):
        given = {f"layers.{i}.values": one for i, one in enumerate(values)}
        return torch.func.functional_call(pair, given, (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


def test_a_group_with_a_base_of_another_dtype_stays_apart():
    model, ids = tiny_llama(), torch.arange(6)[None]
    with torch.no_grad():
        layers = llama_layers(model)
    odd = layers["model.layers.0.self_attn.k_proj"]
    odd.plain = lambda x: False
    odd.forward = lambda x: odd.base(x)
    with attached(model, layers):
        groups = join_siblings(layers, lambda: model(ids))
    assert all("model.layers.0.self_attn.q_proj" not in group for group in groups)
    assert len(groups) == 3


def test_what_a_capture_made_is_not_used_outside_of_it(monkeypatch):
    """A failed capture leaves tensors that were never computed."""
    model = tiny_llama(torch.float32)
    layers = list(llama_layers(model).values())
    trained = TrainedValues(layers)
    group = layers[0].group
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    (captured,) = trained.factors(group, torch.float32)
    assert trained.factors(group, torch.float32)[0] is captured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert trained.factors(group, torch.float32)[0] is not captured
