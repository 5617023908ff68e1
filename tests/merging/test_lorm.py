"""One B on a shared A, against the normal equations."""

import pytest
import torch

from lori_manager.engine.projection import ProjectionSpec
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.errors import InvalidInput
from lori_manager.merging.lorm import merge_lorm
from lori_manager.merging.methods import MergeOptions

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = ProjectionSpec(1, "", 3, {"m": 6})


def member(seed, spec=SPEC, scaling=1.5):
    g = torch.Generator().manual_seed(seed)
    return AdapterWeights((Block({"m": torch.randn(5, 3, generator=g)}, scaling, spec),))


def moments(seed):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed + 50))
    return x, {"m": x.t() @ x / len(x)}


def test_the_merged_B_errs_least_on_all_members_inputs():
    members = [member(1), member(2, scaling=0.5)]
    X, grams = zip(*(moments(s) for s in (1, 2)), strict=True)
    weights = [0.3, 0.7]
    merged = merge_lorm(members, weights, MergeOptions(grams=grams, eps=1e-9))
    block = merged.blocks[0]
    assert block.projection == SPEC
    A = block.A["m"].double()

    def error(B):
        return sum(
            w * float(((x.double() @ A.t()) @ (B - m.blocks[0].B["m"].double() * s).t())
                      .square().sum(1).mean())
            for w, x, m, s in zip(weights, X, members, (1.5, 0.5), strict=True)
        )  # fmt: skip

    found = block.B["m"].double() * block.scaling
    Z = torch.cat([(w / 40) ** 0.5 * x.double() @ A.t() for w, x in zip(weights, X, strict=True)])
    Y = torch.cat([
        (w / 40) ** 0.5 * (x.double() @ A.t()) @ (m.blocks[0].B["m"].double() * s).t()
        for w, x, m, s in zip(weights, X, members, (1.5, 0.5), strict=True)
    ])  # fmt: skip
    best = torch.linalg.lstsq(Z, Y).solution.t()
    assert torch.allclose(found, best, rtol=1e-4, atol=1e-5)
    assert error(found) <= error(best) * (1 + 1e-6)


def test_members_on_different_As_or_of_several_blocks_are_refused():
    other = ProjectionSpec(2, "", 3, {"m": 6})
    grams = [moments(s)[1] for s in (1, 2)]
    options = MergeOptions(grams=grams)
    with pytest.raises(InvalidInput, match="--projection shared"):
        merge_lorm([member(1), member(2, other)], [1, 1], options)
    two = AdapterWeights((*member(1).blocks, *member(3).blocks))
    with pytest.raises(InvalidInput, match="one block"):
        merge_lorm([two, member(2)], [1, 1], options)
    with pytest.raises(InvalidInput, match="probe rows"):
        merge_lorm([member(1), member(2)], [1, 1])


def test_a_member_without_scaling_does_not_turn_the_merge_to_numbers_that_are_none():
    grams = [moments(s)[1] for s in (1, 2)]
    options = MergeOptions(grams=grams, eps=1e-9)
    silent, other = member(1, scaling=0.0), member(2)
    found = merge_lorm([silent, other], [0.5, 0.5], options).blocks[0]
    expected = merge_lorm([other, silent], [0.5, 0.5], MergeOptions(grams=grams[::-1], eps=1e-9))
    delta = expected.updates()["m"].delta()
    assert torch.allclose(found.updates()["m"].delta(), delta, atol=1e-5)
    assert bool(delta.any())
