"""Masks: exact counts, ties by position, groups, and entries that are barred."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lori_manager.engine.mask import (
    SCOPES,
    calibrate_mask,
    capacity,
    count,
    group_modules,
    overlap,
    size,
    support,
    union,
)

NAMES = ["model.layers.0.q", "model.layers.0.up", "model.layers.1.q", "model.layers.1.up"]


def random_B(seed=0, dtype=torch.float32, shape=(6, 5)):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=g).to(dtype) for n in NAMES}


def test_the_largest_magnitudes_of_all_modules_are_kept_as_worked_out_by_hand():
    B = {
        "b": torch.tensor([[3.0, -5.0], [0.0, 1.0]]),
        "a": torch.tensor([[-4.0, 0.5]]),
    }
    mask = calibrate_mask(B, 0.5)
    assert mask["b"].tolist() == [[True, True], [False, False]]
    assert mask["a"].tolist() == [[True, False]]


def test_ties_go_to_earlier_modules_by_name_and_earlier_positions():
    B = {"b": torch.full((2, 2), -2.0), "a": torch.full((1, 2), 2.0), "c": torch.full((1, 2), 7.0)}
    mask = calibrate_mask(B, 0.375)
    assert mask["c"].tolist() == [[True, True]]
    assert mask["a"].tolist() == [[True, True]]
    assert mask["b"].tolist() == [[True, False], [False, False]]


def float32(bits):
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


# Finite float32 as bits: anything; few distinct ones, for ties and for neighbours that differ
# in one of the two halves alone; both signs; with zeros, subnormals and the largest.
EDGES = [0, 1, 2, 0x7FFFFF, 0x800000, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x3F810000, 0x7F7FFFFF]
MAGNITUDES = st.sampled_from(EDGES) | st.integers(0, 0x7F7FFFFF)
ENTRIES = st.lists(st.tuples(MAGNITUDES, st.booleans(), st.booleans()), min_size=1, max_size=60)


@settings(max_examples=300, deadline=None)
@given(ENTRIES, st.floats(0, 1, exclude_max=True), st.integers(0, 60))
def test_the_mask_is_what_a_stable_sort_by_magnitude_keeps(entries, sparsity, cut):
    n = len(entries)
    values = float32([m | (-(2**31) if negative else 0) for m, negative, _ in entries])
    barred = torch.tensor([out for _, _, out in entries])
    parts = [min(cut, n), n - min(cut, n)]

    def modules(flat):  # "b" comes first in the sorted order, though not in the dict
        return dict(zip("cb", (p.view(-1, 1) for p in flat.split(parts)[::-1]), strict=True))

    for exclude in (None, modules(barred)):
        free = [i for i in range(n) if exclude is None or not entries[i][2]]
        keep = min(round((1 - sparsity) * n), len(free))
        best = sorted(free, key=lambda i: (-entries[i][0], i))[:keep]
        mask = calibrate_mask(modules(values), sparsity, exclude=exclude)
        kept = torch.cat([mask["b"], mask["c"]]).flatten().nonzero().flatten()
        assert kept.tolist() == sorted(best)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_hundred_thousand_magnitudes_with_ties_are_cut_as_a_stable_sort_cuts_them(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    mask = calibrate_mask({"m": values.view(-1, 8).to(device)}, 0.9)["m"].flatten().cpu()
    best = values.abs().sort(descending=True, stable=True).indices[:10_000]
    assert values.abs().unique().numel() < 5_000
    assert mask.nonzero().flatten().tolist() == sorted(best.tolist())


@pytest.mark.parametrize("fill", [0.0, 1.0, -2.5])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_mask_keeps_the_exact_count_when_all_magnitudes_tie(fill, sparsity):
    B = {n: torch.full((7, 3), fill) for n in NAMES}
    mask = calibrate_mask(B, sparsity)
    assert count(mask) == round((1 - sparsity) * 84)
    assert size(mask) == 84


@pytest.mark.parametrize("scope", SCOPES)
def test_every_group_of_the_scope_keeps_its_exact_share(scope):
    B = random_B()
    mask = calibrate_mask(B, 0.9, scope)
    for names in group_modules(B, scope).values():
        assert sum(int(mask[n].sum()) for n in names) == round(0.1 * 30 * len(names))
    assert {n: m.shape for n, m in mask.items()} == {n: b.shape for n, b in B.items()}
    assert all(m.dtype == torch.bool for m in mask.values())


def test_groups_are_the_model_its_layers_its_projections_or_each_matrix():
    names = [*reversed(NAMES), "score"]
    assert group_modules(names, "model") == {"": sorted(names)}
    assert group_modules(names, "layer") == {"0": NAMES[:2], "1": NAMES[2:], "score": ["score"]}
    assert group_modules(names, "projection") == {
        "q": [NAMES[0], NAMES[2]],
        "up": [NAMES[1], NAMES[3]],
        "score": ["score"],
    }
    assert group_modules(names, "matrix") == {n: [n] for n in sorted(names)}


def test_layer_ten_is_not_layer_one_and_digits_in_a_name_are_no_layer():
    names = ["h.1.fc2", "h.10.fc2", "block3.fc2"]
    assert sorted(group_modules(names, "layer")) == ["1", "10", "block3.fc2"]


def test_the_order_in_which_modules_are_given_changes_nothing():
    B = {n: b.round() for n, b in random_B().items()}
    other = calibrate_mask(dict(reversed(B.items())), 0.7)
    assert all(torch.equal(m, other[n]) for n, m in calibrate_mask(B, 0.7).items())


def test_barred_entries_are_never_kept_even_where_they_are_largest():
    B = {"m": torch.tensor([[9.0, 8.0], [1.0, 0.0]])}
    exclude = {"m": torch.tensor([[True, False], [False, False]])}
    mask = calibrate_mask(B, 0.5, exclude=exclude)
    assert mask["m"].tolist() == [[False, True], [True, False]]


def test_barring_leaves_fewer_where_fewer_are_free_and_none_where_none_is():
    B = {"m": torch.tensor([[9.0, 8.0], [1.0, 0.0]])}
    exclude = {"m": torch.tensor([[True, True], [True, False]])}
    assert calibrate_mask(B, 0.0, exclude=exclude)["m"].tolist() == [[False, False], [False, True]]
    everything = {"m": torch.ones(2, 2, dtype=torch.bool)}
    assert count(calibrate_mask(B, 0.0, exclude=everything)) == 0


def test_zeros_are_kept_before_barred_entries():
    B = {"m": torch.zeros(2, 2)}
    exclude = {"m": torch.tensor([[True, False], [False, False]])}
    assert calibrate_mask(B, 0.25, exclude=exclude)["m"].tolist() == [[False, True], [True, True]]


def test_sparsity_zero_keeps_everything_and_one_element_rounds_to_all_or_nothing():
    B = random_B()
    assert count(calibrate_mask(B, 0)) == size(B)
    one = {"m": torch.tensor([[0.0]])}
    assert [count(calibrate_mask(one, s)) for s in (0.0, 0.4, 0.5, 0.9)] == [1, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_type_ranks_by_its_own_values(dtype):
    B = random_B(dtype=dtype)
    wide = {n: b.double() for n, b in B.items()}
    threshold = torch.cat([b.abs().flatten() for b in wide.values()]).sort().values[-13]
    mask = calibrate_mask(B, 0.9)
    assert count(mask) == 12
    for name, m in mask.items():
        assert bool((wide[name][m].abs() >= threshold).all())
        assert bool((wide[name][~m].abs() <= threshold).all())


@pytest.mark.parametrize("scope", SCOPES)
def test_B_and_what_is_barred_are_not_changed_and_need_no_gradient(scope):
    B = {n: b.requires_grad_() for n, b in random_B().items()}
    before = {n: b.detach().clone() for n, b in B.items()}
    exclude = {n: b.detach() > 1 for n, b in B.items()}
    mask = calibrate_mask(B, 0.5, scope, exclude)
    assert all(torch.equal(B[n].detach(), before[n]) for n in B)
    assert all(torch.equal(exclude[n], before[n] > 1) for n in B)
    assert not any(m.requires_grad for m in mask.values())


@pytest.mark.parametrize(
    ("B", "arguments", "message"),
    [
        ({}, (0.5,), "`B` is empty"),
        (random_B(), (1.0,), r"`sparsity` must be in \[0, 1\), got 1.0"),
        (random_B(), (-0.1,), "got -0.1"),
        (random_B(), (float("nan"),), "got nan"),
        (random_B(), (0.5, "row"), "`scope` must be one of model, layer, projection, matrix"),
        ({"m": torch.tensor([[1.0, float("nan")]])}, (0.5,), "not finite"),
        ({"m": torch.tensor([[1.0, float("-inf")]])}, (0.5,), "not finite"),
    ],
)
def test_what_cannot_be_masked_is_a_value_error(B, arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate_mask(B, *arguments)


def test_union_overlap_and_capacity_are_as_counted_by_hand():
    a = {"m": torch.tensor([[True, True], [False, False]])}
    b = {"m": torch.tensor([[True, False], [False, False]]), "n": torch.ones(1, 2) > 0}
    both = union([a, b])
    assert both["m"].tolist() == [[True, True], [False, False]]
    assert both["n"].tolist() == [[True, True]]
    assert overlap(a, b) == overlap(b, a) == 0.5
    assert capacity(both) == {"m": 0.5, "n": 0.0}
    assert a["m"].tolist() == [[True, True], [False, False]]


def test_a_union_of_one_is_a_copy_and_of_none_is_empty():
    a = {"m": torch.zeros(2, 2, dtype=torch.bool)}
    union([a])["m"].fill_(True)
    assert count(a) == 0
    assert union([]) == {}


def test_overlap_of_masks_of_different_modules_or_of_empty_ones_is_zero():
    a, empty = {"m": torch.ones(1, 1) > 0}, {"m": torch.zeros(1, 1) > 0}
    assert overlap(a, {"n": torch.ones(1, 1) > 0}) == 0.0
    assert overlap(a, empty) == overlap(empty, empty) == overlap({}, a) == 0.0
    assert overlap(a, a) == 1.0


def test_support_is_what_is_not_zero_either_sign_of_zero():
    assert support({"m": torch.tensor([[0.0, -0.0, 1e-40, -3.0]])})["m"].tolist() == [
        [False, False, True, True]
    ]
