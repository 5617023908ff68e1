"""SVFit: singular values alone move, and what is stored is that and nothing else."""

import pytest
import torch

from lori_manager.adapters import svfit
from lori_manager.adapters.applying import applied
from lori_manager.config import Config
from lori_manager.engine.update import LowRankUpdate
from lori_manager.engine.weights import AdapterWeights, KindWeights, concat_adapters, one_block
from lori_manager.errors import InvalidInput
from lori_manager.kinds import resolved
from lori_manager.models import load_base

NAME = "model.layers.0.self_attn.k_proj"


@pytest.fixture
def base(tiny_base):
    return load_base(tiny_base, "fp32", "cpu")


def config(targets=("k_proj",), **options):
    return resolved(Config(kind="svfit", targets=targets, kind_options=options))


def moved(base, settings, start=None, by=0.3):
    """An SVFit adapter whose deltas were moved by hand, alternating in sign."""
    with svfit.training(base, settings, steps=1, start=start) as training:
        for p in training.parameters.values():
            p.data += by * torch.tensor([1.0, -0.5]).repeat(len(p))[: len(p)]
        return training.weights(torch.float32), training


def test_the_update_changes_the_leading_singular_values_by_delta(base):
    W = base.model.get_submodule(NAME).weight
    weights, _ = moved(base, config(values=3))
    s = torch.linalg.svdvals(W + weights.updates()[NAME].delta())
    expected = torch.linalg.svdvals(W)
    expected[:3] += torch.tensor([0.3, -0.15, 0.3])
    assert torch.allclose(s, expected.sort(descending=True).values, atol=1e-5)


def test_no_more_values_train_than_a_module_has(base):
    _, training = moved(base, config(("all-linear",)))
    counts = {name: len(p) for name, p in training.parameters.items()}
    assert set(counts.values()) == {16, 32}  # k and v have 16 outputs
    assert training.facts == {"energy_mean": 1.0, "energy_min": 1.0}
    assert "32 largest singular values hold 100.0%" in training.notes[0]


def test_a_few_values_say_what_they_hold(base):
    _, training = moved(base, config(("all-linear",), values=4))
    W = [base.model.get_submodule(n).weight for n in base.linear_shapes]
    shares = [float(torch.linalg.svdvals(w)[:4].square().sum() / w.square().sum()) for w in W]
    assert training.facts["energy_min"] == pytest.approx(min(shares), abs=1e-4)
    assert training.facts["energy_mean"] == pytest.approx(sum(shares) / len(shares), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_from_what_is_stored_and_from_exact_merges(base, dtype):
    settings = config(values=6)
    one, _ = moved(base, settings)
    rounded = one_block(one.updates(), dtype)
    merged = concat_adapters([rounded, rounded], [0.5, 1.0])
    with svfit.training(base, settings, steps=1, start=merged) as training:
        delta = training.parameters[f"{NAME}.delta"].detach()
    expected = 1.5 * 0.3 * torch.tensor([1.0, -0.5]).repeat(3)
    assert torch.allclose(delta, expected, atol=1e-5 if dtype == torch.float32 else 2e-3)


def test_other_adapters_are_no_start(base):
    torch.manual_seed(0)
    random = LowRankUpdate(torch.randn(2, 32), torch.randn(16, 2), 1.0)
    elsewhere = one_block({"model.layers.0.self_attn.q_proj": random})
    for start, reason in (
        (one_block({NAME: random}), "no change of its leading singular values"),
        (elsewhere, "also updates 'model.layers.0.self_attn.q_proj'"),
        (KindWeights("full", {}, {"x": torch.ones(1)}), "kind `full`"),
    ):
        with (
            pytest.raises(InvalidInput, match=reason),
            svfit.training(base, config(values=4), steps=1, start=start),
        ):
            pass


def test_bf16_bases_train_and_apply_alike(tiny_base):
    base = load_base(tiny_base, "bf16", "cpu")
    ids = torch.arange(6)[None] + 40
    plain = base.model(input_ids=ids).logits
    with svfit.training(base, config(("all-linear",), values=8), steps=1) as training:
        for p in training.parameters.values():
            assert p.dtype == torch.float32
            p.data += 1.0
        during = base.model(input_ids=ids).logits
        weights = training.weights(torch.bfloat16)
    assert isinstance(weights, AdapterWeights)
    with applied(base, weights), torch.no_grad():
        after = base.model(input_ids=ids).logits
    assert (after - during).abs().max() < 0.1 * plain.std()
    assert (after - plain).abs().max() > plain.std()


@pytest.mark.parametrize("options", [{"values": 0}, {"svd": "fast"}])
def test_unusable_options_are_refused(base, options):
    with (
        pytest.raises(InvalidInput, match="`values` of at least 1"),
        svfit.training(base, config(**options), steps=1),
    ):
        pass
