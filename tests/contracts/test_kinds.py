"""What holds for every kind of adapter; one new row in KINDS arrives tested."""

import importlib.util
import warnings

import pytest
import torch
from small_workspaces import copied, make_workspace

from lori_manager.adapters.applying import applied
from lori_manager.adapters.kind import module_of
from lori_manager.engine.codec import decode, encode
from lori_manager.engine.weights import AdapterWeights, KindWeights
from lori_manager.errors import InvalidInput
from lori_manager.kinds import KINDS, LORI, resolved
from lori_manager.teaching import TrainOptions

pytestmark = pytest.mark.usefixtures("one_thread")
LACKING = importlib.util.find_spec("bitsandbytes") is None
if LACKING:
    warnings.warn("no bitsandbytes: NOTHING of kinds on 4-bit bases is tested", stacklevel=1)
PACKED = pytest.mark.skipif(LACKING, reason="bitsandbytes is not installed")


def able(names):
    """The kinds, those on a packed base where it can be packed."""
    return [
        pytest.param(name, marks=[PACKED] if KINDS[name].base_bits == 4 else []) for name in names
    ]


EVERY = able(KINDS)
OTHERS = able(name for name in KINDS if name != LORI)
LOW_RANK = able(name for name in KINDS if KINDS[name].low_rank)
OWN_FORM = able(name for name in KINDS if not KINDS[name].low_rank)


@pytest.fixture(scope="module")
def untaught(tiny_base, tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("kinds") / "w", tiny_base, checkpoint_seconds=0.0)


@pytest.fixture
def ws(untaught, tmp_path):
    return copied(untaught, tmp_path / "w")


def config_of(ws, kind, **changes):
    return ws.settings.config.replace(kind=kind, **changes)


def trained(ws, kind, task="colour", **changes):
    return ws.train([task], config_of(ws, kind, **changes))[0]


def logits(base):
    ids = torch.arange(6)[None] + 40
    with torch.no_grad():
        return base.model(input_ids=ids.to(base.device), use_cache=False).logits[0].clone()


@pytest.mark.parametrize("kind", EVERY)
def test_a_kind_trains_is_stored_scored_and_changes_what_the_model_says(ws, kind):
    base = ws.base_model(ws.settings.config)
    before, modules = logits(base), {n: id(m) for n, m in base.model.named_modules()}
    found = trained(ws, kind, steps=30, learning_rate=3e-2)  # a tiny base moves slowly
    again = ws.base_model(resolved(config_of(ws, kind)))
    if again is base:
        assert torch.equal(logits(base), before)
        assert {n: id(m) for n, m in base.model.named_modules()} == modules
        assert not any(p.requires_grad for p in base.model.parameters())
    assert found.adapter.facts["last_loss"] < found.adapter.facts["first_loss"]
    assert found.scores[0].rows == 8
    plain = logits(again)
    with applied(again, ws.stored(found.adapter)):
        assert (logits(again) - plain).abs().max() > 1e-4
    assert torch.equal(logits(again), plain)
    assert list(ws.verify()) == []


@pytest.mark.parametrize("bits", [16, pytest.param(4, marks=PACKED)])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_stored_says_what_was_trained(ws, kind, bits):
    """The loaded adapter against the modules that trained, in float32."""
    if bits == 4 and not KINDS[kind].packed:
        with pytest.raises(InvalidInput, match=f"kind `{kind}` needs the base's plain weights"):
            resolved(config_of(ws, kind, base_bits=bits))
        return
    config = resolved(config_of(ws, kind, base_bits=bits))
    base = ws.base_model(config)
    _, rows = ws.rows(ws.store.task("colour"), "train")
    from lori_manager.training import fit

    with module_of(kind).training(base, config, steps=12) as training:
        fit(base, training.parameters, rows, config, steps=12, peak=5e-2, training=training)
        during = logits(base)
        weights = training.weights(torch.float32)
    blob = encode(weights)
    loaded, _ = decode(blob)
    assert encode(loaded) == blob
    plain = logits(base)
    with applied(base, loaded):
        assert torch.allclose(logits(base), during, atol=2e-5)
    assert not torch.allclose(plain, during, atol=1e-3)
    kind_of = KINDS[kind]
    assert isinstance(loaded, AdapterWeights if kind_of.low_rank else KindWeights)


@pytest.mark.parametrize("kind", EVERY)
def test_the_same_seed_gives_the_same_digest_and_another_does_not(untaught, tmp_path, kind):
    digests = []
    for i, seed in enumerate((1, 1, 2)):
        ws = copied(untaught, tmp_path / str(i))
        torch.manual_seed(i)  # nothing may hang on the process' own generator
        digests.append(trained(ws, kind, seed=seed).adapter.digest)
    assert digests[0] == digests[1] != digests[2]


class Stopped(Exception):
    """The interruption."""


@pytest.mark.parametrize("kind", EVERY)
def test_an_interrupted_training_goes_on_to_the_same_digest(untaught, tmp_path, kind):
    whole = trained(copied(untaught, tmp_path / "whole"), kind, steps=10).adapter
    ws = copied(untaught, tmp_path / "stopped")
    for stop in (3, 7):

        def tell(told, stop=stop):
            if told.phase.startswith("training") and told.step == stop:
                raise Stopped

        ws.on_progress = tell
        with pytest.raises(Stopped):
            trained(ws, kind, steps=10)
    assert list((ws.store.root / "runs").glob("*/0-training*"))
    ws.on_progress = lambda told: None
    assert trained(ws, kind, steps=10).adapter.digest == whole.digest


@pytest.mark.parametrize("kind", EVERY)
def test_merging_takes_low_rank_kinds_and_refuses_the_others_in_one_sentence(ws, kind):
    refs = [trained(ws, kind, task).adapter.ref for task in ("colour", "shape")]
    if KINDS[kind].low_rank:
        merged = ws.merge(refs, method="concat").adapter
        assert {p.ref for p in merged.parents} == set(refs)
    else:
        with pytest.raises(InvalidInput, match=f"{refs[0]} is of kind `{kind}`.*cannot be merged"):
            ws.merge(refs, method="concat")
    assert len(ws.store.adapters()) == 2 + KINDS[kind].low_rank


@pytest.mark.parametrize("kind", LOW_RANK)
def test_an_export_of_a_low_rank_kind_is_a_plain_peft_lora(ws, kind, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = trained(ws, kind, store_dtype="fp32").adapter
    folder = ws.export(adapter.ref, tmp_path / "out")
    base = ws.base_model(ws.settings.config)
    with applied(base, ws.stored(adapter)):
        ours = logits(base)
    model = AutoModelForCausalLM.from_pretrained(ws.base_folder, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        theirs = peft(input_ids=torch.arange(6)[None] + 40).logits[0]
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


@pytest.mark.parametrize("kind", OWN_FORM)
def test_an_export_by_peft_gives_our_logits_and_comes_back(ws, kind, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = config_of(ws, kind, steps=30, learning_rate=3e-2)
    adapter = ws.train(["colour"], config)[0].adapter
    folder = ws.export(adapter.ref, tmp_path / "out")
    assert f"# {adapter.ref}" in (folder / "README.md").read_text()
    if not (folder / "adapter_config.json").exists():
        return  # PEFT has no such thing
    base = ws.base_model(ws.settings.config)
    plain = logits(base)
    with applied(base, ws.stored(adapter)):
        ours = logits(base)
    assert (ours - plain).abs().max() > 1e-2
    model = AutoModelForCausalLM.from_pretrained(ws.base_folder, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        theirs = peft(input_ids=torch.arange(6)[None] + 40).logits[0]
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
    (back,) = ws.import_adapters([folder])
    assert back.adapter is not None, back.reason
    assert back.adapter.method == kind
    with applied(base, ws.stored(back.adapter)):
        assert (logits(base) - ours).abs().max() <= 1e-5 * ours.abs().max()


@pytest.mark.parametrize("kind", EVERY)
def test_a_whole_model_says_what_base_and_adapter_say_or_is_refused_in_one_sentence(
    ws, kind, tmp_path
):
    from transformers import AutoModelForCausalLM

    adapter = trained(ws, kind, steps=30, learning_rate=3e-2).adapter
    weights = ws.stored(adapter)
    if isinstance(weights, KindWeights) and not hasattr(module_of(kind), "write_full"):
        with pytest.raises(InvalidInput, match=f"is of kind `{kind}`.*cannot be merged into"):
            ws.export(adapter.ref, tmp_path / "full", full=True)
        return
    folder = ws.export(adapter.ref, tmp_path / "full", full=True)
    base = ws.base_model(ws.settings.config)
    with applied(base, weights):
        ours = logits(base)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(input_ids=torch.arange(6)[None] + 40).logits[0]
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


@pytest.mark.parametrize("kind", OTHERS)
def test_a_kind_goes_on_from_its_own_adapter_or_says_that_it_cannot(ws, kind):
    first = trained(ws, kind, steps=30, learning_rate=3e-2, store_dtype="fp32").adapter
    options = TrainOptions(start=first.ref)
    config = config_of(ws, kind, steps=1, learning_rate=1e-12, store_dtype="fp32")
    if not KINDS[kind].continues:
        for given, sequence in ((options, None), (None, "chain")):
            with pytest.raises(InvalidInput, match=f"kind `{kind}` begins at the base"):
                ws.train(["shape"], config, given, sequence=sequence)
        assert len(ws.store.adapters()) == 1
        return
    (second,) = ws.train(["shape"], config, options)
    assert [p.ref for p in second.adapter.parents] == [first.ref]
    base = ws.base_model(resolved(config))
    with applied(base, ws.stored(first)):
        before = logits(base)
    with applied(base, ws.stored(second.adapter)):
        assert torch.allclose(logits(base), before, atol=1e-4)
    assert not torch.allclose(logits(base), before, atol=1e-2)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_for_lori_alone_is_refused_for_other_kinds(ws, kind):
    with pytest.raises(InvalidInput, match=f"--dense is for kind `lori`.*`{kind}`"):
        ws.train(["colour"], config_of(ws, kind), TrainOptions(dense=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_described(kind):
    row = KINDS[kind]
    assert row.source.startswith("arXiv:")
    assert row.rate > 0
    assert all((row.title, row.export, row.served))
