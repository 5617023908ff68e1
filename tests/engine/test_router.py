"""The router: against Gaussian posteriors by hand, and what it says of itself."""

import copy
import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lori_manager.engine import router as routers
from lori_manager.engine.codec import ADAPTER_FORMAT, decode_adapter, encode_adapter
from lori_manager.engine.container import read_container, write_container
from lori_manager.engine.mask import calibrate_mask
from lori_manager.engine.projection import ProjectionSpec
from lori_manager.engine.router import Router, discriminant, fit_router
from lori_manager.engine.weights import AdapterWeights, Block, concat_adapters, routed_adapter
from lori_manager.errors import DamagedObject, InvalidInput

SPEC = ProjectionSpec(3, "", 2, {"q": 4, "up": 4})


def clouds(counts=(9, 7, 12), features=6, seed=0, apart=1.5):
    draw = np.random.default_rng(seed)
    shape = draw.standard_normal((features, features))
    return [
        torch.from_numpy(draw.standard_normal((n, features)) @ shape
                         + apart * draw.standard_normal(features)).float()
        for n in counts
    ]  # fmt: skip


def member(seed, blocks=1, rank=2, scaling=0.7):
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(blocks):
        B = {n: torch.randn(5, rank, generator=g).bfloat16() for n in SPEC.modules}
        mask = calibrate_mask(B, 0.5)
        B = {n: b.masked_fill(~mask[n], 0.0) for n, b in B.items()}
        made.append(Block(B, scaling, replace(SPEC, rank=rank, seed=seed), mask=mask))
    return AdapterWeights(tuple(made))


def routed(members=3):
    router, _ = fit_router(clouds((5,) * members), "model.layers.1")
    return routed_adapter([member(i, 1 + i % 2, 2 + i) for i in range(members)], router)


def posteriors(parts, priors, g, x):
    """Of Gaussians with one covariance, densities written out one row at a time."""
    parts = [np.asarray(p, np.float64) for p in parts]
    means = [p.mean(0) for p in parts]
    inner = np.concatenate([p - m for p, m in zip(parts, means, strict=True)])
    S = inner.T @ inner / len(inner)
    least = routers.FLOOR * np.diag(S).mean() + 1e-8 * np.square(means).mean()
    C = (1 - g) * S + g * (np.diag(np.diag(S)) + least * np.eye(len(S)))
    # What regularises the diagonal belongs to the diagonal alone.
    inverse, (_, logdet) = np.linalg.inv(C), np.linalg.slogdet(C)
    out = []
    for row in np.asarray(x, np.float64):
        logs = [
            math.log(w) - 0.5 * ((row - m) @ inverse @ (row - m) + logdet)
            for w, m in zip(priors, means, strict=True)
        ]
        densities = np.exp(np.array(logs) - max(logs))
        out.append(densities / densities.sum())
    return np.array(out)


@pytest.mark.parametrize("g", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("features", [3, 6, 40])  # more and fewer than rows
def test_shares_are_posteriors_of_gaussians_with_one_shrunk_covariance(g, features):
    parts, priors = clouds(features=features), [0.2, 0.5, 0.3]
    weights, bias = discriminant(parts, priors, g)
    x = torch.cat(clouds(seed=1, features=features))
    shares = (x.double() @ weights.t() + bias).softmax(1).numpy()
    assert np.allclose(shares, posteriors(parts, priors, g, x), atol=1e-9)


def test_a_router_is_that_discriminant_in_float32():
    parts = clouds()
    router, _ = fit_router(parts, "here", [1, 1, 1])
    weights, bias = discriminant(parts, [1, 1, 1])
    assert torch.equal(router.weights, weights.float())
    assert torch.equal(router.bias, bias.float())
    shares = router.shares(parts[0])
    assert shares.dtype == torch.float64
    assert torch.allclose(shares.sum(1), torch.ones(9, dtype=torch.double))
    assert torch.equal(router.choose(parts[0]), shares.argmax(1))


def test_the_shrinkage_is_what_a_sum_over_all_pairs_of_features_gives():
    z = torch.from_numpy(np.random.default_rng(0).standard_normal((12, 7)))
    z = z @ torch.from_numpy(np.random.default_rng(1).standard_normal((7, 7)))
    spread = large = 0.0
    for i in range(7):
        for j in range(7):
            if i != j:
                products = z[:, i] * z[:, j]
                large += float(products.mean()) ** 2
                spread += float((products - products.mean()).square().mean()) / 11
    found = routers._shrinkage(z, z @ z.t())
    assert found == pytest.approx(min(max(spread / large, routers.LEAST_SHRINKAGE), 1.0))


def test_the_scale_of_a_feature_does_not_matter():
    """But for the floor under variances, a thousandth of their mean."""
    parts, x = clouds(features=30), torch.cat(clouds(seed=1, features=30))
    plain, _ = fit_router(parts, "here")
    for sizes, near in ((torch.full((30,), 8.0), 1e-6), (torch.linspace(0.5, 2, 30), 0.02)):
        scaled, _ = fit_router([p * sizes for p in parts], "here")
        assert torch.allclose(plain.shares(x), scaled.shares(x * sizes), atol=near)


def test_priors_move_the_border_and_only_their_ratios_count():
    parts, x = clouds(apart=0.3), torch.cat(clouds(seed=1, apart=0.3))
    even, _ = fit_router(parts, "here")
    first, _ = fit_router(parts, "here", [98, 1, 1])
    again, _ = fit_router(parts, "here", [0.98, 0.01, 0.01])
    assert (first.choose(x) == 0).sum() > (even.choose(x) == 0).sum()
    assert torch.allclose(first.bias, again.bias)


def test_held_out_counts_every_prompt_once_by_routers_that_did_not_see_it():
    parts = clouds(features=40, apart=0.2)  # more features than rows: what is seen is known
    router, told = fit_router(parts, "here")
    assert [sum(row) for row in router.held_out] == [9, 7, 12]
    folds, right, logs = routers.FOLDS, 0, []
    for t, part in enumerate(parts):
        for i, x in enumerate(part):
            kept = [
                torch.stack([r for k, r in enumerate(p) if k % folds != i % folds]) for p in parts
            ]
            weights, bias = discriminant(kept, [1, 1, 1])
            scores = weights @ x.double() + bias
            right += int(scores.argmax()) == t
            logs.append(max(float(scores.log_softmax(0)[t]), -20.0))
    assert router.accuracy == right / 28
    assert told == pytest.approx(sum(logs) / 28)
    seen = sum(int((router.choose(p) == t).sum()) for t, p in enumerate(parts))
    assert seen > right  # held-out is the harder figure, so it is no accident that they agree


def test_features_are_not_changed_and_equal_prompts_give_a_router_too():
    parts = clouds()
    before = copy.deepcopy(parts)
    fit_router(parts, "here")
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))
    router, _ = fit_router([torch.zeros(3, 4), torch.ones(3, 4)], "here")
    assert router.choose(torch.tensor([[0.0] * 4, [1.0] * 4])).tolist() == [0, 1]
    router, _ = fit_router([torch.zeros(3, 4), torch.zeros(3, 4)], "here")
    assert router.shares(torch.zeros(1, 4)).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize(
    ("counts", "priors"), [((4,), None), ((4, 1), None), ((4, 4), [1]), ((4, 4), [1, 0])]
)
def test_too_little_to_fit_a_router_to_is_a_value_error(counts, priors):
    with pytest.raises(ValueError, match=r"two members or more|positive number"):
        fit_router(clouds(counts), "here", priors)


# ---- routed adapters


def test_members_come_back_as_they_were():
    members = [member(0), member(1, 2, 3), member(2)]
    router, _ = fit_router(clouds((5, 5, 5)), "here")
    whole = routed_adapter(members, router)
    assert (whole.parts, whole.rank) == ((1, 2, 1), 6)
    for i, one in enumerate(members):
        assert all(a is b for a, b in zip(whole.member(i).blocks, one.blocks, strict=True))
        assert whole.member(i).router is None
    for wrong in (-1, 3):
        with pytest.raises(IndexError):
            whole.member(wrong)
    with pytest.raises(IndexError):
        members[0].member(0)


def test_nothing_sums_a_routed_adapter():
    whole = routed()
    for use in (
        whole.updates,
        lambda: concat_adapters([whole, member(0)], [0.5, 0.5]),
        lambda: routed_adapter([whole, member(0), member(1)], whole.router),
    ):
        with pytest.raises(InvalidInput, match="has no single update: it is 3 adapters"):
            use()


def test_parts_must_make_up_the_blocks():
    whole = routed()
    for parts in ((), (1, 1, 1), (1, 3, 0), (4,)):
        with pytest.raises(ValueError, match="parts"):
            AdapterWeights(whole.blocks, whole.router, parts)
    with pytest.raises(ValueError, match="parts"):
        AdapterWeights(whole.blocks, None, (4,))


def test_a_router_whose_shapes_do_not_fit_is_a_value_error():
    good = routed().router
    for wrong in (
        {"bias": good.bias[:2]}, {"weights": good.weights[:, 0]}, {"held_out": ((1, 2), (3, 4))},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"expected weights|held_out"):
            Router(**({k: getattr(good, k) for k in good.__dataclass_fields__} | wrong))


def test_a_routed_adapter_returns_bit_for_bit():
    whole = routed()
    data = encode_adapter(whole, {"by": "test"})
    again, meta = decode_adapter(data)
    assert (again.parts, meta) == (whole.parts, {"by": "test"})
    assert (again.router.reads, again.router.held_out) == (
        whole.router.reads,
        whole.router.held_out,
    )
    for part in ("weights", "bias"):
        one, other = getattr(again.router, part), getattr(whole.router, part)
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
    for a, b in zip(again.blocks, whole.blocks, strict=True):
        assert (a.projection, a.scaling) == (b.projection, b.scaling)
        assert all(torch.equal(a.B[n], b.B[n]) for n in b.B)
        assert all(torch.equal(a.mask[n], b.mask[n]) for n in b.B)
    assert encode_adapter(again, meta) == data


def test_the_digest_covers_the_router():
    whole = routed()
    other = replace(whole.router, bias=whole.router.bias + 1e-3)
    data = encode_adapter(whole)
    assert encode_adapter(AdapterWeights(whole.blocks, other, whole.parts)) != data
    plain = encode_adapter(AdapterWeights(whole.blocks))
    assert len(plain) < len(data) < len(plain) + 2000


def test_files_of_adapters_without_a_router_are_what_they_were():
    """The digest was taken before there were routers."""
    B = {"q": torch.arange(10.0).view(5, 2) - 4, "up": torch.ones(5, 2)}
    mask = {n: b > 0 for n, b in B.items()}
    B = {n: b.where(mask[n], 0.0) for n, b in B.items()}
    dense = Block({"q": torch.full((3, 1), 0.25)}, -1.5, tensors={"q": torch.ones(1, 4)})
    data = encode_adapter(AdapterWeights((Block(B, 2.0, SPEC, mask=mask), dense)), {"base": "x"})
    assert hashlib.sha256(data).hexdigest() == GOLDEN


GOLDEN = "b80cea12a4ccf32b89c39d9119ed45c477295f8037f0fac38fcba707f5b75100"

DAMAGE = [
    ("parts", [1, 2]),
    ("parts", [1, 2, 0]),
    ("parts", [4]),
    ("parts", [True, 2, 1]),
    ("parts", []),
    ("features", 7),
    ("features", 0),
    ("features", 2**40),
    ("held_out", [[1, 2], [3, 4]]),
    ("held_out", [[1, 2, 3], [4, 5, 6], "abc"]),
    ("held_out", [[1, 2, 3], [4, 5, 6], [1, 2, -1]]),
    ("reads", ""),
    ("reads", 3),
    ("values", {"dtype": "float32"}),
    ("extra", 1),
]


@pytest.mark.parametrize(("key", "value"), DAMAGE, ids=str)
def test_a_router_that_says_what_cannot_be_is_damaged(key, value):
    container = read_container(encode_adapter(routed()), ADAPTER_FORMAT)
    container.record["router"][key] = value
    with pytest.raises(DamagedObject):
        decode_adapter(write_container(ADAPTER_FORMAT, container))


def test_a_router_without_its_tensors_is_damaged():
    for name in ("router.codes", "router.rest"):
        container = read_container(encode_adapter(routed()), ADAPTER_FORMAT)
        del container.tensors[name]
        with pytest.raises(DamagedObject, match="missing"):
            decode_adapter(write_container(ADAPTER_FORMAT, container))
    container = read_container(encode_adapter(routed()), ADAPTER_FORMAT)
    del container.record["router"]
    with pytest.raises(DamagedObject, match="unexpected tensor"):
        decode_adapter(write_container(ADAPTER_FORMAT, container))
