"""Merging by regression: what it promises on a model, against direct least squares."""

from dataclasses import replace

import architectures
import numpy as np
import pytest
import torch

from lori_manager.consolidation import input_grams, prompts_of
from lori_manager.engine.layers import attached, low_rank_layers
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.errors import InvalidInput
from lori_manager.forward import Forward
from lori_manager.iteris import merge_iteris
from lori_manager.layerwise import merge_layerwise
from lori_manager.merging.methods import MergeOptions
from lori_manager.merging.regmean import merge_regmean
from lori_manager.models import BaseModel, linear_shapes
from lori_manager.tasks.encoding import Encoded

KEEPING = MergeOptions(eps=1e-3, answers=0.0, span="members")
pytestmark = pytest.mark.usefixtures("one_thread")


def make_base(make, folder):
    torch.manual_seed(0)
    return BaseModel(make().eval().requires_grad_(False), folder, "fp32")


def adapter(model, seed, rank=3, size=0.3, mask=None):
    g = torch.Generator().manual_seed(seed)
    shapes = linear_shapes(model)
    A = {n: torch.randn(rank, s[1], generator=g) / s[1] ** 0.5 for n, s in shapes.items()}
    B = {n: torch.randn(s[0], rank, generator=g) * size for n, s in shapes.items()}
    if mask is not None:
        mask = {n: torch.rand(b.shape, generator=g) < mask for n, b in B.items()}
        B = {n: b * mask[n] for n, b in B.items()}
    return AdapterWeights((Block(B, 0.7, tensors=A, mask=mask),))


def rows_of(seed, count=8, low=0, high=61):
    draw = np.random.default_rng(seed)
    return [Encoded(draw.integers(low, high, n), 1) for n in draw.integers(4, 9, count)]


def logits(base, weights, rows):
    with attached(base.model, low_rank_layers(base.model, weights.updates())), torch.no_grad():
        return [base.model(torch.as_tensor(np.asarray(r.ids))[None]).logits[0] for r in rows]


def distance(a, b):
    return float(sum((x - y).square().sum() for x, y in zip(a, b, strict=True)))


def deltas(weights):
    return {n: u.delta() for n, u in weights.updates().items()}


@pytest.mark.parametrize("make", [architectures.llama, architectures.gemma2, architectures.gpt2])
def test_grams_are_the_mean_of_the_inputs_outer_products(tmp_path, make):
    """Against hooks on every row alone, where padding must not count."""
    base = make_base(make, tmp_path)
    one, rows = adapter(base.model, 1), rows_of(1)
    before = list(dict(base.model.named_modules()))
    grams = input_grams(base, one.updates(), rows, 3)
    layers = low_rank_layers(base.model, one.updates())
    seen = {n: [] for n in layers}
    with attached(base.model, layers), torch.no_grad():
        for name, layer in layers.items():
            layer.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0][0]))
        for row in rows:
            base.model(torch.as_tensor(np.asarray(row.ids))[None])
    for name, parts in seen.items():
        x = torch.cat(parts)
        assert len(x) == sum(len(r.ids) for r in rows)
        assert torch.allclose(grams[name], x.t() @ x / len(x), rtol=1e-3, atol=1e-5), name
    assert list(dict(base.model.named_modules())) == before


def test_regmean_is_the_least_squares_solution():
    """Against the normal equations of the dense update, with an eps that does not matter."""
    g = torch.Generator().manual_seed(0)
    X = [torch.randn(40, 6, generator=g) for _ in range(2)]
    grams = [{"m": x.t() @ x / len(x)} for x in X]
    members = [
        AdapterWeights((Block({"m": torch.randn(5, 2, generator=g)}, 1.5,
                              tensors={"m": torch.randn(2, 6, generator=g)}),))
        for _ in range(2)
    ]  # fmt: skip
    merged = merge_regmean(members, [0.3, 0.7], MergeOptions(grams=grams, eps=1e-9))
    wide = [deltas(m)["m"].double() for m in members]
    G = [0.3 * grams[0]["m"].double(), 0.7 * grams[1]["m"].double()]
    expected = (wide[0] @ G[0] + wide[1] @ G[1]) @ torch.linalg.inv(G[0] + G[1])
    assert torch.allclose(deltas(merged)["m"].double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.blocks[0].B["m"], members[0].blocks[0].B["m"])

    def error(D):
        return sum(
            w * float(((x @ (D - d).t()) ** 2).mean())
            for w, x, d in zip((0.3, 0.7), [x.double() for x in X], wide, strict=True)
        )

    assert error(expected) < 0.9 * error(0.3 * wide[0] + 0.7 * wide[1])
    cut = merge_regmean(members, [0.3, 0.7], MergeOptions(grams=grams, eps=1e-9, max_rank=2))
    assert cut.rank == 2
    plain = torch.linalg.svd(expected, full_matrices=False)
    frobenius = plain.U[:, :2] * plain.S[:2] @ plain.Vh[:2]

    def drift(D):
        return float(((D - expected) @ (G[0] + G[1]) @ (D - expected).t()).trace())

    assert drift(deltas(cut)["m"].double()) <= drift(frobenius) * (1 + 1e-6)


def small_problem(seed=0):
    """Two members of one module, and the moments of their inputs, not of one mean."""
    g = torch.Generator().manual_seed(seed)
    grams = [{"m": x.t() @ x / len(x)} for x in (torch.randn(40, 6, generator=g) + i
                                                 for i in range(2))]  # fmt: skip
    members = [
        AdapterWeights((Block({"m": torch.randn(5, 2, generator=g)}, 1.5,
                              tensors={"m": torch.randn(2, 6, generator=g)}),))
        for _ in range(2)
    ]  # fmt: skip
    return members, grams


def test_shrinkage_multiplies_what_lies_off_the_diagonal_of_every_members_moments():
    members, grams = small_problem()
    off = 0.9 + 0.1 * torch.eye(6)
    by_hand = [{"m": gram["m"] * off} for gram in grams]
    weights = [0.3, 0.7]
    for rank in (None, 2):
        usual = MergeOptions(grams=by_hand, max_rank=rank)
        expected = deltas(merge_regmean(members, weights, usual))["m"]
        options = replace(usual, grams=grams, shrink=0.9)
        merged = deltas(merge_regmean(members, weights, options))["m"]
        assert torch.allclose(merged, expected, rtol=1e-4, atol=1e-6)
        plain = deltas(merge_regmean(members, weights, replace(options, shrink=1.0)))["m"]
        assert not torch.allclose(merged, plain, rtol=1e-2)


def test_shrunk_to_the_diagonal_each_column_is_a_mean_by_how_loud_its_input_is():
    members, grams = small_problem()
    merged = merge_regmean(members, [0.3, 0.7], MergeOptions(grams=grams, shrink=0.0, eps=1e-12))
    loud = [w * gram["m"].diagonal() for w, gram in zip((0.3, 0.7), grams, strict=True)]
    wide = [deltas(m)["m"] for m in members]
    expected = (wide[0] * loud[0] + wide[1] * loud[1]) / (loud[0] + loud[1])
    assert torch.allclose(deltas(merged)["m"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [architectures.llama, architectures.gemma2, architectures.gpt2])
def test_layerwise_comes_nearer_to_every_member_than_regmean_and_concat(tmp_path, make):
    base = make_base(make, tmp_path)
    members = [adapter(base.model, seed) for seed in (1, 2)]
    # Tasks that differ in their tokens, as real ones do.
    rows = [rows_of(1, 12, 0, 20), rows_of(2, 12, 30, 50)]
    grams = [input_grams(base, m.updates(), r, 4) for m, r in zip(members, rows, strict=True)]
    halves = [0.5, 0.5]
    from lori_manager.merging.concat import merge_concat

    found = {
        "concat": merge_concat(members, halves),
        "regmean": merge_regmean(members, halves, MergeOptions(grams=grams)),
        "layerwise": merge_layerwise(base, members, halves, rows, KEEPING),
        "free": merge_layerwise(base, members, halves, rows, MergeOptions(eps=1e-3, answers=0.0)),
        "iteris": merge_iteris(base, members, halves, rows, MergeOptions(eps=1e-3)),
    }
    own = [logits(base, m, r) for m, r in zip(members, rows, strict=True)]
    far = {
        name: sum(distance(logits(base, w, r), o) for r, o in zip(rows, own, strict=True))
        for name, w in found.items()
    }
    assert far["layerwise"] < far["regmean"] < far["concat"]
    assert all(not m.training for m in base.model.modules())


def test_layerwise_keeps_every_B_and_mask_and_leaves_the_model_alone(tmp_path):
    base = make_base(architectures.llama, tmp_path)
    members = [adapter(base.model, seed, mask=0.4) for seed in (1, 2)]
    before = {n: p.clone() for n, p in base.model.named_parameters()}
    rows = [rows_of(1), rows_of(2)]
    merged = merge_layerwise(base, members, [0.5, 0.5], rows, KEEPING)
    for block, member in zip(merged.blocks, members, strict=True):
        old = member.blocks[0]
        assert all(torch.equal(block.B[n], old.B[n]) for n in old.B)
        assert block.mask is old.mask
    assert all(torch.equal(p, before[n]) for n, p in base.model.named_parameters())
    again = merge_layerwise(base, members, [0.5, 0.5], rows, KEEPING)
    assert all(torch.equal(a, b) for a, b in zip(deltas(merged).values(),
                                                deltas(again).values(), strict=True))  # fmt: skip


def test_one_member_comes_back_by_promise_and_by_the_mathematics(tmp_path):
    base = make_base(architectures.llama, tmp_path)
    one = adapter(base.model, 1)
    rows = rows_of(1, 40)
    assert merge_layerwise(base, [one], [1.0], [rows]) is one
    other = adapter(base.model, 2)
    assert merge_layerwise(base, [one, other], [1.0, 0.0], [rows, rows]) is one
    fitted = merge_layerwise(base, [one], [0.5], [rows], KEEPING)  # the weight scales nothing alone
    for name, delta in deltas(fitted).items():
        expected = deltas(one)[name]
        assert (delta - expected).norm() < 1e-3 * expected.norm(), name


def test_a_rank_is_kept_to_and_later_modules_make_good_for_it(tmp_path):
    base = make_base(architectures.llama, tmp_path)
    members = [adapter(base.model, seed) for seed in (1, 2)]
    rows = [rows_of(1, 12, 0, 20), rows_of(2, 12, 30, 50)]
    cut = merge_layerwise(base, members, [0.5, 0.5], rows, replace(KEEPING, max_rank=4))
    assert cut.rank == 4
    whole = merge_layerwise(base, members, [0.5, 0.5], rows, KEEPING)
    assert whole.rank == 6
    same = merge_layerwise(base, members, [0.5, 0.5], rows, replace(KEEPING, max_rank=6))
    assert len(same.blocks) == 2


@pytest.mark.parametrize("merge", [merge_layerwise, merge_iteris])
def test_weights_that_no_regression_takes_are_refused(tmp_path, merge):
    base = make_base(architectures.llama, tmp_path)
    members = [adapter(base.model, seed) for seed in (1, 2)]
    with pytest.raises(InvalidInput, match=r"`weights` of a regression.*--method concat"):
        merge(base, members, [-0.5, 1.0], [rows_of(1), rows_of(2)])


@pytest.mark.parametrize("shrink", [1.0, 0.6])
@pytest.mark.parametrize("make", [architectures.llama, architectures.gpt2])
def test_iteris_once_is_the_regression_on_each_members_own_inputs(tmp_path, make, shrink):
    """Which on all directions is what regmean finds in those of the members' B."""
    base = make_base(make, tmp_path)
    members = [adapter(base.model, seed) for seed in (1, 2)]
    rows, weights = [rows_of(1, 40), rows_of(2, 40)], [0.3, 0.7]
    once = merge_iteris(
        base, members, weights, rows, MergeOptions(eps=1e-2, shrink=shrink, iterations=1)
    )
    grams = [input_grams(base, m.updates(), r, 4) for m, r in zip(members, rows, strict=True)]
    expected = deltas(
        merge_regmean(members, weights, MergeOptions(eps=1e-2, shrink=shrink, grams=grams))
    )
    assert once.rank == 6
    for name, delta in deltas(once).items():
        assert (delta - expected[name]).norm() < 1e-3 * expected[name].norm(), name
    thrice = merge_iteris(base, members, weights, rows, MergeOptions(eps=1e-2, iterations=3))
    assert any(not torch.allclose(d, expected[n], rtol=0.1) for n, d in deltas(thrice).items())


@pytest.mark.parametrize("merge", [merge_layerwise, merge_iteris])
def test_general_text_is_moved_less_where_it_counts(tmp_path, merge):
    base = make_base(architectures.llama, tmp_path)
    members = [adapter(base.model, seed) for seed in (1, 2)]
    rows, text = [rows_of(1, 12, 0, 20), rows_of(2, 12, 20, 40)], rows_of(3, 12, 40, 60)
    with torch.no_grad():
        plain = [base.model(torch.as_tensor(np.asarray(r.ids))[None]).logits[0] for r in text]
    moved = []
    for general in (0.0, 1.0, 10.0):
        options = MergeOptions(eps=1e-3, general=general)
        merged = merge(base, members, [0.5, 0.5], rows, options, general=text)
        moved.append(distance(logits(base, merged, text), plain))
    assert moved[2] < moved[1] < 0.95 * moved[0]
    assert merge(base, members[:1], [1.0], rows[:1], general=text) is members[0]


def test_prompts_lose_their_completions():
    (row,) = prompts_of([Encoded([1, 2, 3, 4], 3)])
    assert list(row.ids) == [1, 2, 3]
    assert row.prompt_length == 3


def test_prompts_alone_can_be_packed_and_padded(tmp_path):
    base = make_base(architectures.llama, tmp_path)
    for packing in ("on", "off"):
        batch = Forward(base, packing=packing).batch(prompts_of(rows_of(1)))
        assert len(batch.targets) == 0
