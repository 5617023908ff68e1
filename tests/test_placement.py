"""Types of layers, and which of them are chosen."""

import math

import architectures
import pytest

from lori_manager.errors import InvalidInput
from lori_manager.models import linear_shapes, resolve_targets
from lori_manager.placement import Placement, block_number, module_types


def placement(scores, shapes=None):
    shapes = shapes or dict.fromkeys(scores, (4, 2))
    return Placement("colour", 1, scores, shapes, prompts=3, tokens=10, seed=0, precision="fp32")


LLAMA = {
    f"model.layers.{i}.{name}": score
    for name, pair in {
        "self_attn.q_proj": (2.0, 3.0), "mlp.up_proj": (0.5, 1.5), "mlp.down_proj": (1.0, 1.2),
    }.items()
    for i, score in zip((0, 10), pair, strict=True)
}  # fmt: skip


def test_a_type_has_the_mean_and_spread_of_its_layers():
    up, down, q = placement(LLAMA).types
    assert [one.name for one in (up, down, q)] == ["up_proj", "down_proj", "q_proj"]
    assert (up.score, up.spread) == (1.0, 0.5)
    assert (q.score, q.spread) == (2.5, 0.5)
    assert down.score == pytest.approx(1.1)
    assert up.layers == {0: 0.5, 10: 1.5}
    assert up.modules == ("model.layers.0.mlp.up_proj", "model.layers.10.mlp.up_proj")
    assert (up.parameters(3), up.lora_parameters(3)) == (3 * 8, 3 * 12)


def test_the_lowest_are_chosen_and_equals_by_name():
    found = placement(LLAMA)
    assert found.targets(1) == ("up_proj",)
    assert found.targets(2) == ("up_proj", "down_proj")
    equal = placement(dict.fromkeys(LLAMA, 1.0))
    assert equal.targets(2) == ("down_proj", "q_proj")


@pytest.mark.parametrize("top", [0, -1, 4])
def test_more_or_fewer_types_than_there_are_are_refused(top):
    with pytest.raises(InvalidInput, match=rf"`top` must be from 1 to 3, .*q_proj\), got {top}"):
        placement(LLAMA).targets(top)


def test_the_reason_is_one_sentence_with_the_scores():
    found = placement(LLAMA)
    assert found.reason(2) == (
        "up_proj and down_proj answer this task's prompts least, for weights of their size "
        "(score 1.00 to 1.10; the others 2.50), which is where PLoP puts adapters."
    )
    assert found.reason(1).startswith("up_proj answers this task's prompts least, ")
    assert "(score 1.00 to 2.50; there are no others)" in found.reason(3)
    assert found.reason(3).startswith("up_proj, down_proj and q_proj answer ")


@pytest.mark.parametrize("make", architectures.PACKS)
def test_types_are_named_so_that_targets_mean_them_and_nothing_else(make):
    shapes = linear_shapes(make())
    types = module_types(shapes)
    assert sorted(m for modules in types.values() for m in modules) == sorted(shapes)
    for name, modules in types.items():
        assert resolve_targets(shapes, [name]) == sorted(modules)
        assert len(modules) == 2  # one a layer
    if make is architectures.gpt2:
        assert set(types) == {"c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"}
    else:
        assert {"q_proj", "v_proj", "down_proj"} <= set(types)


def test_a_type_whose_name_means_others_too_is_targeted_by_full_names():
    scores = {"h.0.w": 1.0, "h.1.w": 1.2, "h.0.shared.w": 3.0, "h.1.shared.w": 3.2}
    found = placement(scores)
    assert [one.name for one in found.types] == ["w", "shared.w"]
    assert found.targets(1) == ("h.0.w", "h.1.w")
    assert resolve_targets(found.shapes, found.targets(1)) == ["h.0.w", "h.1.w"]
    assert found.targets(2) == ("h.0.w", "h.1.w", "shared.w")


def test_names_match_in_whole_parts():
    types = module_types(["h.0.up", "h.0.cup", "h.0.mlp.sup"])
    assert set(types) == {"up", "cup", "sup"}


def test_experts_of_a_layer_are_one_type_and_one_cell():
    scores = {f"layers.{i}.experts.{e}.w": 1.0 + i + e for i in (0, 1) for e in (0, 1)}
    (one,) = placement(scores).types
    assert one.layers == {0: 1.5, 1: 2.5}
    assert one.score == 2.0
    assert one.spread == pytest.approx(math.sqrt(0.5))


def test_numbers_of_blocks():
    assert block_number("model.layers.12.mlp.up") == 12
    assert block_number("head") is None
    (one,) = placement({"connector": 1.0}).types
    assert (one.name, one.layers) == ("connector", {None: 1.0})
