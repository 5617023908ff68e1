"""concat and linear: the exact weighted sum, against dense sums and against PEFT."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lori_manager.engine.mask import calibrate_mask
from lori_manager.engine.projection import ProjectionSpec
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.errors import InvalidInput
from lori_manager.merging.concat import merge_concat
from lori_manager.merging.linear import merge_linear

SHAPES = {"layers.0.q": (8, 6), "layers.0.up": (10, 6), "layers.1.q": (8, 6)}


pytestmark = pytest.mark.usefixtures("one_thread")


def random_B(rank, seed, modules=SHAPES, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(SHAPES[n][0], rank, generator=g).to(dtype) for n in modules}


def stored(rank, seed, scaling, modules=SHAPES):
    """An adapter whose A is kept as tensors, as an imported one's is."""
    g = torch.Generator().manual_seed(1000 + seed)
    A = {n: torch.randn(rank, SHAPES[n][1], generator=g) for n in modules}
    return AdapterWeights((Block(random_B(rank, seed, modules), scaling, tensors=A),))


def seeded(line, seed, scaling=2.0, sparsity=None, dtype=torch.float32, rank=4):
    """An adapter on the A of a line, masked or dense."""
    B = random_B(rank, seed, dtype=dtype)
    mask = None if sparsity is None else calibrate_mask(B, sparsity)
    if mask is not None:
        B = {n: b.masked_fill(~mask[n], 0.0) for n, b in B.items()}
    spec = ProjectionSpec(5, line, rank, {n: s[1] for n, s in SHAPES.items()})
    return AdapterWeights((Block(B, scaling, spec, mask=mask),))


def dense_sum(members, weights):
    """Module name -> the weighted sum of the members' dense updates, float64."""
    out = {}
    for member, w in zip(members, weights, strict=True):
        for block in member.blocks:
            for n, B in block.B.items():
                delta = w * block.scaling * (B.double() @ block.A[n].double())
                out[n] = out.get(n, 0) + delta
    return out


def assert_is_sum(merged, members, weights):
    expected = dense_sum(members, weights)
    assert merged.modules == sorted(expected)
    for name, update in merged.updates().items():
        delta = update.scaling * (update.B.double() @ update.A.double())
        assert torch.allclose(delta, expected[name], rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 6),
            st.floats(-3, 3),
            st.floats(-2, 2),
            st.sets(st.sampled_from(sorted(SHAPES)), min_size=1),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_concat_is_the_dense_weighted_sum_of_any_ranks_scalings_and_modules(parts):
    members = [stored(r, i, s, sorted(names)) for i, (r, s, _, names) in enumerate(parts)]
    weights = [w for _, _, w, _ in parts]
    merged = merge_concat(members, weights)
    assert_is_sum(merged, members, weights)
    assert merged.rank == max(
        sum(r for r, _, _, names in parts if n in names) for n in merged.modules
    )


def test_concat_of_merges_is_the_sum_of_the_sums():
    a, b, c = stored(2, 0, 1.5), seeded("x", 1, sparsity=0.9), seeded("y", 2)
    inner = merge_concat([a, b], [0.5, 2.0])
    merged = merge_concat([inner, c, a], [0.25, -1.0, 1.0])
    assert_is_sum(merged, [a, b, c], [1.125, 0.5, -1.0])


def test_concat_keeps_every_A_regenerable_and_every_mask():
    members = [seeded("x", 1, sparsity=0.9), seeded("y", 2, sparsity=0.5)]
    merged = merge_concat(members, [0.5, 0.5])
    for block, member in zip(merged.blocks, members, strict=True):
        assert block.projection == member.blocks[0].projection
        assert block.mask is member.blocks[0].mask
        assert block.scaling == 1.0


def test_concat_agrees_with_pefts_cat_on_a_tiny_model():
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1)
    )  # fmt: skip
    kinds = {"one": (2, 6.0, ["q_proj", "down_proj"]), "two": (5, 5.0, ["q_proj", "down_proj"])}
    peft = None
    for name, (rank, alpha, targets) in kinds.items():
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
        if peft is None:
            peft = get_peft_model(model, config, adapter_name=name)
        else:
            peft.add_adapter(name, config)
    layers = {n.removeprefix("base_model.model."): m for n, m in peft.named_modules()
              if hasattr(m, "lora_A") and "one" in m.lora_A}  # fmt: skip
    members = []
    for name, (rank, alpha, _) in kinds.items():
        for layer in layers.values():
            torch.nn.init.normal_(layer.lora_B[name].weight)
        members.append(
            AdapterWeights(
                (
                    Block(
                        {n: m.lora_B[name].weight.detach().clone() for n, m in layers.items()},
                        alpha / rank,
                        tensors={n: m.lora_A[name].weight.detach() for n, m in layers.items()},
                    ),
                )
            )
        )
    weights = [0.3, 0.8]
    peft.add_weighted_adapter(list(kinds), weights, "both", combination_type="cat")
    updates = merge_concat(members, weights).updates()
    assert sorted(updates) == sorted(layers)
    for name, layer in layers.items():
        expected = layer.get_delta_weight("both")
        assert updates[name].rank == layer.lora_A["both"].weight.shape[0] == 7
        difference = (updates[name].delta() - expected).abs().max() / expected.abs().max()
        assert difference < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [None, 0.0, 0.9])
def test_linear_is_the_dense_weighted_sum_at_unchanged_rank(dtype, sparsity):
    members = [seeded("x", i, s, sparsity, dtype) for i, s in enumerate((2.0, 0.5, -3.0))]
    weights = [0.5, 1.5, 0.25]
    merged = merge_linear(members, weights)
    assert_is_sum(merged, members, weights)
    assert merged.rank == 4
    block = merged.blocks[0]
    assert block.projection == members[0].blocks[0].projection
    assert all(b.dtype == torch.float32 for b in block.B.values())


def test_linear_equals_concat_where_both_apply():
    members, weights = [seeded("x", i, sparsity=0.5) for i in range(3)], [1 / 3] * 3
    linear, concat = merge_linear(members, weights), merge_concat(members, weights)
    for name, update in linear.updates().items():
        assert torch.allclose(update.delta(), concat.updates()[name].delta(), atol=1e-5)


def test_linear_keeps_the_union_of_the_masks_and_none_where_a_member_is_dense():
    a, b, dense = seeded("x", 1, sparsity=0.9), seeded("x", 2, sparsity=0.8), seeded("x", 3)
    mask = merge_linear([a, b], [0.5, 0.5]).blocks[0].mask
    for name, m in mask.items():
        assert torch.equal(m, a.blocks[0].mask[name] | b.blocks[0].mask[name])
    assert merge_linear([a, dense], [0.5, 0.5]).blocks[0].mask is None


def test_linear_takes_an_A_that_is_stored_where_it_is_the_same():
    member = seeded("x", 1)
    A = member.blocks[0].A
    other = AdapterWeights((Block(random_B(4, 2), 0.5, tensors=A),))
    for members in ([member, other], [other, member]):
        assert_is_sum(merge_linear(members, [1.0, -2.0]), members, [1.0, -2.0])


def test_linear_sums_where_the_first_member_has_no_scale():
    members = [seeded("x", 1, 0.0), seeded("x", 2, 2.0)]
    merged = merge_linear(members, [1.0, 0.5])
    assert_is_sum(merged, members, [1.0, 0.5])
    assert not any(u.delta().any() for u in merge_linear(members[:1], [0.5]).updates().values())


@pytest.mark.parametrize(
    "others",
    [
        [seeded("y", 2)],
        [seeded("x", 2, rank=3)],
        [stored(4, 2, 1.0)],
        [stored(4, 2, 1.0, ["layers.0.q"])],
        [seeded("x", 2), seeded("y", 3)],
    ],
)
def test_linear_refuses_members_with_another_A(others):
    with pytest.raises(InvalidInput, match="exact only where all members share one A"):
        merge_linear([seeded("x", 1), *others], [0.5] * (len(others) + 1))


def test_linear_refuses_a_merge_of_several_blocks():
    merged = merge_concat([seeded("x", 1), seeded("x", 2)], [0.5, 0.5])
    with pytest.raises(InvalidInput, match=r"takes adapters with a single A; .*`--method concat`"):
        merge_linear([merged], [1.0])


def test_an_A_that_differs_in_one_bit_is_another_A():
    member = seeded("x", 1)
    A = copy.deepcopy(dict(member.blocks[0].A))
    A["layers.1.q"][3, 5] = torch.nextafter(A["layers.1.q"][3, 5], torch.tensor(math.inf))
    other = AdapterWeights((Block(random_B(4, 2), 2.0, tensors=A),))
    with pytest.raises(InvalidInput, match="share one A"):
        merge_linear([member, other], [0.5, 0.5])
