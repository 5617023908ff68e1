"""Encoders of every type that lori knows: loaded, read with padding, adapted, given to PEFT."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from encoders import IMAGES, LAYERED, TEXT, WORDS, encoder, sentences, squares

from lori_manager.adapters import lori
from lori_manager.adapters.heads import fresh_head, head_attached
from lori_manager.adapters.peft_export import LABELS_FILE, write_peft
from lori_manager.architectures import CAUSAL, IMAGE_ENCODER, TEXT_ENCODER, check_architecture
from lori_manager.config import Config
from lori_manager.consolidation import input_grams
from lori_manager.engine.layers import attached, low_rank_layers
from lori_manager.engine.weights import AdapterWeights, Block
from lori_manager.errors import DamagedObject, InvalidInput, NotFound
from lori_manager.labelling import Labelling
from lori_manager.layerwise import merge_layerwise
from lori_manager.models import head_names, load_base, load_skeleton, load_tokenizer
from lori_manager.tasks.labelled import LabelledImage, encode_labelled, parse_labelled

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = ("a", "b", "c")
TEXTS = ["red box", "blue ball on old box up", "tiny"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = encoder(tmp_path_factory.mktemp("encoders") / kind, kind)
        return made[kind]

    return folder


@pytest.fixture(params=[*TEXT, *IMAGES])
def base(request, folders):
    return load_base(folders(request.param), "fp32", "cpu")


@pytest.fixture(params=TEXT)
def text_base(request, folders):
    return load_base(folders(request.param), "fp32", "cpu")


@pytest.fixture
def roberta(folders):
    return load_base(folders("roberta"), "fp32", "cpu")


def encoded(base, texts=TEXTS, pairs=None):
    objs = [{"text": text, "label": "abc"[i % 3]} for i, text in enumerate(texts)]
    for obj, pair in zip(objs, pairs or (), strict=False):
        obj["text_pair"] = pair
    rows = [parse_labelled(obj, "here") for obj in objs]
    return encode_labelled(base.tokenizer, rows, LABELS, max_length=30, context=base.context)


def inputs(base, count=3):
    """What a model of that architecture takes, `count` rows."""
    if base.architecture == IMAGE_ENCODER:
        return {"pixel_values": torch.randn(count, 3, 16, 16, generator=torch.manual_seed(1))}
    labelling = Labelling(base)
    return labelling.batch(encoded(base, TEXTS[:count])).inputs


def random_adapter(base, scale=0.1):
    """An update of every module, and a head."""
    block = lori.fresh_block(base.linear_shapes, Config(rank=4, alpha=8.0), "line")
    g = torch.Generator().manual_seed(5)
    B = {n: torch.randn(b.shape, generator=g) * scale for n, b in block.B.items()}
    head = fresh_head(base, LABELS, 0)
    return AdapterWeights((Block(B, block.scaling, block.projection),), heads={"t": head})


def logits(base, adapter, given):
    with (
        torch.no_grad(),
        attached(base.model, low_rank_layers(base.model, adapter.updates())),
        head_attached(base, adapter.heads["t"]),
    ):
        return base.model(**given).logits


def test_an_encoder_is_loaded_frozen_with_its_head_apart_from_its_layers(base):
    assert base.architecture.encoder
    assert not any(p.requires_grad for p in base.model.parameters())
    behind = head_names(base.model)
    assert "classifier" in behind
    assert base.linear_shapes
    for name in base.linear_shapes:
        assert not any(f"{name}.".startswith(f"{head}.") for head in behind)
    assert load_skeleton(base.folder).linear_shapes == base.linear_shapes
    assert any(name.startswith("classifier.") for name in base.drawn)
    before = {n: id(m) for n, m in base.model.named_modules()}
    with head_attached(base, fresh_head(base, LABELS, 0)) as training:
        assert base.model(**inputs(base)).logits.shape == (3, 3)
        assert all(name.startswith(tuple(behind)) for name in training.parameters)
    assert {n: id(m) for n, m in base.model.named_modules()} == before


def test_gradients_reach_the_head_and_b_of_every_module(base):
    block = lori.fresh_block(base.linear_shapes, Config(rank=4, alpha=8.0), "line")
    layers = lori.trainable_layers(base.model, block, None)
    head = fresh_head(base, LABELS, 0)
    with head_attached(base, head) as training, lori.in_training(base, layers) as parameters:
        loss = base.model(**inputs(base)).logits.square().sum()
        loss.backward()
        assert all(bool(p.grad.any()) for p in training.parameters.values())
        (values,) = parameters.values()
        sizes = [layers[name].values.numel() for name in block.B]
        moved = [bool(part.any()) for part in torch.split(values.grad, sizes)]
    missed = [name for name, found in zip(block.B, moved, strict=True) if not found]
    assert not missed


def test_padding_and_neighbours_change_no_logits(text_base):
    adapter = random_adapter(text_base)
    rows = encoded(text_base, pairs=[None, "far off", "big up down on"])
    with (
        torch.no_grad(),
        attached(text_base.model, low_rank_layers(text_base.model, adapter.updates())),
        head_attached(text_base, adapter.heads["t"]),
    ):
        labelling = Labelling(text_base)
        together = labelling.logits(labelling.batch(rows))
        alone = torch.cat([labelling.logits(labelling.batch([row])) for row in rows])
    assert len({row.length for row in rows}) == 3
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_peft_loads_an_export_to_equal_logits(base, tmp_path):
    import transformers
    from peft import PeftModel

    adapter = random_adapter(base)
    skeleton = load_skeleton(base.folder)
    kind = "SEQ_CLS" if base.architecture == TEXT_ENCODER else None
    write_peft(
        adapter.updates(), tmp_path / "out", base_name=str(base.folder), revision=None,
        fingerprint="f", all_modules=[name for name, _ in skeleton.model.named_modules()],
        head=adapter.heads["t"], head_modules=head_names(skeleton.model), task_type=kind,
    )  # fmt: skip
    told = json.loads((tmp_path / "out" / LABELS_FILE).read_text())
    assert told["label2id"] == {"a": 0, "b": 1, "c": 2}
    auto = getattr(transformers, base.architecture.auto)
    model = auto.from_pretrained(base.folder, dtype=torch.float32, **told)
    peft = PeftModel.from_pretrained(model, tmp_path / "out").eval()
    given = inputs(base)
    ours = logits(base, adapter, given)
    with torch.no_grad():
        theirs = peft(**given).logits
        plain = auto.from_pretrained(base.folder, dtype=torch.float32, **told)(**given).logits
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
    assert (ours - plain).abs().max() > 1e-3


def test_a_fresh_head_follows_from_seed_and_name_and_begins_with_what_the_base_has(folders):
    base = load_base(folders("bert"), "fp32", "cpu")
    first, again, other = (fresh_head(base, LABELS, seed) for seed in (0, 0, 1))
    assert first.same_as(again)
    drawn = "classifier.weight"
    assert not torch.equal(first.tensors[drawn], other.tensors[drawn])
    assert first.tensors[drawn].std() == pytest.approx(0.2, rel=0.3)
    assert not first.tensors["classifier.bias"].any()
    pooler = base.model.get_parameter("bert.pooler.dense.weight")
    assert torch.equal(first.tensors["bert.pooler.dense.weight"], pooler)


def test_a_classifier_of_the_base_is_begun_with_where_it_has_as_many_labels(folders, tmp_path):
    from transformers import RobertaForSequenceClassification

    model = RobertaForSequenceClassification.from_pretrained(folders("roberta"), num_labels=3)
    model.save_pretrained(tmp_path)
    load_tokenizer(folders("roberta")).save_pretrained(tmp_path)
    base = load_base(tmp_path, "fp32", "cpu")
    assert not base.drawn
    name = "classifier.out_proj.weight"
    assert torch.equal(fresh_head(base, LABELS, 0).tensors[name], model.get_parameter(name))
    assert fresh_head(base, "abcd", 0).tensors[name].shape == (4, 32)


def test_bf16_encoders_have_a_head_in_float32(folders):
    base = load_base(folders("roberta"), "bf16", "cpu")
    with head_attached(base, fresh_head(base, LABELS, 0)) as training, torch.no_grad():
        assert {p.dtype for p in training.parameters.values()} == {torch.float32}
        assert base.model(**inputs(base)).logits.dtype == torch.float32


def test_an_nf4_encoder_keeps_its_head_whole(folders):
    pytest.importorskip("bitsandbytes")
    base = load_base(folders("roberta"), "fp32", "cpu", base_bits=4)
    packed = {n for n, m in base.model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert packed == set(base.linear_shapes)
    adapter = random_adapter(base)
    assert torch.isfinite(logits(base, adapter, inputs(base))).all()


def test_a_head_of_another_base_is_damaged_here(roberta, folders):
    head = fresh_head(load_base(folders("bert"), "fp32", "cpu"), LABELS, 0)
    with pytest.raises(DamagedObject, match="not one of this base"), head_attached(roberta, head):
        pass


def test_an_encoder_that_lacks_weights_is_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in folders("roberta").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFound, match=r"lacks roberta\.encoder\.layer\.1\.output\.dense\.weight"):
        load_base(tmp_path, "fp32", "cpu")


def test_the_architecture_is_told_by_the_model_type():
    assert check_architecture({"model_type": "llama"}) == CAUSAL
    assert check_architecture({"model_type": "roberta"}) == TEXT_ENCODER
    assert check_architecture({"model_type": "vit"}) == IMAGE_ENCODER
    with pytest.raises(InvalidInput, match="set up as a decoder"):
        check_architecture({"model_type": "bert", "is_decoder": True})


def test_the_longest_text_fits_a_model_whose_positions_are_shifted(roberta):
    long = " ".join(WORDS * 5)
    row = parse_labelled({"text": long, "label": "a"}, "here")
    (cut,) = encode_labelled(
        roberta.tokenizer, [row], LABELS, max_length=100, context=roberta.context
    )
    assert (cut.length, cut.truncated) == (38, 44)
    assert cut.ids[-1] == 2  # the tokenizer's own end is kept
    labelling = Labelling(roberta)
    with torch.no_grad(), head_attached(roberta, fresh_head(roberta, LABELS, 0)):
        assert np.isfinite(labelling.logits(labelling.batch([cut])).numpy()).all()


@pytest.mark.parametrize("kind", LAYERED)
def test_layerwise_gives_back_what_all_members_do(folders, kind, tmp_path):
    base = load_base(folders(kind), "fp32", "cpu")
    adapter = random_adapter(base)
    rows = encoded(base, sentence_texts(24)) if kind in TEXT else images(tmp_path, 24)
    merged = merge_layerwise(base, [adapter, adapter], [0.5, 0.5], [rows, rows])
    labelling = Labelling(base)
    given = labelling.place(labelling.batch(rows[:3])).inputs
    heads = {"t": adapter.heads["t"]}
    ours = logits(base, replace(merged, heads=heads), given)
    theirs = logits(base, adapter, given)
    nothing = logits(base, replace(random_adapter(base, 0.0), heads=heads), given)
    assert (ours - theirs).abs().max() < 0.05 * (theirs - nothing).abs().max()


def images(folder, count):
    paths = sorted(squares(folder / "images", ("red",), count, 0).rglob("*.png"))
    return [LabelledImage(str(i), 0, path.read_bytes) for i, path in enumerate(paths)]


def test_layers_that_read_relative_positions_are_not_merged_by_inputs(folders):
    base = load_base(folders("deberta-v2"), "fp32", "cpu")
    adapter = random_adapter(base)
    rows = encoded(base, sentence_texts(4))
    for merge in (
        lambda: merge_layerwise(base, [adapter] * 2, [0.5, 0.5], [rows] * 2),
        lambda: input_grams(base, adapter.updates(), rows, 4),
    ):
        with pytest.raises(InvalidInput, match="something else than its tokens"):
            merge()


def sentence_texts(count):
    return [row["text"] for row in sentences(("red", "blue", "green"), count, 0)]


def test_input_moments_count_real_tokens_alone(roberta):
    rows = encoded(roberta)
    name = "roberta.encoder.layer.0.attention.self.query"
    updates = {name: random_adapter(roberta, 0.0).updates()[name]}
    found = input_grams(roberta, updates, rows, 3)[name]
    seen = []
    hook = roberta.model.get_submodule(name).register_forward_pre_hook(
        lambda _, x: seen.append(x[0][0])
    )
    labelling = Labelling(roberta)
    with torch.no_grad():
        for row in rows:
            labelling.run(labelling.batch([row]))
    hook.remove()
    tokens = torch.cat(seen)
    assert torch.allclose(found, tokens.T @ tokens / len(tokens), atol=1e-5)


def test_every_layered_type_is_one(folders):
    from lori_manager.blockwise import decoder_blocks

    for kind in LAYERED:
        skeleton = load_skeleton(folders(kind))
        assert len(decoder_blocks(skeleton.model, list(skeleton.linear_shapes))[1]) == 2
