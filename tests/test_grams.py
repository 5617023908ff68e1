"""Moments collected when they are read: the same as all at once, a few at a time."""

from dataclasses import replace

import architectures
import pytest
import torch
from test_layerwise import adapter, deltas, make_base, rows_of

from lori_manager import grams as streaming
from lori_manager import iteris
from lori_manager.consolidation import input_grams
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.errors import InvalidInput
from lori_manager.grams import StreamedGrams
from lori_manager.merging.interference import interference
from lori_manager.merging.lorm import merge_lorm
from lori_manager.merging.methods import MergeOptions
from lori_manager.merging.regmean import merge_regmean
from lori_manager.stages import Stage, grouped, stages_of

pytestmark = pytest.mark.usefixtures("one_thread")
ROOMS = [1, 40_000, 2**30]  # a stage at a time, some, all
MAKERS = [architectures.llama, architectures.gemma2, architectures.gpt2]


def without(one, word):
    """The adapter without the modules of that name."""
    (old,) = one.blocks
    B = {n: b for n, b in old.B.items() if word not in n}
    return AdapterWeights((Block(B, old.scaling, tensors={n: old.A[n] for n in B}),))


@pytest.fixture
def problem(tmp_path):
    base = make_base(architectures.llama, tmp_path)
    members = [adapter(base.model, 1), without(adapter(base.model, 2), "q_proj"),
               without(adapter(base.model, 3), "k_proj")]  # fmt: skip
    rows = [rows_of(1, 12, 0, 20), rows_of(2, 12, 30, 50), rows_of(3, 12, 10, 40)]
    return base, members, rows


def streamed(base, members, rows, room):
    return StreamedGrams(base, [m.updates() for m in members], rows, 5, room)


def held(base, members, rows):
    return [input_grams(base, m.updates(), r, 5) for m, r in zip(members, rows, strict=True)]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("room", ROOMS)
def test_what_is_read_is_what_is_collected_all_at_once(tmp_path, make, room):
    base = make_base(make, tmp_path)
    members, rows = [adapter(base.model, s) for s in (1, 2)], [rows_of(1), rows_of(2)]
    found, expected = streamed(base, members, rows, room), held(base, members, rows)
    assert (len(found.groups) == 1) == (room == ROOMS[-1])
    for one, all_ in zip(found, expected, strict=True):
        assert sorted(one) == sorted(all_)
        for name in one:
            assert torch.equal(one[name], all_[name]), name


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("changes", [{}, {"max_rank": 2}, {"shrink": 0.5}])
def test_a_regression_comes_out_the_same_however_little_is_held(problem, room, changes):
    base, members, rows = problem
    options = MergeOptions(grams=held(base, members, rows), **changes)
    expected = deltas(merge_regmean(members, [0.2, 0.3, 0.5], options))
    grams = streamed(base, members, rows, room)
    told = replace(options, grams=grams, groups=grams.groups)
    found = deltas(merge_regmean(members, [0.2, 0.3, 0.5], told))
    assert sorted(found) == sorted(expected)
    for name, delta in found.items():
        assert torch.allclose(delta, expected[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("room", ROOMS)
def test_every_moment_is_collected_once(problem, room, monkeypatch):
    base, members, rows = problem
    grams = streamed(base, members, rows, room)
    told = []

    def counted(base, updates, rows, batch, only):
        told.append((len(updates), [stage.names for stage in only]))
        return input_grams(base, updates, rows, batch, only)

    monkeypatch.setattr(streaming, "input_grams", counted)
    merge_regmean(members, [0.2, 0.3, 0.5], MergeOptions(grams=grams, groups=grams.groups))
    assert len(told) == 3 * len(grams.groups)
    told.clear()
    interference(members, [0.2, 0.3, 0.5], grams)
    assert len(told) == 3 * len(grams.groups)


@pytest.mark.parametrize("room", ROOMS)
def test_lorm_and_the_interference_read_them_as_well(problem, room):
    base, members, rows = problem
    expected = interference(members, [0.2, 0.3, 0.5], held(base, members, rows))
    found = interference(members, [0.2, 0.3, 0.5], streamed(base, members, rows, room))
    assert found.response == expected.response
    assert found.error == expected.error
    (first,) = members[0].blocks
    alike = [AdapterWeights((replace(first, B={n: b * s for n, b in first.B.items()}),))
             for s in (1.0, -2.0)]  # fmt: skip
    grams = streamed(base, alike, rows[:2], room)
    merged = merge_lorm(alike, [0.5, 0.5], MergeOptions(grams=grams, groups=grams.groups))
    usual = merge_lorm(alike, [0.5, 0.5], MergeOptions(grams=held(base, alike, rows[:2])))
    for name, delta in deltas(merged).items():
        assert torch.equal(delta, deltas(usual)[name])


@pytest.mark.parametrize("room", ROOMS)
def test_iteris_comes_out_the_same_however_little_is_held(problem, room, monkeypatch):
    base, members, rows = problem
    expected = deltas(iteris.merge_iteris(base, members, [0.2, 0.3, 0.5], rows))
    monkeypatch.setattr(iteris, "grouped", lambda found, held: grouped(found, held, room))
    steps = []
    merged = iteris.merge_iteris(
        base, members, [0.2, 0.3, 0.5], rows, on_progress=lambda *told: steps.append(told)
    )
    assert steps[-1][0] == steps[-1][1] == len(steps)
    for name, delta in deltas(merged).items():
        assert torch.allclose(delta, expected[name], rtol=1e-4, atol=1e-6), name


def test_stages_are_in_the_order_of_calls_and_siblings_stand_together(tmp_path):
    base = make_base(architectures.llama, tmp_path)
    names = [n for n, m in base.model.named_modules() if n.endswith("_proj")]
    found = stages_of(base, sorted(names))
    last = [tuple(n.rpartition(".")[2] for n in stage.names) for stage in found[-4:]]
    assert last == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"),
                    ("down_proj",)]  # fmt: skip
    assert sorted(n for stage in found for n in stage.names) == sorted(names)
    assert all(stage.calls == len(stage.names) for stage in found)
    sizes = {n: base.model.get_submodule(n).in_features for n in names}
    assert all(stage.features == sizes[n] for stage in found for n in stage.names)


def test_a_forward_ends_after_the_last_module_that_is_looked_at(tmp_path):
    base = make_base(architectures.llama, tmp_path)
    one = adapter(base.model, 1)
    groups = stages_of(base, one.updates())
    base.head()  # found by two forwards, once
    later = base.model.get_submodule(groups[-1].names[0])
    called = []
    later.register_forward_hook(lambda *_: called.append(1))
    updates = {n: u for n, u in one.updates().items() if n in groups[0].names}
    input_grams(base, updates, rows_of(1), 5, groups[:1])
    assert not called
    input_grams(base, updates, rows_of(1), 5)
    assert called


def test_a_module_that_a_forward_does_not_call_is_refused(tmp_path):
    base = make_base(architectures.llama, tmp_path)
    base.model.spare = torch.nn.Linear(4, 4)
    with pytest.raises(InvalidInput, match=r"spare is not called.*--method concat"):
        stages_of(base, ["spare"])


def test_groups_are_as_large_as_the_room_and_never_empty():
    found = [Stage((str(i),), size, 1) for i, size in enumerate([3, 3, 9, 2, 2, 2])]
    groups = grouped(found, lambda stage: stage.features, 6)
    assert [[s.features for s in group] for group in groups] == [[3, 3], [9], [2, 2, 2]]
    assert grouped([], lambda stage: 1) == []
