"""Where (IA)3 stands in an encoder: keys, values and the feed-forward's inner activations."""

import pytest
import torch
from encoders import IMAGES, TEXT, encoder

from lori_manager.adapters.kind import module_of
from lori_manager.config import Config
from lori_manager.errors import InvalidInput
from lori_manager.kinds import resolved
from lori_manager.models import load_base

BERT = ("key", "value", "output.dense")
PLACES = {
    "albert": ("key", "value", "ffn_output"),
    "deberta-v2": ("key_proj", "value_proj", "output.dense"),
    "distilbert": ("k_lin", "v_lin", "lin2"),
    "mpnet": ("k", "v", "output.dense"),
    **dict.fromkeys(("bert", "camembert", "electra", "ernie", "roberta", "xlm-roberta"), BERT),
    **dict.fromkeys(IMAGES, ("k_proj", "v_proj", "fc2")),
}
FUSED = {"modernbert"}
LAYERS = {"albert": 1}  # one and the same, all the way


def scaled(base, **options):
    """What trains, as `MODULE.outputs` or `MODULE.inputs`."""
    own = resolved(Config(kind="ia3", precision="fp32", kind_options=options))
    with module_of("ia3").training(base, own, steps=1) as training:
        return training.weights(torch.float32).tensors


def test_every_encoder_is_told_of_here():
    assert PLACES.keys() | FUSED == TEXT.keys() | IMAGES.keys()


@pytest.mark.parametrize("base_type", PLACES)
def test_keys_values_and_the_inner_activations_are_scaled_and_nothing_else(base_type, tmp_path):
    base = load_base(encoder(tmp_path, base_type), "fp32", "cpu")
    found = scaled(base)
    key, value, last = PLACES[base_type]
    if base_type == "dinov2" and not any(n.endswith(key) for n in base.linear_shapes):
        key, value = "key", "value"  # in older versions of transformers
    sides = ("outputs", "outputs", "inputs")
    expected = set()
    for name in base.linear_shapes:
        block = ".attention." in f".{name}."
        for ending, side in zip((key, value, last), sides, strict=True):
            if name.endswith(f".{ending}") and block == (side == "outputs"):
                expected.add(f"{name}.{side}")
    assert found.keys() == expected
    layers = LAYERS.get(base_type, 2)
    assert len(expected) == 3 * layers
    for name, (out_features, in_features) in base.linear_shapes.items():
        if f"{name}.inputs" in found:  # from the wide inside back to the model's width
            assert found[f"{name}.inputs"].numel() == in_features > out_features


@pytest.mark.parametrize("base_type", sorted(FUSED))
def test_fused_queries_keys_and_values_have_to_be_named(base_type, tmp_path):
    base = load_base(encoder(tmp_path, base_type), "fp32", "cpu")
    refused = f"which modules of {base_type} hold keys, values and the feed-forward alone"
    with pytest.raises(InvalidInput, match=refused):
        scaled(base)
    assert len(scaled(base, inputs="mlp.Wo")) == 2
