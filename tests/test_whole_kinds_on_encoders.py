"""Full fine-tuning and bottleneck adapters on encoders: heads stay beside them."""

import json

import numpy as np
import pytest
import torch
from encoders import FILLERS, IMAGES, TEXT, encoder, sentences, squares, write_jsonl
from small_workspaces import copied

from lori_manager.adapters import bottleneck, full
from lori_manager.adapters.applying import applied
from lori_manager.adapters.heads import fresh_head, head_attached, with_head
from lori_manager.adapters.kind import module_of
from lori_manager.classification import label_losses, label_steps
from lori_manager.config import Config
from lori_manager.engine.codec import decode, encode
from lori_manager.errors import InvalidInput, WrongBase
from lori_manager.kind_comparison import RateSearch
from lori_manager.kinds import KINDS, resolved
from lori_manager.labelling import Labelling
from lori_manager.models import head_names, load_base
from lori_manager.tasks.labelled import LabelledImage, LabelledText
from lori_manager.teaching import TrainOptions
from lori_manager.training import fit
from lori_manager.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"steps": 60, "batch": 32, "head_learning_rate": 1e-2, "checkpoint_seconds": 0.0}
LABELS = ("big", "old", "tiny")
RATES = {"full": 3e-3, "bottleneck": 3e-2}
OPTIONS = {"full": {}, "bottleneck": {"reduction": 2}}  # a tiny encoder is narrow
WHOLE = sorted(RATES)
ABLE = [(kind, base, "fp32") for kind in WHOLE for base in (*TEXT, *IMAGES)
        if base not in KINDS[kind].not_on]  # fmt: skip
ABLE += [(kind, base, "bf16") for kind in WHOLE for base in ("bert", "vit")]


def workspace(home, kind):
    ws = Workspace.create(home / "w", str(encoder(home / "base", kind)))
    lines = [f"{key} = {json.dumps(value)}" for key, value in SETTINGS.items()]
    (ws.root / "lori.toml").write_text("[defaults]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return ws


@pytest.fixture(scope="module")
def untaught(tmp_path_factory):
    """A task of three labels on BERT."""
    home = tmp_path_factory.mktemp("bert")
    ws = workspace(home, "bert")
    rows = sentences(LABELS, 360, 1, FILLERS[0])
    train, held = (write_jsonl(home / f"{name}.jsonl", part) for name, part in
                   (("train", rows[:300]), ("eval", rows[300:])))  # fmt: skip
    for name in ("size", "other"):
        ws.add_task(name, train=str(train), eval=str(held), probe_rows=8)
    return ws


@pytest.fixture
def ws(untaught, tmp_path):
    return copied(untaught, tmp_path / "w")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = encoder(tmp_path_factory.mktemp("encoders") / kind, kind)
        return made[kind]

    return folder


def config_of(ws, kind, **changes):
    own = {"kind": kind, "learning_rate": RATES[kind], "kind_options": OPTIONS[kind]}
    return ws.settings.config.replace(**own | changes)


def rows_for(base_type, folder):
    """Twelve sentences or six images of two labels."""
    if base_type in TEXT:
        draw = np.random.default_rng(0)
        ids = [[0, 4 + i % 2, *draw.integers(6, 14, 3), 2] for i in range(12)]
        return [LabelledText(np.array(own, np.int32), i % 2) for i, own in enumerate(ids)]
    paths = sorted(squares(folder / "images", ("red", "blue"), 3, 0).rglob("*.png"))
    return [LabelledImage(str(path), int(path.parent.name == "red"), path.read_bytes)
            for path in paths]  # fmt: skip


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("kind", "base_type", "precision"), ABLE)
def test_what_trains_beside_the_head_is_what_is_stored(
    folders, tmp_path, kind, base_type, precision
):
    base = load_base(folders(base_type), precision, "cpu")
    before = snapshot(base.model)
    rows = rows_for(base_type, tmp_path)
    config = resolved(Config(kind=kind, steps=6, batch=6, learning_rate=RATES[kind],
                             weight_decay=0.1, head_learning_rate=1e-2))  # fmt: skip
    with (
        head_attached(base, fresh_head(base, ("a", "b"), 0)) as head,
        module_of(kind).training(base, config, steps=6) as own,
    ):
        training = with_head(own, head, 1e-2)
        assert not set(own.parameters) & set(head.parameters)
        fit(base, training.parameters, rows, config, steps=6, peak=config.learning_rate,
            training=training, steps_of=label_steps(base, config))  # fmt: skip
        during = label_losses(base, 2, rows, 6)
        weights, taught = own.weights(torch.float32), head.head(torch.float32)
    assert [n for n, _ in base.model.named_parameters()] == list(before)
    assert all(torch.equal(p, before[n]) for n, p in base.model.named_parameters())
    assert not any(p.requires_grad for p in base.model.parameters())
    behind = tuple(f"{name}." for name in head_names(base.model))
    assert not [name for name in weights.tensors if name.startswith(behind)]
    if kind == "full":
        still = [name for name, t in weights.tensors.items() if not t.any()]
        assert still == []
        left = {n for n in before if not n.startswith(behind)} - set(weights.tensors)
        assert left == ({"dinov2.embeddings.mask_token"} if base_type == "dinov2" else set())
    stored, _ = decode(encode(weights))
    with applied(base, stored), head_attached(base, taught):
        found = label_losses(base, 2, rows, 6)
    assert np.allclose(found, during, atol=1e-5 if precision == "fp32" else 1e-2)
    with head_attached(base, taught):
        assert np.abs(label_losses(base, 2, rows, 6) - during).max() > 2e-2


class Stopped(Exception):
    """The interruption."""


@pytest.mark.parametrize("kind", WHOLE)
def test_labels_are_learned_scored_audited_and_the_same_after_an_interruption(
    untaught, tmp_path, kind
):
    ws = copied(untaught, tmp_path / "whole")
    base = ws.base_model(resolved(config_of(ws, kind)))
    before = snapshot(base.model)
    (found,) = ws.train(["size"], config_of(ws, kind))
    assert ws.base_model(resolved(config_of(ws, kind))) is base
    assert all(torch.equal(p, before[n]) for n, p in base.model.named_parameters())
    facts = found.adapter.facts
    assert facts["last_loss"] < facts["first_loss"] / 2
    (score,) = found.scores
    assert score.value > 0.7  # of three labels
    weights = ws.stored(found.adapter)
    assert weights.heads["size"].labels == LABELS
    _, rows = ws.labelled(ws.store.task("size"), "eval")
    labelling = Labelling(base)
    with applied(base, weights), head_attached(base, weights.heads["size"]), torch.no_grad():
        logits = labelling.logits(labelling.batch(rows)).numpy()
    right = logits.argmax(1) == [row.label for row in rows]
    assert np.array_equal(ws.store.outcomes(score)[0], right.astype(np.float32))
    ws.score(["base"], ["size"])
    (told,) = [task for task in ws.audit().tasks if task.task == "size"]
    parent = {entry.subject: entry for entry in told.entries}["size@1"].parent
    assert (parent.against, parent.gained, parent.lost) == ("base", right.sum(), 0)
    assert list(ws.verify()) == []
    other = copied(untaught, tmp_path / "stopped")

    def stop(told):
        if told.phase.startswith("training") and told.step == 20:
            raise Stopped

    other.on_progress = stop
    with pytest.raises(Stopped):
        other.train(["size"], config_of(other, kind))
    other.on_progress = lambda told: None
    assert other.train(["size"], config_of(other, kind))[0].adapter.digest == found.adapter.digest
    with pytest.raises(InvalidInput, match=f"an export of kind `{kind}` needs a causal"):
        ws.export("size@1", tmp_path / "out")


@pytest.mark.parametrize("kind", WHOLE)
def test_a_further_training_begins_at_its_parent_and_merging_is_refused(ws, kind):
    brief = {"steps": 4, "store_dtype": "fp32"}
    (first,) = ws.train(["size"], config_of(ws, kind, **brief))
    still = config_of(ws, kind, **brief).replace(steps=1, learning_rate=1e-12)
    (second,) = ws.train(["other"], still, TrainOptions(start="size@1"))
    one, two = ws.stored(first.adapter), ws.stored(second.adapter)
    assert set(two.heads) == {"size", "other"}
    assert two.heads["size"].same_as(one.heads["size"])
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.allclose(t, two.tensors[n], atol=1e-6) for n, t in one.tensors.items())
    with pytest.raises(InvalidInput, match=f"size@1 is of kind `{kind}`.*cannot be merged"):
        ws.merge(["size@1", "other@1"], method="concat")


@pytest.mark.parametrize("kind", WHOLE)
def test_checkpointing_changes_nothing_but_memory(untaught, tmp_path, kind):
    tensors = []
    for checkpointing in ("off", "on"):
        ws = copied(untaught, tmp_path / checkpointing)
        config = config_of(ws, kind, steps=3, checkpointing=checkpointing)
        tensors.append(ws.stored(ws.train(["size"], config)[0].adapter).tensors)
    assert all(torch.allclose(t, tensors[1][n], rtol=1e-2) for n, t in tensors[0].items())


def test_full_trains_the_modules_named_and_never_the_head(ws):
    config = config_of(ws, "full", steps=2)
    (found,) = ws.train(["size"], config.replace(kind_options={"modules": "LayerNorm"}))
    names = ws.stored(found.adapter).tensors
    assert len(names) == 10  # weight and bias of one of the embeddings and two in each layer
    assert all(".LayerNorm." in name for name in names)
    model = ws.base_model(resolved(config)).model
    for name in head_names(model):
        refused = pytest.raises(InvalidInput, match=f"`modules` names '{name}', which matches no")
        with refused:
            full.find_places(model, name)
        with refused:
            ws.train(["size"], config.replace(kind_options={"modules": name}))


def test_a_difference_of_a_head_is_not_one_of_this_base(ws):
    (found,) = ws.train(["size"], config_of(ws, "full", steps=2))
    weights = ws.stored(found.adapter)
    model = ws.base_model(resolved(config_of(ws, "full"))).model
    weights.tensors["classifier.bias"] = torch.zeros(2)
    with pytest.raises(WrongBase, match=r"'classifier\.bias'.*no such parameter"):
        module_of("full").check(model, weights)


@pytest.mark.parametrize("base_type", ["bert", "roberta"])
def test_bottlenecks_stand_where_the_papers_put_them(folders, base_type):
    model = load_base(folders(base_type), "fp32", "cpu").model
    blocks = [f"{model.base_model_prefix}.encoder.layer.{i}" for i in range(2)]
    for placement, ends in {
        "houlsby": ("attention.output.dense", "output.dense"),
        "pfeiffer": ("output.dense",),
    }.items():
        places = bottleneck.find_places(model, placement)
        assert places == {f"{block}.{end}": 32 for block in blocks for end in ends}


@pytest.mark.parametrize(("base_type", "reason"), KINDS["bottleneck"].not_on.items())
def test_encoders_without_such_places_are_refused_before_anything_is_trained(
    folders, tmp_path, base_type, reason
):
    ws = Workspace.create(tmp_path / "w", str(folders(base_type)))
    expected = f"kind `bottleneck` does not train on {base_type}, since {reason}"
    for call in (
        lambda: ws.train(["size"], config_of(ws, "bottleneck")),
        lambda: ws.compare_kinds("size", ["lora", "bottleneck"], seeds=1),
    ):
        with pytest.raises(InvalidInput, match=expected):
            call()
    with pytest.raises(InvalidInput, match="bottleneck adapters"):
        bottleneck.find_places(load_base(folders(base_type), "fp32", "cpu").model, "houlsby")


def test_they_are_compared_with_low_rank_kinds_at_rates_of_their_own(ws):
    kinds = ["lora", *WHOLE]
    config = ws.settings.config.replace(steps=8)
    found = ws.compare_kinds(
        "size", kinds, seeds=1, search=RateSearch(points=1, full=2), config=config
    )
    assert [k.entry for k in found.kinds] == kinds
    assert found.missing == ()
    for kind in found.kinds:
        assert ws.adapter(kind.adapters[0]).config["learning_rate"] == kind.rate
        assert set(ws.stored(ws.adapter(kind.adapters[0])).heads) == {"size"}
    assert found.kinds[1].parameters < found.kinds[2].parameters


@pytest.mark.parametrize("kind", WHOLE)
def test_images_are_learned_too(tmp_path, kind):
    ws = workspace(tmp_path, "vit")
    images = squares(tmp_path / "images", ("red", "blue", "green"), 24, 0)
    ws.add_image_task("squares", images, eval_share=0.25)
    (found,) = ws.train(["squares"], config_of(ws, kind, steps=40, batch=16))
    assert found.scores[0].value > 0.8
    assert list(ws.verify()) == []
