"""Kinds compared, layers placed, settings suggested and costs measured on encoders."""

import json
import math

import numpy as np
import pytest
import torch
from encoders import FILLERS, IMAGES, TEXT, encoder, sentences, squares, write_jsonl
from PIL import Image
from small_workspaces import copied

from lori_manager.adapters.heads import fresh_head, head_attached
from lori_manager.classification import label_losses
from lori_manager.errors import InvalidInput
from lori_manager.feature_norms import feature_norms
from lori_manager.kind_comparison import RateSearch
from lori_manager.models import load_base, resolve_targets
from lori_manager.probing import halves, probe, probing_mask, untaught_loss, with_rate
from lori_manager.tasks.labelled import LabelledImage, LabelledText
from lori_manager.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {
    "rank": 8, "alpha": 16.0, "steps": 80, "calibration_steps": 10, "batch": 32,
    "learning_rate": 3e-2, "head_learning_rate": 1e-2,
}  # fmt: skip
LABELS = ("big", "old", "tiny")
KINDS = ["lori", "lora", "svfit"]
SEARCH = RateSearch(points=2, full=0)


def with_settings(ws):
    lines = [f"{key} = {json.dumps(value)}" for key, value in SETTINGS.items()]
    (ws.root / "lori.toml").write_text("[defaults]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return ws


@pytest.fixture(scope="module")
def untaught(tmp_path_factory):
    """A task of three labels on BERT."""
    home = tmp_path_factory.mktemp("bert")
    ws = with_settings(Workspace.create(home / "w", str(encoder(home / "base", "bert"))))
    rows = sentences(LABELS, 300, 1, FILLERS[0])
    train, held = (write_jsonl(home / f"{name}.jsonl", part) for name, part in
                   (("train", rows[:240]), ("eval", rows[240:])))  # fmt: skip
    ws.add_task("size", train=str(train), eval=str(held), probe_rows=0)
    return ws


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A task of three labels on ViT."""
    home = tmp_path_factory.mktemp("vit")
    ws = with_settings(Workspace.create(home / "w", str(encoder(home / "base", "vit"))))
    ws.add_image_task("squares", squares(home / "images", ("red", "blue", "green"), 12, 0))
    return ws


@pytest.fixture(scope="module")
def compared(untaught, tmp_path_factory):
    ws = copied(untaught, tmp_path_factory.mktemp("compared") / "w")
    return ws, ws.compare_kinds("size", KINDS, seeds=1, search=SEARCH)


@pytest.fixture
def ws(untaught, tmp_path):
    return copied(untaught, tmp_path / "w")


def phases(ws, call):
    """What the call did, by the names of its phases."""
    seen = {}
    ws.on_progress = lambda told: seen.setdefault(told.phase)
    try:
        found = call()
    finally:
        ws.on_progress = lambda told: None
    return found, list(seen)


# Comparing


def test_kinds_are_searched_trained_and_scored_by_the_tasks_own_scorer(compared):
    ws, found = compared
    assert (found.scorer, found.rows, found.steps) == ("label_accuracy", 60, 80)
    assert [k.entry for k in found.kinds] == KINDS
    assert max(k.value for k in found.kinds) > 0.7  # of three labels
    for kind in found.kinds:
        assert len(kind.tried) == 2
        assert all(0 < loss < 2 for _, loss in kind.tried)
        assert kind.rate == min(dict(kind.tried), key=dict(kind.tried).get)
        assert kind.adapters == (f"size.{kind.entry}@1",)
        adapter = ws.adapter(f"size.{kind.entry}@1")
        assert adapter.config["learning_rate"] == kind.rate
        assert set(ws.stored(adapter).heads) == {"size"}
        assert kind.parameters == adapter.facts["parameters"]
    assert {k.against.seeds for k in found.kinds[1:]} == {1}
    assert found.missing == ()
    assert list(ws.verify()) == []


def test_given_again_it_trains_nothing_and_a_further_kind_joins(compared, tmp_path):
    ws = copied(compared[0], tmp_path / "w")
    again, seen = phases(ws, lambda: ws.compare_kinds("size", KINDS, seeds=1, search=SEARCH))
    assert seen == []
    assert again == compared[1]
    more, seen = phases(
        ws, lambda: ws.compare_kinds("size", ["lora", "ia3"], seeds=1, search=SEARCH)
    )
    assert more.digest == again.digest
    assert not any("lora" in phase for phase in seen)
    assert more.kinds[1].seeds == (0,)


def test_interrupted_it_goes_on_to_the_same_adapters(compared, ws):
    class Stopped(Exception):
        pass

    def stop(told):
        if told.phase == "training size":
            raise Stopped

    ws.on_progress = stop
    with pytest.raises(Stopped):
        ws.compare_kinds("size", KINDS, seeds=1, search=SEARCH)
    found, seen = phases(ws, lambda: ws.compare_kinds("size", KINDS, seeds=1, search=SEARCH))
    assert not any("at rate" in phase for phase in seen)
    for kind, other in zip(found.kinds, compared[1].kinds, strict=True):
        assert kind.tried == other.tried
        ref = kind.adapters[0]
        assert ws.adapter(ref).digest == compared[0].adapter(ref).digest


@pytest.mark.parametrize("kind", ["prefix"])
def test_a_kind_that_does_not_train_on_encoders_is_refused_before_anything_is_trained(ws, kind):
    with pytest.raises(InvalidInput, match=f"kind `{kind}` needs a causal language model; the "
                       "base of this workspace is a text encoder"):  # fmt: skip
        ws.compare_kinds("size", ["lora", kind], seeds=1, search=SEARCH)
    config = ws.settings.config.replace(kind=kind)
    with pytest.raises(InvalidInput, match=f"kind `{kind}` needs a causal language model"):
        ws.suggest("size", config=config)
    config = ws.settings.config.replace(projection="nullspace")
    with pytest.raises(InvalidInput, match="`projection` nullspace needs a causal"):
        ws.compare_kinds("size", ["lora", "lori"], seeds=1, search=SEARCH, config=config)
    assert ws.store.kind_comparisons() == []


def test_a_probe_trains_layers_and_head_and_is_judged_row_by_row(ws):
    task = ws.store.task("size")
    config = with_rate(ws.settings.config, 3e-2)
    parts = halves(ws, task, config)
    assert (len(parts.rows), len(parts.held)) == (180, 60)
    assert {id(row) for row in parts.rows}.isdisjoint(id(row) for row in parts.held)
    found = probe(ws, task, config, parts, steps=30)
    kept = sum(int(m.sum()) for m in probing_mask(ws, task, config, parts, 30).values())
    base = ws.base_model(config)
    head = fresh_head(base, task.labels, config.seed)
    assert found.parameters == kept + sum(t.numel() for t in head.tensors.values())
    assert found.loss == pytest.approx(found.by_row.mean())
    assert found.tokens.tolist() == [1.0] * 60
    head_alone = probe(ws, task, with_rate(config, 1e-9), parts, steps=30).loss
    assert found.loss < head_alone - 0.05
    frozen = config.replace(head_learning_rate=1e-9)
    assert found.loss < probe(ws, task, frozen, parts, steps=30).loss - 0.05
    assert probe(ws, task, config.replace(learning_rate=1e30, clip=0.0, warmup=0.0), parts,
                 steps=4).loss == math.inf  # fmt: skip


def test_losses_of_labels_are_torchs_and_the_head_trains_from_where_train_begins(ws):
    task = ws.store.task("size")
    config = with_rate(ws.settings.config, 1e-12).replace(head_learning_rate=1e-12)
    parts = halves(ws, task, config)
    base = ws.base_model(config)
    rows, model = parts.held, base.model
    with head_attached(base, fresh_head(base, task.labels, config.seed)):
        losses = label_losses(base, 3, rows, 7)
        expected = [
            torch.nn.functional.cross_entropy(
                model(
                    input_ids=torch.as_tensor(row.ids, dtype=torch.long)[None],
                    token_type_ids=torch.as_tensor(row.segments, dtype=torch.long)[None],
                ).logits,
                torch.tensor([row.label]),
            ).item()
            for row in rows
        ]
    assert losses == pytest.approx(expected, rel=1e-4)
    found = probe(ws, task, config, parts, steps=1)
    assert found.by_row == pytest.approx(expected, rel=1e-4)


# Placing


def alone(row, size=None):
    """A row's model inputs without padding, written anew."""
    if isinstance(row, LabelledText):
        ids = torch.as_tensor(row.ids, dtype=torch.long)[None]
        segments = {} if row.segments is None else {
            "token_type_ids": torch.as_tensor(row.segments, dtype=torch.long)[None]
        }  # fmt: skip
        return {"input_ids": ids, **segments}
    import io

    image = Image.open(io.BytesIO(row.read())).resize((16, 16), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)
    return {"pixel_values": ((pixels / 255 - 0.5) / 0.5)[None]}


def by_hooks(folder, names, rows):
    """NFN of the named layers of the transformers model itself, token by token in float64."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    inner = {name: name.split(".", 1)[1] for name in names}  # without the encoder's own name
    ratios = {name: [] for name in names}

    def see(name):
        weight = model.get_submodule(inner[name]).weight.detach().double().numpy()
        usual = np.linalg.norm(weight) / math.sqrt(weight.shape[1])

        def hook(_, given):
            for token in given[0].detach().double().numpy().reshape(-1, weight.shape[1]):
                length = np.linalg.norm(token)
                if length:
                    ratios[name].append(np.linalg.norm(weight @ (token / length)) / usual)

        return hook

    hooks = [model.get_submodule(inner[n]).register_forward_pre_hook(see(n)) for n in names]
    with torch.no_grad():
        for row in rows:
            model(**alone(row))
    for hook in hooks:
        hook.remove()
    return {name: float(np.mean(own)) for name, own in ratios.items()}


def test_scores_of_texts_are_those_of_their_tokens_without_padding(untaught):
    found = untaught.place("size", prompts=10**6)
    _, rows = untaught.labelled(untaught.store.task("size"), "train")
    assert len({row.length for row in rows}) > 3
    expected = by_hooks(untaught.base_folder, list(found.scores), rows)
    assert found.scores == pytest.approx(expected, rel=1e-4)
    assert len(found.scores) == 12
    assert (found.prompts, found.tokens) == (240, sum(row.length for row in rows))
    assert {one.name for one in found.types} == {
        "query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense",
    }  # fmt: skip
    for top in range(1, 7):
        modules = sorted(m for one in found.chosen(top) for m in one.modules)
        assert resolve_targets(found.shapes, found.targets(top)) == modules
    assert "answer this task's texts least" in found.reason(2)


def test_scores_of_images_are_those_of_patches_and_class_token(seeing):
    found = seeing.place("squares", prompts=9)
    assert (found.prompts, found.tokens, found.read) == (9, 0, "9 images")
    _, rows = seeing.labelled(seeing.store.task("squares"), "train")
    every = seeing.place("squares", prompts=len(rows))
    assert every.scores == pytest.approx(by_hooks(seeing.base_folder, list(every.scores), rows),
                                         rel=1e-4)  # fmt: skip
    assert every.scores != found.scores


@pytest.mark.parametrize("kind", [*TEXT, *IMAGES])
def test_every_encoder_is_scored_or_says_why_not(kind, tmp_path):
    base = load_base(encoder(tmp_path / kind, kind), "fp32", "cpu")
    draw = np.random.default_rng(0)
    if kind in TEXT:
        rows = [LabelledText(draw.integers(4, 20, n).astype(np.int32), 0) for n in (5, 9, 5)]
    else:
        own = sorted(squares(tmp_path / "images", ("red",), 3, 0).rglob("*.png"))
        rows = [LabelledImage(path.name, 0, path.read_bytes) for path in own]
    if kind == "deberta-v2":  # its keys and queries read relative positions, too
        for few in (rows, rows[:1]):
            with pytest.raises(InvalidInput, match=r"_proj is called on \d+ of \d+ tokens"):
                feature_norms(base, few, 3)
        return
    found = feature_norms(base, rows, 3)
    assert found.keys() == base.linear_shapes.keys()
    assert found == pytest.approx(by_hooks(base.folder, list(found), rows), rel=1e-3)


def test_training_goes_to_the_layers_that_are_chosen(ws):
    config = ws.settings.config.replace(targets=("plop:2",), steps=2, calibration_steps=1)
    (one,) = ws.train(["size"], config)
    found = ws.place("size")
    assert one.adapter.config["targets"] == list(found.targets(2))
    modules = {m for taken in found.chosen(2) for m in taken.modules}
    assert set(ws.weights(one.adapter).updates()) == modules
    compared = ws.compare_kinds("size", ["lora"], seeds=1, config=config,
                                search=RateSearch(points=1, full=0))  # fmt: skip
    assert set(ws.weights(ws.adapter(compared.kinds[0].adapters[0])).updates()) == modules


# Suggesting


def test_settings_are_suggested_within_the_time_and_train(ws):
    config = ws.settings.config.replace(steps=16, calibration_steps=4)
    found = ws.suggest("size", budget=60, config=config)
    assert found.seconds < 60
    assert [c.setting for c in found.choices] == [
        "learning_rate", "targets", "rank", "sparsity", "steps",
    ]  # fmt: skip
    assert any("PLoP's" in c.why for c in found.choices)
    assert {p.what for p in found.probes} == {"time", "rate", "layers", "size", "steps"}
    assert (found.held, found.untaught) == (60, "the labels' shares alone")
    assert min(p.loss for p in found.probes) < found.base_loss
    assert ws.store.adapters() == []
    (one,) = ws.train(["size"], config.replace(**found.changes))
    assert one.adapter.config["rank"] == found.changes["rank"]


def test_without_training_is_knowing_how_common_labels_are(ws):
    task = ws.store.task("size")
    parts = halves(ws, task, ws.settings.config)
    words = [task.labels[row.label] for row in parts.rows]
    shares = [(words.count(label) + 1) / (len(words) + 3) for label in LABELS]
    expected = -sum(math.log(shares[row.label]) for row in parts.held) / len(parts.held)
    assert untaught_loss(ws, task, parts, ws.settings.config) == pytest.approx(expected)


def test_where_layers_have_no_score_the_configured_ones_are_kept(tmp_path):
    ws = with_settings(Workspace.create(tmp_path / "w",
                                        str(encoder(tmp_path / "base", "deberta-v2"))))  # fmt: skip
    rows = sentences(LABELS, 60, 1)
    train, held = write_jsonl(tmp_path / "t.jsonl", rows[:40]), write_jsonl(tmp_path / "e.jsonl",
                                                                            rows[40:])  # fmt: skip
    ws.add_task("size", train=str(train), eval=str(held))
    config = ws.settings.config.replace(steps=2, kind="lora")
    found = ws.suggest("size", budget=60, config=config)
    (targets,) = [c for c in found.choices if c.setting == "targets"]
    assert targets.value == ["all-linear"]
    assert "_proj is called on" in targets.why


# Measuring


def test_a_batch_is_measured_alone_apart_and_merged(compared, tmp_path):
    ws = copied(compared[0], tmp_path / "w")
    base = ws.base_model(ws.settings.config)
    before = {n: p.clone() for n, p in base.model.named_parameters()}
    found = ws.bench(["size.lori@1", "size.svfit@1"], rows=70, repeats=1)
    assert [(u.ref, u.way) for u in found.uses] == [
        ("base", "alone"), ("size.lori@1", "apart"), ("size.lori@1", "merged"),
        ("size.svfit@1", "apart"), ("size.svfit@1", "merged"),
    ]  # fmt: skip
    assert all(u.batch_seconds > 0 for u in found.uses)
    assert {(u.prefill_seconds, u.token_seconds) for u in found.uses} == {(None, None)}
    for switch in found.switches:
        assert min(switch.load, switch.attach, switch.detach, switch.merge, switch.unmerge) > 0
    _, rows = ws.labelled(ws.store.task("size"), "eval")
    assert found.rows == 70  # more than there are: some twice
    assert found.prompt_tokens == sum(row.length for row in [*rows, *rows[:10]])
    assert found.tokens is None
    after = dict(base.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with pytest.raises(InvalidInput, match="`--tokens` needs a causal language model"):
        ws.bench(["size.lori@1"], tokens=4)


def test_what_is_measured_runs_the_adapter_and_its_own_head(compared, tmp_path, monkeypatch):
    from lori_manager.labelling import Labelling

    ws = copied(compared[0], tmp_path / "w")
    logits, seen = Labelling.logits, []

    def see(self, batch):
        seen.append(logits(self, batch).argmax(1))
        return logits(self, batch)

    monkeypatch.setattr(Labelling, "logits", see)
    ws.bench(["size.svfit@1"], rows=60, repeats=1)
    monkeypatch.undo()
    _, rows = ws.labelled(ws.store.task("size"), "eval")
    right = torch.tensor([row.label for row in rows])
    score = ws.score(["size.svfit@1"], ["size"])[0].value
    calls = len(seen) // 3
    base, apart, merged = ((seen[i * calls] == right).float().mean().item() for i in range(3))
    assert apart == merged == pytest.approx(score)
    assert base < score


def test_images_are_measured_too(seeing, tmp_path):
    ws = copied(seeing, tmp_path / "w")
    ws.train(["squares"], ws.settings.config.replace(steps=2, calibration_steps=1))
    found = ws.bench(["squares@1"], rows=2, repeats=1)
    assert (found.prompt_tokens, found.tokens) == (None, None)
    assert [u.way for u in found.uses] == ["alone", "apart", "merged"]
