"""`bench`: what it measures, and that the base is the same after as before."""

import dataclasses

import pytest
import torch
from small_workspaces import copied, make_workspace

from lori_manager.adapters.applying import applied
from lori_manager.benching import cannot_merge, merged
from lori_manager.engine.weights import KindWeights
from lori_manager.errors import InvalidInput, NotFound

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def taught(tiny_base, tmp_path_factory):
    ws = make_workspace(tmp_path_factory.mktemp("bench") / "w", tiny_base)
    ws.train(["colour"])
    ws.train(["shape"], ws.settings.config.replace(kind="lora"))
    return ws


@pytest.fixture
def ws(taught, tmp_path):
    return copied(taught, tmp_path / "w")


def logits(base):
    ids = torch.arange(6)[None] + 40
    with torch.no_grad():
        return base.model(input_ids=ids, use_cache=False).logits[0].clone()


def test_base_apart_merged_and_switching_are_measured(ws):
    base = ws.base_model(ws.settings.config)
    before = {n: p.clone() for n, p in base.model.named_parameters()}
    found = ws.bench(["colour@1", "shape"], rows=3, tokens=4, repeats=2)
    assert [(u.ref, u.way) for u in found.uses] == [
        ("base", "alone"), ("colour@1", "apart"), ("colour@1", "merged"),
        ("shape@1", "apart"), ("shape@1", "merged"),
    ]  # fmt: skip
    assert all(u.prefill_seconds > 0 and u.token_seconds > 0 for u in found.uses)
    assert [s.ref for s in found.switches] == ["colour@1", "shape@1"]
    for switch in found.switches:
        assert min(switch.load, switch.attach, switch.detach, switch.merge, switch.unmerge) > 0
    assert (found.rows, found.tokens, found.repeats) == (3, 4, 2)
    _, encoded = ws.rows(ws.store.task("colour"), "eval")
    assert found.prompt_tokens == sum(row.prompt_length for row in encoded[:3])
    for name, value in base.model.named_parameters():
        assert torch.equal(value, before[name]), name


def test_merged_weights_say_what_the_adapter_apart_says_and_leave_no_trace(ws):
    base, stored = ws.base_model(ws.settings.config), ws.stored(ws.adapter("shape@1"))
    plain = logits(base)
    with applied(base, stored):
        apart = logits(base)
    with merged(base, stored.updates()):
        inside = logits(base)
    assert torch.allclose(inside, apart, atol=1e-5)
    assert not torch.allclose(inside, plain, atol=1e-4)
    assert torch.equal(logits(base), plain)


def test_an_error_inside_leaves_the_base_as_it_was(ws):
    base, stored = ws.base_model(ws.settings.config), ws.stored(ws.adapter("shape@1"))
    plain = logits(base)
    with pytest.raises(KeyError), merged(base, stored.updates()):
        raise KeyError
    assert torch.equal(logits(base), plain)


def test_what_is_no_low_rank_update_and_a_packed_base_are_not_merged(ws):
    base, stored = ws.base_model(ws.settings.config), ws.stored(ws.adapter("shape@1"))
    assert cannot_merge(base, stored) == ""
    other = KindWeights("dora", {}, {"x": torch.ones(1)})
    assert "no low-rank update" in cannot_merge(base, other)
    assert "packed" in cannot_merge(dataclasses.replace(base, base_bits=4), stored)
    assert "packed" in cannot_merge(dataclasses.replace(base, precision="fp8"), stored)


@pytest.mark.parametrize(
    ("refs", "options", "told"),
    [
        ([], {}, "at least one adapter"),
        (["colour@1"], {"rows": 0}, "`rows` must be at least 1"),
        (["colour@1"], {"tokens": 1}, "`tokens` must be at least 2"),
        (["colour@1"], {"repeats": 0}, "`repeats` must be at least 1"),
        (["base"], {}, "`base` is not an adapter"),
    ],
)
def test_what_cannot_be_measured_is_refused(ws, refs, options, told):
    with pytest.raises(InvalidInput, match=told):
        ws.bench(refs, **options)


def test_an_unknown_adapter_is_not_found(ws):
    with pytest.raises(NotFound, match="nobody"):
        ws.bench(["nobody@1"])
