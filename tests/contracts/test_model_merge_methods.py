"""What every merge method that runs the model must do, read from the list of methods."""

import copy
import hashlib
from dataclasses import replace

import architectures
import numpy as np
import pytest
import torch

from lori_manager.combining import methods
from lori_manager.engine.codec import decode_adapter, encode_adapter
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.errors import InvalidInput
from lori_manager.merging.methods import DEFAULTS, MergeOptions, option_names, options_of
from lori_manager.models import BaseModel, linear_shapes
from lori_manager.tasks.encoding import Encoded

ALL = [entry for entry in methods() if entry.facts.get("needs") in ("answers", "labels")]
# `routed` merges nothing: what it promises instead is in test_routed.py.
METHODS = [entry for entry in ALL if entry.name != "routed"]
# For each option a value that is not the default.
OTHER = {
    "max_rank": 1, "space": "full", "density": 0.2, "seed": 7, "eps": 1.0, "shrink": 0.3,
    "general": 2.0, "answers": 0.1, "span": "members", "iterations": 1, "steps": 2, "rate": 0.1,
    "labels": 1.0,
}  # fmt: skip
OPTIONS = MergeOptions(steps=3, iterations=2)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=METHODS, ids=lambda entry: entry.name)
def method(request):
    return request.param


def made(make, folder):
    torch.manual_seed(0)
    return BaseModel(make().eval().requires_grad_(False), folder, "fp32")


@pytest.fixture
def base(tmp_path):
    return made(architectures.llama, tmp_path)


def block(model, seed, *, rank=2, density=None, dtype=torch.float32, scaling=0.7, only=""):
    g = torch.Generator().manual_seed(seed)
    shapes = {n: s for n, s in linear_shapes(model).items() if only in n and "lm_head" not in n}
    A = {n: torch.randn(rank, s[1], generator=g) / s[1] ** 0.5 for n, s in shapes.items()}
    B = {n: torch.randn(s[0], rank, generator=g) * 0.3 for n, s in shapes.items()}
    mask = None
    if density is not None:
        mask = {n: torch.rand(b.shape, generator=g) < density for n, b in B.items()}
        B = {n: b * mask[n] for n, b in B.items()}
    B = {n: b.to(dtype) for n, b in B.items()}
    return Block(B, scaling, tensors={n: a.to(dtype) for n, a in A.items()}, mask=mask)


def member(model, seed, **how):
    return AdapterWeights((block(model, seed, **how),))


def rows_of(seed, count=10):
    draw = np.random.default_rng(seed)
    return [
        Encoded(draw.integers(0, 61, n).astype(np.int32), int(draw.integers(1, n - 1)))
        for n in draw.integers(4, 9, count)
    ]


def run(method, base, members, weights, options=OPTIONS, **more):
    # A member's own rows, in any order of the members.
    rows = [rows_of(int(sum(float(b.float().abs().sum()) for b in m.blocks[0].B.values())))
            for m in members]  # fmt: skip
    return method.item(base, members, weights, rows, options, **more)


def deltas(weights):
    return {n: u.scaling * (u.B.double() @ u.A.double()) for n, u in weights.updates().items()}


def far(a, b):
    """Distance of all updates, relative to the first ones'."""
    off = sum(float((a[n] - b[n]).square().sum()) for n in a)
    return (off / sum(float(d.square().sum()) for d in a.values())) ** 0.5


def model_bits(base):
    seen = hashlib.sha256()
    for name, tensor in sorted(base.model.state_dict().items()):
        seen.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()


def test_methods_say_where_they_come_from_and_what_they_promise(method):
    assert method.source
    assert (method.item.__doc__ or "").strip()
    for promise in ("identity", "ordered"):
        assert isinstance(method.facts.get(promise), bool), f"{method.name} tells no `{promise}`"


@pytest.mark.parametrize("option", option_names())
def test_an_option_changes_the_merge_where_the_method_says_that_it_takes_it(method, base, option):
    members = [member(base.model, i) for i in (1, 2)]
    how = {"general": rows_of(9)}
    usual = replace(DEFAULTS, steps=3, iterations=2)
    told = replace(usual, **{option: OTHER[option]})
    made = [
        encode_adapter(run(method, base, members, [0.5, 0.5], options, **how), {})
        for options in (usual, told)
    ]
    assert (made[0] != made[1]) == (option in options_of(method))


def test_one_adapter_at_weight_one_returns_itself_where_that_is_promised(method, base):
    if not method.facts["identity"]:
        pytest.skip("not promised")
    one, other = member(base.model, 1, density=0.5), member(base.model, 2)
    assert run(method, base, [one], [1.0]) is one
    assert run(method, base, [other, one], [0.0, 1.0]) is one


def test_members_weights_and_the_model_are_not_changed(method, base):
    members = [member(base.model, i, density=0.5, dtype=torch.bfloat16) for i in (1, 2)]
    weights = [0.25, 0.75]
    before = copy.deepcopy((members, weights))
    modules, bits = dict(base.model.named_modules()), model_bits(base)
    frozen = {n: p.requires_grad for n, p in base.model.named_parameters()}
    run(method, base, members, weights)
    assert weights == before[1]
    for one, was in zip(members, before[0], strict=True):
        for new, old in zip(one.blocks, was.blocks, strict=True):
            assert new.scaling == old.scaling
            for name, B in old.B.items():
                assert torch.equal(new.B[name], B)
                assert torch.equal(new.A[name], old.A[name])
                assert torch.equal(new.mask[name], old.mask[name])
    now = dict(base.model.named_modules())
    assert list(now) == list(modules)
    assert all(now[name] is modules[name] for name in modules)
    assert model_bits(base) == bits
    assert {n: p.requires_grad for n, p in base.model.named_parameters()} == frozen
    assert not any(m.training for m in now.values())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in now.values())
    assert all(p.grad is None for p in base.model.parameters())


def test_the_order_of_members_matters_only_where_that_is_declared(method, base):
    if method.facts["ordered"]:
        pytest.skip("declared to depend on the order")
    members = [member(base.model, i) for i in (1, 2, 3)]
    weights = [0.5, 0.2, 0.3]
    merged = deltas(run(method, base, members, weights))
    turned = deltas(run(method, base, members[::-1], weights[::-1]))
    assert far(merged, turned) < 1e-3


def test_the_same_members_twice_give_the_same_bits(method, base):
    members = [member(base.model, i, dtype=torch.bfloat16) for i in (1, 2)]
    data = [encode_adapter(run(method, base, members, [0.5, 0.5]), {}) for _ in range(2)]
    assert data[0] == data[1]


@pytest.mark.parametrize(
    "make", [architectures.gpt2, architectures.gemma, architectures.gemma2, architectures.gemma3]
)
def test_shapes_and_devices_are_kept_in_other_architectures(method, tmp_path, make):
    base = made(make, tmp_path)
    members = [member(base.model, i) for i in (1, 2)]
    merged = run(method, base, members, [0.5, 0.5])
    assert merged.modules == members[0].modules
    for name, update in merged.updates().items():
        assert update.shape == members[0].updates()[name].shape
        assert torch.isfinite(update.delta()).all()
        assert update.A.device == update.B.device == torch.device("cpu")
    again, _ = decode_adapter(encode_adapter(merged, {}))
    assert far(deltas(merged), deltas(again)) == 0


@pytest.mark.parametrize("options", [{}, {"span": "members"}, {"max_rank": 1}])
def test_members_of_other_modules_and_of_several_blocks_are_taken(method, base, options):
    two = AdapterWeights((block(base.model, 1, density=0.5, only="q_proj"),
                          block(base.model, 2, rank=3, scaling=-1.5, only="proj")))  # fmt: skip
    members = [two, member(base.model, 3, only="mlp"), member(base.model, 4, only="0.self_attn.k")]
    merged = run(method, base, members, [0.5, 0.25, 0.25], MergeOptions(steps=2, **options))
    assert merged.modules == sorted({n for m in members for n in m.modules})
    assert all(torch.isfinite(d).all() for d in deltas(merged).values())
    if "max_rank" in options:
        assert merged.rank == 1


def test_rows_of_one_token_of_completion_and_of_one_of_prompt_are_enough(method, base):
    members = [member(base.model, i) for i in (1, 2)]
    rows = [[Encoded(np.array([3, 5], np.int32), 1)], [Encoded(np.array([7, 4], np.int32), 1)]]
    merged = method.item(base, members, [0.5, 0.5], rows, OPTIONS)
    assert all(torch.isfinite(d).all() for d in deltas(merged).values())


def test_adapters_of_zeros_merge_to_what_is_finite(method, base):
    one = member(base.model, 1)
    (old,) = one.blocks
    zero = AdapterWeights(
        (Block({n: torch.zeros_like(b) for n, b in old.B.items()}, 0.7, tensors=old.A),)
    )
    merged = run(method, base, [zero, zero], [0.5, 0.5])
    assert all(torch.isfinite(d).all() for d in deltas(merged).values())


def test_a_half_precision_base_gives_finite_updates_in_the_members_dtype(method, tmp_path):
    torch.manual_seed(0)
    model = architectures.llama().eval().requires_grad_(False).to(torch.bfloat16)
    base = BaseModel(model, tmp_path, "bf16")
    members = [member(model, i, dtype=torch.bfloat16) for i in (1, 2)]
    merged = run(method, base, members, [0.5, 0.5])
    assert all(torch.isfinite(d).all() for d in deltas(merged).values())
    assert {b.dtype for one in merged.blocks for b in one.B.values()} == {torch.bfloat16}


@pytest.mark.parametrize("method", ALL, ids=lambda entry: entry.name)
@pytest.mark.parametrize(("count", "weights"), [(0, []), (1, []), (1, [0.5, 0.5]), (2, [1.0])])
def test_no_members_or_not_one_weight_each_is_a_value_error(method, base, count, weights):
    with pytest.raises(ValueError, match=f"got {count} members and {len(weights)} weights"):
        run(method, base, [member(base.model, i) for i in range(count)], weights)


def test_weights_that_are_all_zero_are_refused(method, base):
    members = [member(base.model, i) for i in (1, 2)]
    with pytest.raises(InvalidInput, match="`weights` must not all be 0"):
        run(method, base, members, [0.0, 0.0])
