"""knots, core, tsv, iso and iso-cts against dense implementations of their papers' formulas."""

import copy

import numpy as np
import pytest
import torch

from lori_manager.engine.projection import ProjectionSpec
from lori_manager.engine.update import LowRankUpdate
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.errors import InvalidInput
from lori_manager.merging.entries import shared_frame
from lori_manager.merging.iso import merge_iso, merge_iso_cts
from lori_manager.merging.knots import in_joint_frame, merge_knots
from lori_manager.merging.methods import MergeOptions, load_all
from lori_manager.merging.spectrum import isometry

NAMES = ["knots", "core", "tsv", "iso", "iso-cts"]
METHODS = {name: load_all().get(name) for name in NAMES}
SHAPES = {"q": (18, 14), "up": (25, 14), "down": (14, 25)}

pytestmark = pytest.mark.usefixtures("one_thread")


def stored(rank, seed, scaling=1.0, shapes=SHAPES, zero=False):
    """An adapter with an A of its own, its singular values spread over two decades."""
    g = torch.Generator().manual_seed(seed)
    A = {n: torch.randn(rank, s[1], generator=g) for n, s in shapes.items()}
    size = torch.logspace(0, -2, rank)
    B = {n: torch.randn(s[0], rank, generator=g) * size * (not zero) for n, s in shapes.items()}
    return AdapterWeights((Block(B, scaling, tensors=A),))


def dense(weights):
    """Module name -> the update as a float64 array."""
    return {
        n: u.scaling * (u.B.double() @ u.A.double()).numpy() for n, u in weights.updates().items()
    }


def apart(found, expected):
    """The largest relative difference of any module."""
    assert sorted(found) == sorted(expected)
    return max(
        np.linalg.norm(found[n] - expected[n]) / max(np.linalg.norm(expected[n]), 1e-12)
        for n in expected
    )


def merged(name, members, weights, **options):
    found = dense(METHODS[name](members, weights, MergeOptions(**options)))
    assert all(np.isfinite(d).all() for d in found.values())
    return found


# ---- the papers' formulas on dense matrices


def dense_ties(entries, weights, density):
    """Trim, elect, disjoint mean; entry by entry."""
    trimmed = []
    for x in entries:
        order = np.argsort(-np.abs(x).ravel(), kind="stable")
        kept = np.zeros(x.size)
        first = order[: max(1, round(density * x.size))]
        kept[first] = x.ravel()[first]
        trimmed.append(kept)
    out = np.zeros(entries[0].size)
    for i in range(out.size):
        values = [(w * x[i], abs(w)) for x, w in zip(trimmed, weights, strict=True)]
        sign = np.sign(sum(v for v, _ in values))
        agreeing = [(v, a) for v, a in values if v * sign > 0]
        if agreeing:
            out[i] = sum(v for v, _ in agreeing) / sum(a for _, a in agreeing)
    return sum(abs(w) for w in weights) * out.reshape(entries[0].shape)


def dense_knots(factors, weights, density):
    deltas = [s * B @ A for A, B, s in factors]
    U, S, V = np.linalg.svd(np.hstack(deltas), full_matrices=False)
    U, S, V = U[:, S > 1e-5], S[S > 1e-5], V[S > 1e-5]
    entries = [S[:, None] * part for part in np.split(V, len(deltas), axis=1)]
    return U @ dense_ties(entries, weights, density)


def dense_core(factors, weights, density):
    U = np.linalg.svd(np.hstack([s * B for _, B, s in factors]), full_matrices=False)[0]
    V = np.linalg.svd(np.vstack([A for A, _, _ in factors]), full_matrices=False)[2]
    cores = []
    for A, B, s in factors:
        left, b, inner = np.linalg.svd(s * B, full_matrices=False)
        other, a, right = np.linalg.svd(A, full_matrices=False)
        M = np.diag(b) @ inner @ other @ np.diag(a)
        cores.append((U.T @ left) @ M @ (right @ V.T))
    return U @ dense_ties(cores, weights, density) @ V


def dense_procrustes(M):
    left, _, right = np.linalg.svd(M, full_matrices=False)
    return left @ right


def dense_tsv(factors, weights, density):
    deltas = [s * B @ A for A, B, s in factors]
    k = min(deltas[0].shape) // len(deltas)
    U, S, V = [], [], []
    for delta, w in zip(deltas, weights, strict=True):
        u, s, v = np.linalg.svd(delta, full_matrices=False)
        kept = min(k, int((s > 1e-5 * s[0]).sum()))
        U.append(u[:, :kept])
        S.append(w * s[:kept])
        V.append(v[:kept])
    return dense_procrustes(np.hstack(U)) @ np.diag(np.hstack(S)) @ dense_procrustes(np.vstack(V))


def dense_iso(factors, weights, density):
    total = sum(w * s * B @ A for (A, B, s), w in zip(factors, weights, strict=True))
    U, S, V = np.linalg.svd(total, full_matrices=False)
    r = np.count_nonzero(S / S[0] > 1e-5)
    return S[:r].mean() * U[:, :r] @ V[:r]


def dense_iso_cts(factors, weights, density):
    deltas = [w * s * B @ A for (A, B, s), w in zip(factors, weights, strict=True)]
    U, S, V = np.linalg.svd(sum(deltas), full_matrices=False)
    r, T = np.count_nonzero(S / S[0] > 1e-5), len(deltas)
    k = int(r * 0.8)
    k = r - round((r - k) / T) * T
    per_task = (r - k) // T
    Us, Ss, Vs = [U[:, :k]], [S[:k]], [V[:k]]
    for delta in deltas:
        u, s, v = np.linalg.svd(delta - U[:, :k] @ U[:, :k].T @ delta, full_matrices=False)
        Us.append(u[:, :per_task])
        Ss.append(s[:per_task])
        Vs.append(v[:per_task])
    sigma = np.hstack(Ss).mean()
    return sigma * dense_procrustes(np.hstack(Us)) @ dense_procrustes(np.vstack(Vs))


DENSE = {
    "knots": dense_knots,
    "core": dense_core,
    "tsv": dense_tsv,
    "iso": dense_iso,
    "iso-cts": dense_iso_cts,
}


def literal(name, members, weights, density=0.5):
    out = {}
    for module in members[0].modules:
        updates = [m.updates()[module] for m in members]
        factors = [(u.A.double().numpy(), u.B.double().numpy(), u.scaling) for u in updates]
        out[module] = DENSE[name](factors, weights, density)
    return out


@pytest.mark.parametrize("weights", [[1 / 3] * 3, [1.0] * 3, [0.5, 0.2, 0.7], [1.0, -0.5, 0.3]])
@pytest.mark.parametrize("ranks", [(3, 3, 3), (4, 2, 3), (14, 14, 14), (20, 5, 16)])
@pytest.mark.parametrize("name", NAMES)
def test_each_method_is_its_papers_formula_on_dense_matrices(name, ranks, weights):
    if name == "core" and max(ranks) > min(SHAPES["q"]):
        pytest.skip("the formula itself wants r of at most both sizes")
    members = [stored(r, i, 0.5 + i) for i, r in enumerate(ranks)]
    assert apart(merged(name, members, weights), literal(name, members, weights)) < 1e-5


@pytest.mark.parametrize("density", [0.05, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("name", ["knots", "core"])
def test_density_is_the_share_of_each_members_entries_that_stays(name, density):
    members, weights = [stored(4, i) for i in range(3)], [0.4, 0.4, 0.2]
    expected = literal(name, members, weights, density)
    assert apart(merged(name, members, weights, density=density), expected) < 1e-5


@pytest.mark.parametrize("density", [0.0, -0.5, 1.5])
@pytest.mark.parametrize("name", ["knots", "core"])
def test_a_density_outside_0_to_1_is_refused(name, density):
    with pytest.raises(InvalidInput, match="`density` must be in"):
        METHODS[name]([stored(2, 0)], [1.0], MergeOptions(density=density))


def test_iso_has_one_singular_value_and_the_papers_mean_where_the_sum_has_full_rank():
    members, weights = [stored(14, i) for i in range(2)], [1.0, 1.0]
    found = merged("iso", members, weights)
    parts = [dense(m) for m in members]
    for module, delta in found.items():
        values = np.linalg.svd(sum(p[module] for p in parts), compute_uv=False)
        assert np.allclose(np.linalg.svd(delta, compute_uv=False), values.mean(), rtol=1e-5)


def test_iso_keeps_the_rank_of_the_sum_and_no_direction_that_no_task_has():
    members = [stored(3, i) for i in range(2)]
    update = merge_iso(members, [0.5, 0.5]).updates()["up"]
    assert update.rank == 6
    A = np.vstack([m.updates()["up"].A.double().numpy() for m in members])
    inside = np.linalg.pinv(A) @ A
    delta = update.delta().double().numpy()
    assert np.linalg.norm(delta - delta @ inside) < 1e-5 * np.linalg.norm(delta)


def test_iso_takes_the_mean_over_the_rank_alone_where_members_share_directions():
    one = stored(4, 1)
    assert apart(merged("iso", [one, one], [0.5, 0.7]), merged("iso", [one], [1.2])) < 1e-5


def test_iso_cts_gives_tasks_a_part_of_their_own_and_is_iso_where_none_is_left():
    two = [stored(5, i) for i in range(2)]
    assert apart(merged("iso-cts", two, [1.0, 1.0]), merged("iso", two, [1.0, 1.0])) > 0.01
    many = [stored(1, i) for i in range(5)]
    assert apart(merged("iso-cts", many, [1.0] * 5), merged("iso", many, [1.0] * 5)) < 1e-5
    assert merge_iso_cts(two, [1.0, 1.0]).rank == 10


def test_tsv_joins_tasks_whose_directions_are_orthogonal_without_loss():
    eye = torch.eye(14)
    members = []
    for i in range(3):
        B = torch.zeros(18, 2)
        B[2 * i, 0], B[2 * i + 1, 1] = 3.0, 2.0
        members.append(
            AdapterWeights((Block({"q": B}, 0.5, tensors={"q": eye[2 * i : 2 * i + 2]}),))
        )
    parts = [dense(m)["q"] for m in members]
    expected = {"q": 0.5 * parts[0] + 0.25 * parts[1] - parts[2]}
    assert apart(merged("tsv", members, [0.5, 0.25, -1.0]), expected) < 1e-6


def test_tsv_keeps_one_triple_of_each_of_more_tasks_than_there_are_dimensions():
    members = [stored(2, i) for i in range(20)]
    found = merged("tsv", members, [1.0] * 20)
    assert all(np.linalg.matrix_rank(delta, tol=1e-4) >= 10 for delta in found.values())


def test_tsv_counts_what_equal_members_share_once():
    one = stored(4, 1)
    assert apart(merged("tsv", [one, one, one], [1.0] * 3), dense(one)) < 1e-5


# ---- frames


def test_knots_with_the_weighted_sum_for_its_rule_is_the_weighted_sum():
    members, weights = [stored(r, r, 0.5 * r) for r in (2, 5, 9)], [0.3, 0.8, -0.5]
    for module in SHAPES:
        updates = [m.updates()[module] for m in members]
        found = in_joint_frame(
            updates, weights, lambda parts, w: sum(x * s for x, s in zip(parts, w, strict=True))
        )
        deltas = [dense(m)[module] for m in members]
        expected = {module: sum(w * d for w, d in zip(weights, deltas, strict=True))}
        assert apart({module: found.delta().double().numpy()}, expected) < 1e-6


@pytest.mark.parametrize("ranks", [(3, 3), (2, 7, 4), (16, 30)])
def test_the_core_spaces_projection_loses_nothing(ranks):
    members = [stored(r, i, 0.5 + i) for i, r in enumerate(ranks)]
    for module, shape in SHAPES.items():
        form = shared_frame([m.updates()[module] for m in members])
        assert form.cores.shape[1:] == tuple(min(sum(ranks), d) for d in shape)
        for member, core in zip(members, form.cores, strict=True):
            back = {module: (form.U @ core @ form.V).numpy()}
            assert apart(back, {module: dense(member)[module]}) < 1e-12


@pytest.mark.parametrize("name", ["knots", "core"])
def test_at_density_1_members_that_agree_everywhere_give_the_weighted_sum(name):
    one = stored(4, 1)
    twice = AdapterWeights((Block(one.blocks[0].B, 2.0, tensors=one.blocks[0].tensors),))
    found = merged(name, [one, twice], [0.25, 0.5], density=1.0)
    assert apart(found, {n: 1.25 * d for n, d in dense(one).items()}) < 1e-5


def test_an_isometry_of_a_matrix_that_lacks_rank_adds_no_directions():
    one = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = isometry(torch.cat([one, one], 1))
    assert torch.allclose(found[:, :2], found[:, 2:])
    values = torch.linalg.svdvals(found)
    assert torch.allclose(values, torch.tensor([1.0, 1, 0, 0], dtype=torch.float64), atol=1e-9)
    assert not isometry(torch.zeros(3, 2)).any()
    assert isometry(torch.zeros(3, 0)).shape == (3, 0)


# ---- edges


@pytest.mark.parametrize("name", NAMES)
def test_members_may_update_different_modules(name):
    a, b = stored(3, 0, shapes={"q": SHAPES["q"]}), stored(2, 1)
    found = merged(name, [a, b], [0.5, 0.5])
    assert sorted(found) == sorted(SHAPES)
    for module in ("up", "down"):
        alone = stored(2, 1)
        kept = AdapterWeights(
            (Block({module: alone.blocks[0].B[module]}, 1.0,
                   tensors={module: alone.blocks[0].A[module]}),)
        )  # fmt: skip
        # The disjoint mean leaves members out that have nothing; a sum does not.
        share = 1.0 if name in ("knots", "core") else 0.5
        assert apart({module: found[module]}, merged(name, [kept], [share])) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_member_of_weight_0_changes_nothing(name):
    a, b, c = (stored(3, i) for i in range(3))
    found = merged(name, [a, b, c], [0.5, 0.0, 0.7])
    assert apart(found, merged(name, [a, c], [0.5, 0.7])) < 1e-6
    for delta in merged(name, [a, b], [0.0, 0.0]).values():
        assert not delta.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_member_of_zeros_and_members_that_cancel_give_no_nan(name):
    one, zero = stored(3, 0), stored(3, 1, zero=True)
    for members in ([one, zero], [zero, one]):
        found = merged(name, members, [1.0, 1.0])
        assert all(d.any() for d in found.values())
    for delta in merged(name, [one, one], [0.5, -0.5]).values():
        assert np.abs(delta).max() < (1e-30 if name.startswith("iso") else 1e-5)
    for delta in merged(name, [zero], [1.0]).values():
        assert not delta.any()


@pytest.mark.parametrize("weights", [[1.0], [-1.0], [0.3]])
@pytest.mark.parametrize("name", NAMES)
def test_one_member_and_the_sign_of_its_weight(name, weights):
    one = stored(4, 0, 0.5)
    found = merged(name, [one], weights)
    assert apart(found, literal(name, [one], weights)) < 1e-5
    if name == "tsv":
        assert apart(found, {n: weights[0] * d for n, d in dense(one).items()}) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_ranks_above_both_sizes_and_equal_members_in_any_order(name):
    members = [stored(40, 0), stored(40, 0), stored(31, 1)]
    found = merged(name, members, [0.2, 0.3, 0.5])
    assert apart(merged(name, members[::-1], [0.5, 0.3, 0.2]), found) < 1e-4


# Not knots: it looks at entries along the inputs, and what it trims there leaves the rows.
@pytest.mark.parametrize("name", ["core", "tsv", "iso", "iso-cts"])
def test_members_that_share_one_A_stay_in_its_rows(name):
    spec = ProjectionSpec(3, "", 4, {n: s[1] for n, s in SHAPES.items()})
    g = torch.Generator().manual_seed(0)
    members = [
        AdapterWeights((Block({n: torch.randn(s[0], 4, generator=g) for n, s in SHAPES.items()},
                              2.0, spec),))
        for _ in range(3)
    ]  # fmt: skip
    for module, delta in merged(name, members, [1 / 3] * 3).items():
        A = spec.matrices[module].double().numpy()
        assert np.linalg.norm(delta - delta @ np.linalg.pinv(A) @ A) < 1e-5 * np.linalg.norm(delta)


@pytest.mark.parametrize("name", NAMES)
def test_max_rank_cuts_to_the_best_update_of_that_rank(name):
    members = [stored(3, i) for i in range(3)]
    found = METHODS[name](members, [0.5, 0.4, 0.3], MergeOptions(max_rank=2))
    assert found.rank == 2
    whole = merged(name, members, [0.5, 0.4, 0.3])
    for module, delta in dense(found).items():
        values = np.linalg.svd(whole[module], compute_uv=False)
        error = np.linalg.norm(delta - whole[module])
        assert error == pytest.approx(np.linalg.norm(values[2:]), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_no_method_makes_the_dense_matrix(name):
    # 2 * 10^5 x 10^5 in float32 would be 80 GB.
    shapes = {"q": (200_000, 100_000)}
    members = [stored(2, i, shapes=shapes) for i in range(2)]
    before = copy.deepcopy(members[0].blocks[0].B["q"])
    found = METHODS[name](members, [0.5, 0.5])
    assert found.rank <= 4
    assert torch.equal(members[0].blocks[0].B["q"], before)


def test_results_are_float32_and_carry_no_scaling():
    for name in NAMES:
        found = METHODS[name]([stored(2, i, 3.0) for i in range(2)], [0.5, 0.5])
        for update in found.updates().values():
            assert isinstance(update, LowRankUpdate)
            assert update.A.dtype == update.B.dtype == torch.float32
            assert update.scaling == 1.0


def test_knots_trims_each_module_by_itself():
    members, weights = [stored(4, i) for i in range(2)], [0.5, 0.5]
    whole = dense(merge_knots(members, weights))
    for module, shape in SHAPES.items():
        alone = [stored(4, i) for i in range(2)]
        alone = [
            AdapterWeights((Block({module: m.blocks[0].B[module]}, 1.0,
                                  tensors={module: m.blocks[0].A[module]}),))
            for m in alone
        ]  # fmt: skip
        found = dense(merge_knots(alone, weights))[module]
        assert found.shape == shape
        assert np.array_equal(found, whole[module])
