"""Blocks of a LoRI adapter: fresh, continued, trained, and what capacity they leave."""

import pytest
import torch
from torch import nn

from lori_manager.adapters.lori import (
    capacity_left,
    continued_block,
    fresh_block,
    trainable_layers,
    trained_B,
    trained_block,
    used_entries,
)
from lori_manager.config import Config
from lori_manager.engine.codec import decode_adapter, encode_adapter
from lori_manager.engine.mask import calibrate_mask
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.errors import InvalidInput
from lori_manager.merging.concat import merge_concat

SHAPES = {"layers.0.q": (8, 6), "layers.0.up": (10, 6), "layers.1.q": (8, 6)}
CONFIG = Config(rank=4, alpha=8.0)


def block(seed=1, sparsity=None, dtype=torch.bfloat16, line="x", config=CONFIG):
    """A block as training leaves it, B random and masked."""
    fresh = fresh_block(SHAPES, config, line)
    g = torch.Generator().manual_seed(seed)
    B = {n: torch.randn(b.shape, generator=g) for n, b in fresh.B.items()}
    mask = None if sparsity is None else calibrate_mask(B, sparsity)
    if mask is not None:
        B = {n: b.masked_fill(~mask[n], 0) for n, b in B.items()}
    return Block({n: b.to(dtype) for n, b in B.items()}, fresh.scaling, fresh.projection, mask=mask)


def full(value):
    return {n: torch.full((s[0], 4), value) for n, s in SHAPES.items()}


def test_a_fresh_block_is_zero_on_the_lines_own_A():
    fresh = fresh_block(SHAPES, CONFIG, "x")
    assert fresh.scaling == 2.0
    assert {n: tuple(b.shape) for n, b in fresh.B.items()} == {
        n: (s[0], 4) for n, s in SHAPES.items()
    }
    assert not any(b.any() for b in fresh.B.values())
    assert {n: tuple(a.shape) for n, a in fresh.A.items()} == {
        n: (4, s[1]) for n, s in SHAPES.items()
    }
    assert fresh.projection_digest == fresh_block(SHAPES, CONFIG, "x").projection_digest
    others = [
        fresh_block(SHAPES, CONFIG, "y"),
        fresh_block(SHAPES, CONFIG.replace(seed=1), "x"),
        fresh_block(SHAPES, CONFIG.replace(projection="shared"), "x"),
    ]
    assert len({fresh.projection_digest, *(b.projection_digest for b in others)}) == 4


def test_a_shared_A_does_not_depend_on_the_line():
    shared = CONFIG.replace(projection="shared")
    a, b = (fresh_block(SHAPES, shared, line) for line in "xy")
    assert a.projection_digest == b.projection_digest


def test_only_the_targets_are_in_a_fresh_block():
    some = fresh_block(SHAPES, CONFIG.replace(targets=("q",)), "x")
    assert sorted(some.B) == ["layers.0.q", "layers.1.q"]
    with pytest.raises(InvalidInput, match="target 'k' matches no linear layer"):
        fresh_block(SHAPES, CONFIG.replace(targets=("q", "k")), "x")


def test_a_rank_counts_against_the_chosen_modules_alone():
    shapes = {**SHAPES, "tiny": (2, 6)}
    fresh_block(shapes, CONFIG.replace(targets=("q",)), "x")
    with pytest.raises(InvalidInput, match=r"`rank` 4 is above what tiny \(2 x 6\) can have"):
        fresh_block(shapes, CONFIG, "x")


def test_a_single_block_is_continued_as_it_is():
    one = block(sparsity=0.9)
    assert continued_block(AdapterWeights((one,)), CONFIG.replace(alpha=99.0)) is one


@pytest.mark.parametrize("alpha", [8.0, 5.0, 0.3])
def test_a_continued_concat_merge_keeps_the_update(alpha):
    members = [
        AdapterWeights((block(1, 0.9),)),
        AdapterWeights((block(2, line="y", config=Config(rank=3, alpha=5.0)),)),
    ]
    merged = merge_concat(members, [0.3, -1.7])
    one = continued_block(merged, CONFIG.replace(alpha=alpha))
    assert (one.scaling, one.mask, one.projection) == (alpha / 4, None, None)
    for name, update in one.updates().items():
        expected = sum(b.scaling * (b.B[name].double() @ b.A[name].double()) for b in merged.blocks)
        delta = update.scaling * (update.B.double() @ update.A.double())
        assert (delta - expected).abs().max() < 1e-6 * expected.abs().max()
        assert update.rank == 7


def test_a_continued_merge_at_scalings_of_powers_of_two_keeps_every_bit():
    merged = merge_concat([AdapterWeights((block(i, line=str(i)),)) for i in range(2)], [0.5, 0.25])
    one = continued_block(merged, CONFIG)
    for name, update in merged.updates().items():
        assert torch.equal(one.B[name] * one.scaling, update.B)
        assert torch.equal(one.A[name], update.A)


def test_a_merge_of_members_with_other_modules_is_continued_at_each_modules_own_rank():
    one = block(1)
    few = Block(
        {"layers.0.q": one.B["layers.0.q"]}, 3.0, tensors={"layers.0.q": one.A["layers.0.q"]}
    )
    merged = merge_concat([AdapterWeights((one,)), AdapterWeights((few,))], [1.0, 1.0])
    whole = continued_block(merged, CONFIG)
    assert {n: b.shape[1] for n, b in whole.B.items()} == {
        "layers.0.q": 8, "layers.0.up": 4, "layers.1.q": 4,
    }  # fmt: skip
    for name, update in merged.updates().items():
        assert torch.allclose(whole.updates()[name].delta(), update.delta(), rtol=1e-6)


def test_a_continued_merge_can_be_stored():
    merged = merge_concat(
        [AdapterWeights((block(i, 0.9, line=str(i)),)) for i in range(2)], [0.5] * 2
    )
    one = AdapterWeights((continued_block(merged, CONFIG),))
    again, _ = decode_adapter(encode_adapter(one, {}))
    assert all(torch.equal(again.updates()[n].B, u.B) for n, u in one.updates().items())


def test_used_entries_are_the_mask_or_what_is_not_zero():
    masked, dense = block(sparsity=0.5), block()
    dense.B["layers.0.q"][0, 0] = 0
    masked.B["layers.0.q"].zero_()
    used = used_entries(masked)
    assert all(torch.equal(m, masked.mask[n]) for n, m in used.items())
    used["layers.0.up"].fill_(True)
    assert not masked.mask["layers.0.up"].all()
    support = used_entries(dense)
    assert not support["layers.0.q"][0, 0]
    assert sum(int(m.sum()) for m in support.values()) == 4 * 26 - 1


def model():
    torch.manual_seed(0)
    net = nn.Module()
    net.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(6, 8), "up": nn.Linear(6, 10)}),
                                nn.ModuleDict({"q": nn.Linear(6, 8)})])  # fmt: skip
    return net.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_layers_start_from_the_blocks_B_bit_for_bit(dtype, sparsity):
    start = block(1, sparsity, dtype)
    for mask in (None, calibrate_mask(block(2).B, 0.9)):
        layers = trainable_layers(model(), start, mask)
        for name, B in trained_B(layers).items():
            assert B.dtype == torch.float32
            assert torch.equal(B, start.B[name].float())
            assert layers[name].values.numel() == (
                B.numel() if mask is None else int(mask[name].sum())
            )


def test_a_fresh_start_is_stored_in_the_type_asked_for():
    fresh = fresh_block(SHAPES, CONFIG, "x")
    B = full(1 / 3)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        stored = trained_block(fresh, B, None, name)
        assert {b.dtype for b in stored.B.values()} == {dtype}
        assert stored.projection == fresh.projection
        assert stored.scaling == fresh.scaling


@pytest.mark.parametrize("store_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_start_is_not_rounded_where_it_was_not_trained(dtype, store_dtype):
    start = block(1, None, dtype)
    mask = calibrate_mask(block(2).B, 0.9)
    layers = trainable_layers(model(), start, mask)
    with torch.no_grad():
        for layer in layers.values():
            layer.values.add_(1 / 3)
    stored = trained_block(start, trained_B(layers), mask, store_dtype)
    for name, B in stored.B.items():
        assert torch.equal(B[~mask[name]].double(), start.B[name][~mask[name]].double())
        assert not torch.equal(B[mask[name]].double(), start.B[name][mask[name]].double())
    assert len({b.dtype for b in stored.B.values()}) == 1
    encode_adapter(AdapterWeights((stored,)), {})


def test_a_bfloat16_start_stays_in_bfloat16():
    start = block(1, 0.9)
    stored = trained_block(start, {n: b.float() for n, b in start.B.items()}, start.mask, "bf16")
    assert {b.dtype for b in stored.B.values()} == {torch.bfloat16}


def test_the_new_mask_is_what_the_start_used_and_what_was_trained():
    start, new = block(1, 0.8), calibrate_mask(block(2).B, 0.9)
    zero, B = fresh_block(SHAPES, CONFIG, "x"), {n: b.float() for n, b in start.B.items()}
    stored = trained_block(start, B, new, "bf16")
    for name, m in stored.mask.items():
        assert torch.equal(m, start.mask[name] | new[name])
    first = trained_block(zero, full(0.0), new, "bf16")
    assert all(torch.equal(m, new[n]) for n, m in first.mask.items())
    assert trained_block(start, B, None, "bf16").mask is None
    assert trained_block(block(3), full(1.0), new, "bf16").mask is None
    assert trained_block(zero, full(1.0), None, "bf16").mask is None


def test_capacity_left_is_the_share_that_no_mask_has_taken():
    a = {"m": torch.tensor([[True, True], [False, False]])}
    b = {"m": torch.tensor([[True, False], [True, False]])}
    assert capacity_left([a]) == {"m": 0.5}
    assert capacity_left([a, b]) == {"m": 0.25}
    assert capacity_left([]) == {}
