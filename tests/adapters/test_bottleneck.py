"""Bottleneck adapters: where they go, what they compute, what is refused."""

import architectures
import pytest
import torch
from torch.nn import functional as F

from lori_manager.adapters import bottleneck
from lori_manager.adapters.applying import applied
from lori_manager.config import Config
from lori_manager.engine.weights import KindWeights
from lori_manager.errors import InvalidInput, WrongBase
from lori_manager.kinds import resolved
from lori_manager.models import BaseModel, load_base

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(7)[None]


def made(make, tmp_path, **changes):
    torch.manual_seed(0)
    model = make(**changes).eval()
    model.requires_grad_(False)
    return BaseModel(model, tmp_path, "fp32")


def config(**options):
    return resolved(Config(kind="bottleneck", kind_options=options))


def logits(base):
    with torch.no_grad():
        return base.model(input_ids=IDS, use_cache=False).logits[0]


def moved(base, settings):
    """An adapter whose values are all drawn."""
    with bottleneck.training(base, settings, steps=1) as training:
        generator = torch.Generator().manual_seed(5)
        for p in training.parameters.values():
            p.data = torch.randn(p.shape, generator=generator) * 0.3
        return training.weights(torch.float32)


@pytest.mark.parametrize("placement", bottleneck.PLACEMENTS)
@pytest.mark.parametrize("make", architectures.PACKS)
def test_every_architecture_begins_as_the_base_and_takes_it_out_again(make, placement, tmp_path):
    base = made(make, tmp_path)
    before, modules = logits(base), {n: id(m) for n, m in base.model.named_modules()}
    with bottleneck.training(base, config(placement=placement), steps=1) as training:
        assert torch.equal(logits(base), before)
        per_layer = {"houlsby": 2, "pfeiffer": 1}[placement]
        assert len(training.parameters) == 2 * per_layer * len(bottleneck.PARTS)
        base.model(input_ids=IDS, use_cache=False).logits.sum().backward()
        moving = [n for n, p in training.parameters.items() if bool(p.grad.any())]
        assert {n.split(".up.")[1] for n in moving if ".up." in n} == {"weight", "bias"}
    weights = moved(base, config(placement=placement))
    with applied(base, weights):
        assert (logits(base) - before).abs().max() > 1e-2
    assert torch.equal(logits(base), before)
    assert {n: id(m) for n, m in base.model.named_modules()} == modules


@pytest.mark.parametrize("activation", bottleneck.ACTIVATIONS)
def test_it_adds_up_of_f_of_down_to_what_the_sublayer_gives(activation, tmp_path):
    base = made(architectures.llama, tmp_path)
    weights = moved(base, config(activation=activation, reduction=8))
    name = "model.layers.1.mlp"
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        y = base.model.get_submodule(name)(x)
        down, down_bias, up, up_bias = (weights.tensors[f"{name}.{p}"] for p in bottleneck.PARTS)
        assert down.shape == (4, 32)
        f = getattr(torch if activation == "tanh" else F, activation)
        expected = y + f(y @ down.T + down_bias) @ up.T + up_bias
        with applied(base, weights):
            assert torch.allclose(base.model.get_submodule(name)(x), expected, atol=1e-5)


def test_places_are_the_last_linear_of_attention_and_the_feed_forward(tmp_path):
    llama, gpt2 = (made(m, tmp_path).model for m in (architectures.llama, architectures.gpt2))
    assert set(bottleneck.find_places(llama, "houlsby")) == {
        f"model.layers.{i}.{place}" for i in (0, 1) for place in ("self_attn.o_proj", "mlp")
    }
    assert set(bottleneck.find_places(gpt2, "houlsby")) == {
        f"transformer.h.{i}.{place}" for i in (0, 1) for place in ("attn.c_proj", "mlp")
    }
    assert bottleneck.find_places(gpt2, "pfeiffer") == {
        f"transformer.h.{i}.mlp": 32 for i in (0, 1)
    }


def test_layers_of_unknown_names_are_refused(tmp_path):
    base = made(architectures.llama, tmp_path)
    layer = base.model.model.layers[1]
    layer.strange = layer.mlp
    del layer.mlp
    with pytest.raises(InvalidInput, match=r"holds self_attn, .*strange"):
        bottleneck.find_places(base.model, "pfeiffer")


def test_nothing_is_drawn_from_the_process_generator(tmp_path):
    base = made(architectures.llama, tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with bottleneck.training(base, config(), steps=1):
        assert torch.equal(torch.rand(2), expected)


def test_training_goes_on_from_an_adapter_of_equal_options(tmp_path):
    base = made(architectures.llama, tmp_path)
    parent = moved(base, config(reduction=8))
    with bottleneck.training(base, config(reduction=8), steps=1, start=parent) as training:
        again = training.weights(torch.float32)
    assert again.options == parent.options
    assert all(torch.equal(again.tensors[n], t) for n, t in parent.tensors.items())
    with (
        pytest.raises(InvalidInput, match=r"'reduction': 8.*'reduction': 16"),
        bottleneck.training(base, config(), steps=1, start=parent),
    ):
        pass
    with (
        pytest.raises(InvalidInput, match="got prefix"),
        bottleneck.training(
            base, config(), steps=1, start=KindWeights("prefix", {}, {"x": torch.ones(1)})
        ),
    ):
        pass


@pytest.mark.parametrize(
    "options", [{"placement": "between"}, {"activation": "sign"}, {"reduction": 0}]
)
def test_unusable_options_are_refused(options, tmp_path):
    base = made(architectures.llama, tmp_path)
    with (
        pytest.raises(InvalidInput, match="`placement` of houlsby, pfeiffer"),
        bottleneck.training(base, config(**options), steps=1),
    ):
        pass


def test_an_adapter_of_another_model_is_refused(tmp_path):
    base = made(architectures.llama, tmp_path)
    other = moved(made(architectures.llama, tmp_path, hidden_size=64), config())
    deeper = moved(made(architectures.llama, tmp_path, num_hidden_layers=3), config())
    for weights in (other, deeper, KindWeights("bottleneck", {}, deeper.tensors)):
        with pytest.raises(WrongBase), applied(base, weights):
            pass


def test_it_trains_over_bf16_in_float32(tiny_base):
    base = load_base(tiny_base, "bf16", "cpu")
    with bottleneck.training(base, config(), steps=1) as training:
        assert {p.dtype for p in training.parameters.values()} == {torch.float32}
        assert base.model(input_ids=IDS).logits.dtype == torch.bfloat16
