"""magnitude, ties, dare, della: against literal dense definitions and PEFT's functions."""

import logging
import math

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from lori_manager.engine.update import LowRankUpdate
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.merging import entries
from lori_manager.merging.dare import keep_at_random, merge_dare
from lori_manager.merging.della import keep_by_rank, merge_della
from lori_manager.merging.entries import Matrix, best_factors, dense_blocks, shared_frame
from lori_manager.merging.magnitude import merge_magnitude
from lori_manager.merging.methods import SPACES, MergeOptions
from lori_manager.merging.ties import merge_ties

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"layers.0.q": (10, 8), "layers.1.up": (12, 8)}
WEIGHTS = [0.5, 0.25, -1.0]
METHODS = {
    "magnitude": merge_magnitude,
    "ties": merge_ties,
    "dare": merge_dare,
    "della": merge_della,
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def member(seed, rank=4, scaling=2.0, modules=SHAPES, zero=False):
    g = torch.Generator().manual_seed(seed)
    A = {n: torch.randn(rank, SHAPES[n][1], generator=g) for n in modules}
    B = {n: torch.randn(SHAPES[n][0], rank, generator=g) * (not zero) for n in modules}
    return AdapterWeights((Block(B, scaling, tensors=A),))


def full(density=0.3, seed=0, max_rank=None):
    return MergeOptions(space="full", density=density, seed=seed, max_rank=max_rank)


def dense(weights):
    """Module name -> the dense update, float64 numpy, made without the engine's delta."""
    return {
        n: u.scaling * u.B.double().numpy() @ u.A.double().numpy()
        for n, u in weights.updates().items()
    }


def assert_close(found, expected, rtol=1e-5):
    assert sorted(found) == sorted(expected)
    for name in found:
        error = np.linalg.norm(found[name] - expected[name])
        assert error <= rtol * max(np.linalg.norm(expected[name]), 1e-3)


# ---- literal definitions, in numpy, entry by entry where the paper has it so


def literal_trim(x, density):
    order = np.argsort(-np.abs(x).ravel(), kind="stable")
    out = np.zeros(x.size)
    kept = order[: round(density * x.size)]
    out[kept] = x.ravel()[kept]
    return out.reshape(x.shape)


def literal_elect(parts, weights):
    out = np.zeros(parts[0].shape)
    for at in np.ndindex(out.shape):
        values = [w * x[at] for x, w in zip(parts, weights, strict=True)]
        sign = math.copysign(1, sum(values)) if sum(values) else 0
        agreeing = [i for i, v in enumerate(values) if v * sign > 0]
        if agreeing:
            share = sum(values[i] for i in agreeing) / sum(abs(weights[i]) for i in agreeing)
            out[at] = share * sum(map(abs, weights))
    return out


def literal_sum(parts, weights):
    return sum(w * x for x, w in zip(parts, weights, strict=True))


def literal_frame(members, name):
    """U, V and the cores of the paper: singular vectors of stacked B and A, by numpy."""
    updates = [m.updates()[name] for m in members]
    B = np.concatenate([u.scaling * u.B.double().numpy() for u in updates], 1)
    A = np.concatenate([u.A.double().numpy() for u in updates], 0)
    U, s, _ = np.linalg.svd(B, full_matrices=False)
    _, t, V = np.linalg.svd(A, full_matrices=False)
    U, V = U[:, s > 1e-9 * s[0]], V[t > 1e-9 * t[0]]
    return U, V, [U.T @ dense(m)[name] @ V.T for m in members]


FUSE = {merge_magnitude: literal_sum, merge_ties: literal_elect}


@pytest.mark.parametrize("merge", FUSE)
@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("weights", [[1 / 3] * 3, WEIGHTS, [2.0, 0.0, 1.0]])
def test_trimming_methods_are_their_dense_definition_in_full_space(merge, density, weights):
    members = [member(i, 3 + i, 1.0 + i) for i in range(3)]
    parts = [dense(m) for m in members]
    expected = {
        n: FUSE[merge]([literal_trim(p[n], density) for p in parts], weights) for n in SHAPES
    }
    assert_close(dense(merge(members, weights, full(density))), expected)


@pytest.mark.parametrize("merge", FUSE)
@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
def test_trimming_methods_are_their_definition_on_the_paper_s_core_matrices(merge, density):
    members = [member(i, 2, 1.0 + i) for i in range(3)]
    expected = {}
    for name in SHAPES:
        U, V, cores = literal_frame(members, name)
        trimmed = [literal_trim(core, density) for core in cores]
        expected[name] = U @ FUSE[merge](trimmed, WEIGHTS) @ V
    merged = merge(members, WEIGHTS, MergeOptions(density=density))
    assert_close(dense(merged), expected)
    assert merged.rank <= 6


def test_magnitude_on_dense_updates_is_what_peft_makes_of_them():
    members = [member(i) for i in range(3)]
    merged = merge_magnitude(members, WEIGHTS, full(0.25))
    for name in SHAPES:
        parts = [torch.from_numpy(dense(m)[name]) for m in members]
        theirs = merge_utils.magnitude_prune(parts, torch.tensor(WEIGHTS), 0.25)
        assert_close({name: dense(merged)[name]}, {name: theirs.numpy()})


def test_ties_at_equal_weights_on_dense_updates_is_peft_s_times_the_number_of_members():
    members = [member(i) for i in range(3)]
    merged = merge_ties(members, [0.2] * 3, full(0.25))
    for name in SHAPES:
        parts = [torch.from_numpy(dense(m)[name]) for m in members]
        theirs = merge_utils.ties(parts, torch.tensor([0.2] * 3), 0.25)
        assert_close({name: dense(merged)[name]}, {name: 3 * theirs.numpy()})


def one_entry(value):
    one = {"m": torch.tensor([[value]])}
    return AdapterWeights((Block(one, 1.0, tensors={"m": torch.ones(1, 1)}),))


@pytest.mark.parametrize("space", SPACES)
def test_ties_elects_the_sign_of_the_weighted_values(space):
    """By hand: 0.3 * 3 against 1 * -2 is negative; (0.3 + 1) * (1 * -2) / 1 = -2.6."""
    options = MergeOptions(space=space, density=1.0)
    merged = merge_ties([one_entry(3.0), one_entry(-2.0)], [0.3, 1.0], options)
    assert dense(merged)["m"] == pytest.approx(-2.6)


@pytest.mark.parametrize("space", SPACES)
def test_ties_of_members_that_cancel_is_zero_in_either_order(space):
    options = MergeOptions(space=space, density=1.0)
    for pair in ([3.0, -3.0], [-3.0, 3.0]):
        merged = merge_ties([one_entry(v) for v in pair], [0.1, 0.1], options)
        assert dense(merged)["m"] == 0


@pytest.mark.parametrize("space", SPACES)
def test_ties_of_members_that_all_agree_is_the_weighted_sum(space):
    members = [member(0, scaling=s) for s in (1.0, 2.0, 0.5)]
    options = MergeOptions(space=space, density=1.0)
    merged = merge_ties(members, [0.5, 0.25, 2.0], options)
    expected = {
        n: sum(w * dense(m)[n] for m, w in zip(members, [0.5, 0.25, 2.0], strict=True))
        for n in SHAPES
    }
    # Each entry is the mean of the agreeing values times the sum of the weights.
    assert_close(dense(merged), expected)


@pytest.mark.parametrize("kind", ["magnitude_prune", "ties", "dare_linear"])
def test_peft_s_methods_on_a_and_b_apart_are_not_the_dense_definition(kind):
    """PEFT merges factors; ours equals its own function on the dense updates (tests here)."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 10, bias=False))
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(model, config, adapter_name="a")
    model.add_adapter("b", config)
    layer = model.base_model.model[0]
    members = []
    for name in "ab":
        A = {"m": layer.lora_A[name].weight.detach().clone()}
        B = {"m": layer.lora_B[name].weight.detach().clone()}
        members.append(AdapterWeights((Block(B, 2.0, tensors=A),)))
    torch.manual_seed(1)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c", combination_type=kind, density=0.5)
    theirs = layer.get_delta_weight("c").detach().double().numpy()
    merge = {"magnitude_prune": merge_magnitude, "ties": merge_ties, "dare_linear": merge_dare}
    ours = dense(merge[kind](members, [0.5, 0.5], full(0.5, max_rank=8)))["m"]
    assert np.linalg.norm(ours - theirs) > 0.3 * np.linalg.norm(ours)


# ---- methods that draw


def kept_by_dare(one, options):
    """The mask of a member's own draws, read off a merge of it alone."""
    alone = dense(merge_dare([one], [1.0], options))
    return {n: np.abs(alone[n]) > 1e-4 for n in alone}


def test_dare_is_peft_s_function_on_dense_updates_given_the_same_draws(monkeypatch):
    members = [member(i) for i in range(3)]
    options = full(0.4, seed=3, max_rank=8)
    merged = dense(merge_dare(members, WEIGHTS, options))
    masks = [kept_by_dare(m, options) for m in members]
    for name in SHAPES:
        drawn = iter([torch.from_numpy(mask[name]).double() for mask in masks])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "bernoulli", lambda _, drawn=drawn: next(drawn))
            parts = [torch.from_numpy(dense(m)[name]) for m in members]
            theirs = merge_utils.dare_linear(parts, torch.tensor(WEIGHTS), 0.4)
        assert_close({name: merged[name]}, {name: theirs.numpy()})


def test_dare_keeps_its_share_and_rescales_what_it_keeps():
    one = member(0)
    total = kept = 0
    for seed in range(30):
        found = dense(merge_dare([one], [1.0], full(0.3, seed, 8)))
        for name, x in dense(one).items():
            mask = np.abs(found[name]) > 1e-4
            assert np.allclose(found[name], np.where(mask, x / 0.3, 0.0), atol=1e-4)
            total, kept = total + mask.size, kept + mask.sum()
    assert abs(kept / total - 0.3) < 4 * math.sqrt(0.21 / total)


@pytest.mark.parametrize("space", SPACES)
def test_the_expectation_of_dare_over_seeds_is_the_weighted_sum(space):
    members, seeds = [member(i) for i in range(2)], 1500
    total = dict.fromkeys(SHAPES, 0.0)
    for seed in range(seeds):
        options = MergeOptions(space=space, density=0.5, seed=seed, max_rank=8)
        for name, x in dense(merge_dare(members, [0.7, -0.4], options)).items():
            total[name] = total[name] + x
    for name in SHAPES:
        exact = 0.7 * dense(members[0])[name] - 0.4 * dense(members[1])[name]
        # At density 1/2 the squared deviation of one draw is sum (w x)^2.
        spread = math.sqrt(
            sum(
                (w * np.linalg.norm(dense(m)[name])) ** 2
                for m, w in zip(members, [0.7, -0.4], strict=True)
            )
            / seeds
        )
        assert np.linalg.norm(total[name] / seeds - exact) < 3 * spread
        assert spread < 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize("merge", [merge_dare, merge_della])
def test_draws_are_of_the_seed_the_module_and_the_member_alone(merge):
    a, b, other = member(0), member(1), member(2)
    both = dense(merge_dare([a, b], [1.0, 1.0], full(0.5, 0, 8)))
    alone = [dense(merge_dare([m], [1.0], full(0.5, 0, 8))) for m in (a, b)]
    assert_close(both, {n: alone[0][n] + alone[1][n] for n in SHAPES})
    assert_close(
        dense(merge([a, other], [1.0, 0.5], full())), dense(merge([other, a], [0.5, 1.0], full()))
    )
    different = dense(merge([a], [1.0], full(seed=1)))
    assert any(
        np.abs(different[n] - dense(merge([a], [1.0], full()))[n]).max() > 0.1 for n in SHAPES
    )
    same = AdapterWeights(
        (
            Block(
                dict.fromkeys("xy", a.blocks[0].B["layers.0.q"]),
                2.0,
                tensors=dict.fromkeys("xy", a.blocks[0].A["layers.0.q"]),
            ),
        )
    )
    found = dense(merge([same], [1.0], full()))
    assert np.abs(found["x"] - found["y"]).max() > 0.1


@pytest.mark.parametrize("merge", [merge_dare, merge_della])
def test_another_order_gives_the_same_draws_in_the_core(merge):
    members = [member(i, 2) for i in range(3)]
    options = MergeOptions(density=0.4, seed=5)
    assert_close(
        dense(merge(members, WEIGHTS, options)), dense(merge(members[::-1], WEIGHTS[::-1], options))
    )


def matrix(x, key=0, rows=3):
    return Matrix(tuple(x.shape), lambda: iter(x.split(rows)), lambda: key)


def test_magprune_keeps_by_rank_within_the_row_and_rescales_by_its_probability():
    from scipy.stats import rankdata

    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ranks = rankdata(x.abs().numpy(), axis=1)  # 1: the smallest of its row
    chance = 0.4 - 0.15 + (ranks - 1) / 8 * 0.3
    seeds, hits, total = 2000, np.zeros((6, 9)), np.zeros((6, 9))
    for key in range(seeds):
        found = torch.cat(list(keep_by_rank(matrix(x, key), 0.4)())).numpy()
        mask = found != 0
        assert np.allclose(found[mask], (x.numpy() / chance)[mask], rtol=1e-6)
        hits, total = hits + mask, total + found
    assert np.abs(hits / seeds - chance).max() < 4.5 * math.sqrt(0.25 / seeds)
    assert np.linalg.norm(total / seeds - x.numpy()) < 0.1 * np.linalg.norm(x.numpy())


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.1, 0.05), (0.9, 0.05)])
def test_magprune_s_window_stays_inside_0_and_1(density, epsilon):
    x = torch.ones(400, 50) + torch.arange(50) / 100  # the smallest first in every row
    found = torch.cat(list(keep_by_rank(matrix(x), density)()))
    largest = found[:, -1][found[:, -1] != 0]
    assert torch.allclose(largest, x[0, -1] / (density + epsilon))
    smallest = found[:, 0][found[:, 0] != 0]
    assert torch.allclose(smallest, x[0, 0] / (density - epsilon))


def test_della_elects_and_averages_what_magprune_left():
    members, weights, options = [member(i) for i in range(3)], WEIGHTS, full(0.5, 2, 8)
    # A lone member at weight 1 comes out as MAGPRUNE left it.
    pruned = [dense(merge_della([m], [1.0], options)) for m in members]
    pruned = [{n: np.where(np.abs(x) > 1e-4, x, 0.0) for n, x in p.items()} for p in pruned]
    expected = {n: literal_elect([p[n] for p in pruned], weights) for n in SHAPES}
    assert_close(dense(merge_della(members, weights, options)), expected)


# ---- all four


@pytest.mark.parametrize("space", SPACES)
def test_a_module_that_a_member_lacks_counts_as_a_zero_update(method, space):
    first, second = member(0), member(1, modules=["layers.0.q"])
    B = {n: second.blocks[0].B.get(n, torch.zeros(SHAPES[n][0], 4)) for n in SHAPES}
    A = {n: second.blocks[0].A.get(n, torch.zeros(4, SHAPES[n][1])) for n in SHAPES}
    filled = AdapterWeights((Block(B, 2.0, tensors=A),))
    options = MergeOptions(space=space, max_rank=8)
    merged = method([first, second], [0.5, 0.5], options)
    assert merged.modules == sorted(SHAPES)
    assert_close(dense(merged), dense(method([first, filled], [0.5, 0.5], options)))


@pytest.mark.parametrize("space", SPACES)
def test_a_member_of_weight_zero_is_as_if_left_out(method, space):
    members = [member(i) for i in range(3)]
    options = MergeOptions(space=space)
    merged = method(members, [0.5, 0.0, 1.0], options)
    assert_close(dense(merged), dense(method(members[::2], [0.5, 1.0], options)))
    nothing = method(members, [0.0] * 3, options)
    assert nothing.modules == sorted(SHAPES)
    assert not any(x.any() for x in dense(nothing).values())


@pytest.mark.parametrize("space", SPACES)
def test_weights_of_the_other_sign_give_the_negative(method, space):
    members, options = [member(i) for i in range(3)], MergeOptions(space=space)
    merged = dense(method(members, WEIGHTS, options))
    other = dense(method(members, [-w for w in WEIGHTS], options))
    assert_close(other, {n: -x for n, x in merged.items()})


@pytest.mark.parametrize("space", SPACES)
def test_density_one_and_one_member_give_that_member(method, space):
    options = MergeOptions(space=space, density=1.0)
    one = member(0)
    assert_close(dense(method([one], [0.7], options)), {n: 0.7 * x for n, x in dense(one).items()})


@pytest.mark.parametrize("space", SPACES)
def test_equal_members_are_one_of_the_summed_weight(method, space):
    one, options = member(0), MergeOptions(space=space, density=0.4, max_rank=8)
    twice = dense(method([one, one], [0.3, 0.9], options))
    if space == "full":
        assert_close(twice, dense(method([one], [1.2], options)))
    assert all(np.isfinite(x).all() for x in twice.values())


@pytest.mark.parametrize("space", SPACES)
def test_zero_updates_beside_others_and_alone_give_no_nan(method, space):
    options = MergeOptions(space=space)
    zero, one = member(5, zero=True), member(0)
    alone = dense(method([zero, zero], [0.5, 0.5], options))
    assert not any(x.any() for x in alone.values())
    assert all(np.isfinite(x).all() for x in dense(method([zero, one], [1, 1], options)).values())


@pytest.mark.parametrize("space", SPACES)
def test_max_rank_is_the_best_of_that_rank(method, space):
    members = [member(i, 4) for i in range(3)]
    options = [MergeOptions(space=space, density=0.5, max_rank=r) for r in (8, 3)]
    exact, cut = (method(members, WEIGHTS, o) for o in options)
    assert cut.rank == 3
    for name, x in dense(exact).items():
        lost = np.linalg.norm(dense(cut)[name] - x)
        best = np.linalg.norm(np.linalg.svd(x, compute_uv=False)[3:])
        assert best * (1 - 1e-5) <= lost <= best * 1.01


# ---- row blocks and factors


def test_the_size_of_the_blocks_does_not_matter(method, monkeypatch):
    members = [member(i) for i in range(3)]
    whole = dense(method(members, WEIGHTS, full(0.3)))
    monkeypatch.setattr(entries, "BLOCK_BYTES", 3 * 8 * entries.entry_bytes(3))
    assert entries.rows_at_once((10, 8), 3) == 3
    assert_close(dense(method(members, WEIGHTS, full(0.3))), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.001, 0.25, 0.5, 0.999])
def test_trimming_keeps_the_exact_count_when_magnitudes_tie(dtype, density):
    x = torch.tensor([1.0, -1.0, 2.0, 0.0], dtype=dtype).repeat(25, 5)  # (25, 20)
    found = torch.cat(list(entries.keep_largest(matrix(x), density)()))
    expected = literal_trim(x.numpy(), max(density, 1 / x.numel()))
    assert np.array_equal(found.numpy(), expected)


def test_blocks_of_8b_shapes_stay_within_the_bound():
    for shape in [(14336, 4096), (4096, 14336), (4096, 4096), (128256, 4096)]:
        for members in (2, 3, 8, 20):
            rows = entries.rows_at_once(shape, members)
            assert rows * shape[1] * entries.entry_bytes(members) <= 256 * 2**20
            assert rows >= 8


def test_no_block_of_a_merge_is_larger_than_the_bound(method, monkeypatch):
    seen = []

    def watched(update, rows):
        def blocks():
            for block in dense_blocks(update, rows)():
                seen.append(block.numel() * entries.entry_bytes(2))
                yield block

        return blocks

    monkeypatch.setattr(entries, "dense_blocks", watched)
    monkeypatch.setattr(entries, "BLOCK_BYTES", 4000)
    method([member(0), member(1)], [0.5, 0.5], full(max_rank=2))
    assert seen
    assert max(seen) <= 4000


def test_full_space_keeps_the_sum_of_the_ranks_nearly_as_well_as_can_be(caplog):
    g = torch.Generator().manual_seed(0)
    shape = (120, 90)
    members = [
        AdapterWeights(
            (
                Block(
                    {"m": torch.randn(shape[0], 3, generator=g)},
                    1.0,
                    tensors={"m": torch.randn(3, shape[1], generator=g)},
                ),
            )
        )
        for _ in range(2)
    ]
    with caplog.at_level(logging.INFO, logger="lori_manager.merging.entries"):
        merged = merge_ties(members, [0.5, 0.5], full(0.3))
    assert merged.rank == 6
    exact = literal_elect([literal_trim(dense(m)["m"], 0.3) for m in members], [0.5, 0.5])
    lost = np.linalg.norm(dense(merged)["m"] - exact)
    best = np.linalg.norm(np.linalg.svd(exact, compute_uv=False)[6:])
    assert best <= lost < 1.01 * best
    (record,) = caplog.records
    relative = lost / np.linalg.norm(exact)
    assert f"rank 6, relative error {relative:.2g}" in record.getMessage()


def test_the_core_says_nothing_because_nothing_is_lost(caplog):
    with caplog.at_level(logging.INFO, "lori_manager"):
        merge_ties([member(0), member(1)], [0.5, 0.5])
    assert not caplog.records


def test_factors_of_a_matrix_of_that_rank_are_exact():
    update = member(0, 3).updates()["layers.1.up"]
    found, lost, total = best_factors(dense_blocks(update, 5), (12, 8), 3, update.B.device)
    assert torch.allclose(found.delta(), update.delta(), atol=1e-5)
    assert lost < 1e-5 * total


def test_members_that_share_one_a_have_no_axes_but_its_own():
    g = torch.Generator().manual_seed(0)
    A = torch.randn(4, 30, generator=g)
    updates = [LowRankUpdate(A, torch.randn(20, 4, generator=g), 0.5) for _ in range(3)]
    frame = shared_frame(updates)
    assert frame.cores.shape == (3, 12, 4)
    for update, core in zip(updates, frame.cores, strict=True):
        assert torch.allclose(frame.update(core).delta().float(), update.delta(), atol=1e-6)


def test_draws_on_blocks_are_those_on_the_whole():
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    for keep in (keep_at_random, keep_by_rank):
        a, b = (torch.cat(list(keep(matrix(x, 9, rows), 0.5)())) for rows in (1, 7))
        assert torch.equal(a, b)
