"""AdapterWeights: blocks whose updates add up, and their exact sums."""

import pytest
import torch

from lori_manager.engine.projection import ProjectionSpec, projection_digest
from lori_manager.engine.weights import AdapterWeights, Block, concat_adapters

SPEC = ProjectionSpec(0, "safety", 2, {"q": 3, "k": 3})


def stored(value, modules=("q",), rank=1, scaling=1.0):
    """B full of `value` and A of ones, (2, rank) and (rank, 3)."""
    return Block(
        {m: torch.full((2, rank), value) for m in modules},
        scaling,
        tensors={m: torch.ones(rank, 3) for m in modules},
    )


def seeded(seed=0, scaling=2.0, dtype=torch.float32, spec=SPEC):
    g = torch.Generator().manual_seed(seed)
    B = {m: torch.randn(2, 2, generator=g).to(dtype) for m in spec.modules}
    return AdapterWeights((Block(B, scaling, spec),))


def deltas(weights):
    return {name: update.delta() for name, update in weights.updates().items()}


def test_a_block_takes_A_from_its_projection_or_its_tensors():
    (block,) = seeded().blocks
    assert torch.equal(block.A["q"], SPEC.matrix("q"))
    assert block.projection_digest == SPEC.digest
    explicit = stored(1.0)
    assert explicit.A["q"].tolist() == [[1.0] * 3]
    assert explicit.projection_digest == projection_digest(explicit.A)


def test_a_stored_copy_of_A_has_the_digest_of_its_projection():
    (block,) = seeded().blocks
    copy = Block(block.B, block.scaling, tensors=dict(SPEC.matrices))
    assert copy.projection_digest == block.projection_digest


def test_updates_of_a_block_keep_their_scaling():
    update = stored(3.0, scaling=0.5).updates()["q"]
    assert update.scaling == 0.5
    assert update.delta().tolist() == [[1.5] * 3] * 2


def test_blocks_add_up_where_they_meet():
    weights = AdapterWeights((stored(3.0, scaling=0.5), stored(1.0, ("q", "k"), 2, -1.0)))
    assert weights.modules == ["k", "q"]
    assert weights.rank == 3
    assert deltas(weights)["q"].tolist() == [[-0.5] * 3] * 2  # 1.5 - 2
    assert deltas(weights)["k"].tolist() == [[-2.0] * 3] * 2


def test_rank_is_the_largest_of_any_module():
    assert AdapterWeights((stored(1.0), stored(1.0, ("k",), 5))).rank == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_updates_are_float32_and_round_no_second_time(dtype):
    weights = seeded(dtype=dtype)
    update = weights.updates()["q"]
    assert update.A.dtype == update.B.dtype == torch.float32
    exact = 2.0 * weights.blocks[0].B["q"].double() @ SPEC.matrix("q").double()
    assert torch.allclose(update.delta().double(), exact, rtol=1e-6, atol=1e-7)


def test_concat_is_the_weighted_sum_and_keeps_every_block_as_it_is():
    other = ProjectionSpec(1, "nlu", 2, {"q": 3, "v": 3})
    members = [seeded(0), seeded(1, spec=other), AdapterWeights((stored(3.0), stored(1.0)))]
    weights = [0.5, -0.25, 2.0]
    total = concat_adapters(members, weights)
    assert [b.scaling for b in total.blocks] == [1.0, -0.5, 2.0, 2.0]
    assert [b.projection for b in total.blocks] == [SPEC, other, None, None]
    assert total.blocks[0].B is members[0].blocks[0].B
    assert (total.modules, total.rank) == (["k", "q", "v"], 6)
    for name, delta in deltas(total).items():
        parts = [(w, deltas(m)) for w, m in zip(weights, members, strict=True)]
        expected = sum(w * d[name] for w, d in parts if name in d)
        assert torch.allclose(delta, expected, atol=1e-6)


def test_concat_of_one_at_weight_one_is_that_one():
    weights = seeded()
    again = concat_adapters([weights], [1])
    assert all(torch.equal(d, deltas(again)[n]) for n, d in deltas(weights).items())
    assert type(again.blocks[0].scaling) is float


@pytest.mark.parametrize("weights", [[], [1.0, 2.0]])
def test_concat_needs_one_weight_per_member(weights):
    with pytest.raises(ValueError, match="got 1 members"):
        concat_adapters([seeded()], weights)
    with pytest.raises(ValueError, match="got 0 members"):
        concat_adapters([], weights)


def test_malformed_blocks_are_a_value_error():
    B = {"q": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match="either a projection or tensors"):
        Block(B, 1.0)
    with pytest.raises(ValueError, match="either a projection or tensors"):
        Block(B, 1.0, SPEC, {"q": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="different modules"):
        Block(B, 1.0, SPEC)
    with pytest.raises(ValueError, match="different modules"):
        Block(B, 1.0, tensors={"k": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="at least one block"):
        AdapterWeights(())
