"""What every registered merge method must do, read from the registry."""

import copy
from dataclasses import replace

import pytest
import torch

from lori_manager.engine.codec import decode_adapter, encode_adapter
from lori_manager.engine.mask import calibrate_mask
from lori_manager.engine.projection import ProjectionSpec
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.merging.methods import DEFAULTS, load_all, option_names, options_of

SHAPES = {"layers.0.q": (8, 6), "layers.0.up": (10, 6), "layers.1.q": (8, 6)}
SPEC = ProjectionSpec(3, "", 4, {n: s[1] for n, s in SHAPES.items()})
METHODS = list(load_all())
# For each option a value that is not the default.
OTHER = {
    "max_rank": 1, "space": "full", "density": 0.2, "seed": 7, "eps": 1.0, "shrink": 0.3,
    "general": 2.0, "answers": 0.1, "span": "members", "iterations": 1, "steps": 2, "rate": 0.1,
    "labels": 1.0,
}  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=METHODS, ids=lambda entry: entry.name)
def method(request):
    return request.param


def member(seed, scaling=2.0, sparsity=None, dtype=torch.float32):
    """An adapter that every method takes: one block, and the same A for every seed."""
    g = torch.Generator().manual_seed(seed)
    B = {n: torch.randn(s[0], 4, generator=g).to(dtype) for n, s in SHAPES.items()}
    mask = None if sparsity is None else calibrate_mask(B, sparsity)
    if mask is not None:
        B = {n: b.masked_fill(~mask[n], 0.0) for n, b in B.items()}
    return AdapterWeights((Block(B, scaling, SPEC, mask=mask),))


def run(method, members, weights, options=DEFAULTS):
    """The method, with second moments of inputs where it asks for them."""
    if method.facts.get("needs") != "grams":
        return method.item(members, weights, options)
    grams = []
    for one in members:
        content = sum(float(b.float().abs().sum()) for b in one.blocks[0].B.values())
        g = torch.Generator().manual_seed(int(content * 1000))  # a member's own, in any order
        X = {n: torch.randn(9, s[1], generator=g) for n, s in SHAPES.items()}
        grams.append({n: x.t() @ x / len(x) for n, x in X.items()})
    return method.item(members, [abs(w) for w in weights], replace(options, grams=grams))


def deltas(weights):
    return {n: u.scaling * (u.B.double() @ u.A.double()) for n, u in weights.updates().items()}


def assert_close(a, b):
    assert sorted(a) == sorted(b)
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-5, atol=1e-5)


def test_methods_say_where_they_come_from_and_what_they_promise(method):
    assert method.source
    assert (method.item.__doc__ or "").strip()
    for promise in ("identity", "ordered"):
        assert isinstance(method.facts.get(promise), bool), f"{method.name} tells no `{promise}`"


@pytest.mark.parametrize("option", option_names())
def test_an_option_changes_the_merge_where_the_method_says_that_it_takes_it(method, option):
    members, weights = [member(i, 1.0 + i) for i in range(3)], [0.5, 0.25, 0.25]
    usual = encode_adapter(run(method, members, weights), {})
    told = replace(DEFAULTS, **{option: OTHER[option]})
    other = encode_adapter(run(method, members, weights, told), {})
    assert (usual != other) == (option in options_of(method))


def test_every_option_is_tried():
    assert sorted(OTHER) == sorted(option_names())
    assert all(getattr(DEFAULTS, name) != value for name, value in OTHER.items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [None, 0.0, 0.9])
def test_one_adapter_at_weight_one_returns_itself_where_that_is_promised(method, dtype, sparsity):
    if not method.facts["identity"]:
        pytest.skip("not promised")
    one = member(1, 0.7, sparsity, dtype)
    merged = run(method, [one], [1.0])
    for name, update in one.updates().items():
        other = merged.updates()[name]
        assert torch.equal(other.delta(), update.delta())
        assert torch.equal(other.B, update.B)
        assert torch.equal(other.A, update.A)
    assert (merged.blocks[0].mask is None) == (sparsity is None)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_weight_one_for_one_and_zero_for_the_rest_gives_that_one(method, place):
    if not method.facts["identity"]:
        pytest.skip("not promised")
    members = [member(i, 1.0 + i) for i in range(3)]
    merged = run(method, members, [float(i == place) for i in range(3)])
    assert_close(deltas(merged), deltas(members[place]))


@pytest.mark.parametrize("sparsity", [None, 0.9])
def test_members_and_weights_are_not_changed(method, sparsity):
    members = [member(i, sparsity=sparsity, dtype=torch.bfloat16) for i in range(3)]
    weights = [0.5, 0.25, -1.0]
    before = copy.deepcopy((members, weights))
    run(method, members, weights)
    assert weights == before[1]
    for one, was in zip(members, before[0], strict=True):
        assert len(one.blocks) == len(was.blocks)
        for block, old in zip(one.blocks, was.blocks, strict=True):
            assert (block.scaling, block.projection) == (old.scaling, old.projection)
            assert all(torch.equal(block.B[n], old.B[n]) for n in old.B)
            assert all(torch.equal(block.A[n], old.A[n]) for n in old.B)
            assert all(torch.equal(block.mask[n], m) for n, m in (old.mask or {}).items())


def test_the_order_of_members_matters_only_where_that_is_declared(method):
    if method.facts["ordered"]:
        pytest.skip("declared to depend on the order")
    members, weights = [member(i, 1.0 + i) for i in range(3)], [0.5, 0.25, -1.0]
    merged = deltas(run(method, members, weights))
    assert_close(merged, deltas(run(method, members[::-1], weights[::-1])))


def test_the_same_members_twice_give_the_same_bits(method):
    members, weights = [member(i) for i in range(3)], [0.5, 0.25, -1.0]
    data = [encode_adapter(run(method, members, weights), {}) for _ in range(2)]
    assert data[0] == data[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_modules_shapes_devices_and_a_type_no_narrower_are_kept(method, dtype, count):
    members = [member(i, dtype=dtype, sparsity=0.5) for i in range(count)]
    merged = run(method, members, [1 / count] * count)
    assert merged.modules == sorted(SHAPES)
    for name, update in merged.updates().items():
        assert update.shape == SHAPES[name]
        assert update.A.device == update.B.device == members[0].blocks[0].B[name].device
    for block in merged.blocks:
        assert {b.dtype for b in block.B.values()} <= {dtype, torch.float32}


@pytest.mark.parametrize("sparsity", [None, 0.5, 0.999])
def test_what_comes_out_can_be_stored_and_read_again(method, sparsity):
    merged = run(method, [member(i, sparsity=sparsity) for i in range(2)], [0.5, 0.5])
    again, _ = decode_adapter(encode_adapter(merged, {}))
    for name, update in merged.updates().items():
        assert torch.equal(again.updates()[name].delta(), update.delta())


def test_adapters_of_zeros_merge_to_zero(method):
    B = {n: torch.zeros(s[0], 4) for n, s in SHAPES.items()}
    zero = AdapterWeights((Block(B, 2.0, SPEC),))
    merged = run(method, [zero, zero], [0.5, 0.5])
    assert not any(d.any() for d in deltas(merged).values())


@pytest.mark.parametrize(("count", "weights"), [(0, []), (1, []), (1, [0.5, 0.5]), (2, [1.0])])
def test_no_members_or_not_one_weight_each_is_a_value_error(method, count, weights):
    with pytest.raises(ValueError, match=f"got {count} members and {len(weights)} weights"):
        run(method, [member(i) for i in range(count)], weights)
