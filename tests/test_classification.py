"""Tasks of labels in a workspace whose base is an encoder."""

import json
import math

import numpy as np
import pytest
import torch
from encoders import FILLERS, encoder, sentences, write_jsonl
from small_workspaces import copied, make_workspace

from lori_manager.adapters.applying import applied
from lori_manager.adapters.heads import head_attached
from lori_manager.answering import NO_HEAD
from lori_manager.engine.codec import encode
from lori_manager.errors import BadData, InvalidInput
from lori_manager.kinds import KINDS
from lori_manager.labelling import Labelling
from lori_manager.teaching import TrainOptions
from lori_manager.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {
    "rank": 8, "alpha": 16.0, "steps": 100, "calibration_steps": 20, "batch": 32,
    "learning_rate": 3e-2, "head_learning_rate": 1e-2, "checkpoint_seconds": 0.0,
}  # fmt: skip
LABELS = {"colour": ("blue", "red"), "size": ("big", "old", "tiny")}


def made(folder, base, **settings):
    ws = Workspace.create(folder, str(base))
    lines = [f"{key} = {json.dumps(value)}" for key, value in (SETTINGS | settings).items()]
    (folder / "lori.toml").write_text("[defaults]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    for task, labels in LABELS.items():
        rows = sentences(labels, 700, len(task), FILLERS[task == "size"])
        write_jsonl(folder / "tasks" / task / "train.jsonl", rows[:600])
        write_jsonl(folder / "tasks" / task / "eval.jsonl", rows[600:])
        ws.add_task(task, probe_rows=32)
    return ws


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return encoder(tmp_path_factory.mktemp("encoders") / "roberta", "roberta")


@pytest.fixture(scope="module")
def untaught(base_folder, tmp_path_factory):
    return made(tmp_path_factory.mktemp("labels") / "w", base_folder)


@pytest.fixture(scope="module")
def taught(untaught, tmp_path_factory):
    ws = copied(untaught, tmp_path_factory.mktemp("taught") / "w")
    ws.train(["colour", "size"])
    return ws


@pytest.fixture
def ws(untaught, tmp_path):
    return copied(untaught, tmp_path / "w")


@pytest.fixture
def done(taught, tmp_path):
    return copied(taught, tmp_path / "w")


def brief(ws, **changes):
    return ws.settings.config.replace(steps=6, calibration_steps=2, **changes)


def value(ws, ref, task):
    return ws.score([ref], [task])[0].value


def test_lori_learns_labels_and_says_so_row_by_row(taught):
    for task in LABELS:
        (score,) = taught.score([f"{task}@1"], [task])
        assert score.value > 0.9
        assert (score.rows, score.scorer) == (100, "label_accuracy")
    adapter = taught.adapter("size@1")
    stored = taught.stored(adapter)
    assert stored.heads["size"].labels == LABELS["size"]
    task = taught.store.task("size")
    _, rows = taught.labelled(task, "eval")
    base = taught.base_model(taught.settings.config)
    labelling = Labelling(base)
    with applied(base, stored), head_attached(base, stored.heads["size"]), torch.no_grad():
        logits = labelling.logits(labelling.batch(rows)).numpy()
    right = logits.argmax(1) == [row.label for row in rows]
    (score,) = taught.score(["size@1"], ["size"])
    assert np.array_equal(taught.store.outcomes(score)[0], right.astype(np.float32))


def test_the_adapter_and_its_head_both_do_their_part(untaught, tmp_path):
    values = {}
    for name, rates in {"head": (1e-7, 1e-2), "adapter": (3e-2, 1e-7)}.items():
        ws = copied(untaught, tmp_path / name)
        config = ws.settings.config.replace(learning_rate=rates[0], head_learning_rate=rates[1])
        values[name] = ws.train(["colour"], config)[0].scores[0].value
    assert values["head"] < 0.9 < values["adapter"]


def test_what_has_no_head_for_a_task_answers_nothing(done):
    told = []
    done.on_message = told.append
    assert value(done, "base", "colour") == value(done, "size@1", "colour") == 0.0
    assert "size@1 has no head for colour: it answers nothing there" in told
    done.add_task("colour", scorer="label_nll", probe_rows=32)
    assert value(done, "base", "colour") == pytest.approx(math.log(2))
    assert value(done, "colour@1", "colour") < math.log(2) / 2


def test_labels_are_frozen_with_the_task_and_sorted(untaught):
    for name, labels in LABELS.items():
        task = untaught.store.task(name)
        assert task.labels == labels
        assert task.options["labels"] == list(labels)
    assert untaught.store.base().model_type == "roberta"
    assert untaught.architecture.title == "text encoder"


ABLE = [name for name, kind in KINDS.items() if kind.encoders]


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - set(ABLE)))
def test_kinds_that_do_not_train_on_encoders_say_so(ws, kind):
    with pytest.raises(InvalidInput, match=f"kind `{kind}` needs a causal language model"):
        ws.train(["colour"], brief(ws, kind=kind))


@pytest.mark.parametrize("kind", [name for name in ABLE if not KINDS[name].low_rank])
def test_an_export_of_what_is_no_low_rank_update_is_refused(ws, kind, tmp_path):
    ws.train(["colour"], brief(ws, kind=kind))
    with pytest.raises(InvalidInput, match=f"an export of kind `{kind}` needs a causal"):
        ws.export("colour@1", tmp_path / "out")


@pytest.mark.parametrize("kind", ABLE)
def test_every_kind_that_trains_on_encoders_carries_a_head_and_goes_on(untaught, tmp_path, kind):
    whole = copied(untaught, tmp_path / "whole")
    config = brief(whole, kind=kind)
    (first,) = whole.train(["colour"], config)
    stored = whole.stored(first.adapter)
    assert set(stored.heads) == {"colour"}
    assert encode(stored, {"base": whole.store.base().fingerprint})
    ws = copied(untaught, tmp_path / "stopped")

    class Stopped(Exception):
        pass

    def stop(told):
        if told.phase.startswith("training") and told.step == 3:
            raise Stopped

    ws.on_progress = stop
    with pytest.raises(Stopped):
        ws.train(["colour"], config)
    ws.on_progress = lambda told: None
    assert ws.train(["colour"], config)[0].adapter.digest == first.adapter.digest
    other = copied(untaught, tmp_path / "other")
    assert other.train(["colour"], config.replace(seed=1))[0].adapter.digest != first.adapter.digest


def test_a_sequence_carries_the_heads_of_its_stages(ws):
    first, second = ws.train(["colour", "size"], brief(ws), sequence="s")
    heads = [ws.stored(stage.adapter).heads for stage in (first, second)]
    assert [set(own) for own in heads] == [{"colour"}, {"colour", "size"}]
    assert heads[1]["colour"].same_as(heads[0]["colour"])
    scores = {(s.subject, s.task): s.value for s in first.scores + second.scores}
    assert scores["s@1", "size"] == 0.0
    assert ws.audit().sequences[0].line == "s"


def test_training_goes_on_with_the_parents_head_for_the_same_labels(done):
    (again,) = done.train(["colour"], brief(done, head_learning_rate=1e-9),
                          TrainOptions(start="colour@1"))  # fmt: skip
    heads = [done.stored(done.adapter(ref)).heads["colour"] for ref in ("colour@1", "colour@2")]
    assert heads[0].same_as(heads[1])
    assert again.adapter.parents[0].ref == "colour@1"


@pytest.mark.parametrize("method", ["concat", "tsv", "regmean", "layerwise"])
def test_a_merge_keeps_each_tasks_head_and_most_of_what_its_members_know(done, method):
    merged = done.merge([], names=["colour", "size"], method=method)
    weights = done.stored(merged.adapter)
    for task in LABELS:
        own = done.stored(done.adapter(f"{task}@1")).heads[task]
        assert weights.heads[task].same_as(own)
    scores = {s.task: s.value for s in merged.scores if s.subject == merged.adapter.ref}
    assert min(scores.values()) > (0.9 if method in ("regmean", "layerwise") else 0.6)
    assert list(done.verify()) == []


def test_layerwise_is_the_usual_method_for_encoders_too(done):
    assert done.merge(["colour@1", "size@1"]).adapter.method == "layerwise"


def test_two_heads_for_one_task_are_not_merged(done):
    done.train(["colour"], brief(done, seed=3))
    with pytest.raises(InvalidInput, match="two of the members have a head for task 'colour'"):
        done.merge(["colour@1", "colour@2"], method="concat")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "routed"}, "`--method routed`"),
        ({"method": "repair"}, "`--method repair`"),
        ({"method": "auto"}, "`--method auto`"),
        ({"method": "concat", "weights": "search"}, "`--weights search`"),
        ({"method": "layerwise", "options": {"general": 0.5}}, "`--general`"),
    ],
)
def test_merging_that_needs_words_is_refused_in_one_sentence(done, options, named):
    with pytest.raises(InvalidInput, match=f"{named}.* needs a causal language model"):
        done.merge(["colour@1", "size@1"], **options)


def test_other_things_that_need_words_are_refused(done, tmp_path):
    needs = "needs a causal language model; the base of this workspace is a text encoder"
    with pytest.raises(InvalidInput, match=f"`--replay` {needs}"):
        done.train(["size"], brief(done), TrainOptions(start="colour@1", replay=4))
    with pytest.raises(InvalidInput, match=f"`projection` nullspace {needs}"):
        done.train(["size"], brief(done, projection="nullspace"))
    with pytest.raises(InvalidInput, match=f"--lm-eval {needs}"):
        done.add_task("arc", lm_eval="arc_easy")
    with pytest.raises(InvalidInput, match=f"a dry run reads probe prompts and {needs}"):
        done.forecast(["colour@1", "size@1"])
    with pytest.raises(InvalidInput, match=f"`--format full` {needs}"):
        done.export("colour@1", tmp_path / "full", full=True)
    with pytest.raises(InvalidInput, match=f"importing PEFT adapters {needs}"):
        done.import_adapters([tmp_path])
    with pytest.raises(InvalidInput, match="scorer `exact_match` reads tokens, which a text enc"):
        done.add_task("colour", scorer="exact_match")
    assert len(done.store.adapters()) == 2


def test_labels_need_an_encoder(tiny_base, tmp_path):
    ws = make_workspace(tmp_path / "w", tiny_base)
    with pytest.raises(InvalidInput, match="`label_accuracy` reads labels, which a causal lang"):
        ws.add_task("colour", scorer="label_accuracy")
    with pytest.raises(InvalidInput, match="--task names a head"):
        ws.export(ws.train(["colour"])[0].adapter.ref, tmp_path / "out", task="colour")


def test_an_export_asks_whose_head_it_is_to_have_and_peft_gives_its_logits(done, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    ref = done.merge(["colour@1", "size@1"], method="concat").adapter.ref
    with pytest.raises(InvalidInput, match=f"whose head goes with {ref}; it has: colour, size"):
        done.export(ref, tmp_path / "out")
    folder = done.export(ref, tmp_path / "out", task="size")
    told = json.loads((folder / "labels.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(
        done.base_folder, dtype=torch.float32, **told
    )
    peft = PeftModel.from_pretrained(model, folder).eval()
    assert list(peft.config.id2label.values()) == list(LABELS["size"])
    weights = done.stored(done.adapter(ref))
    base = done.base_model(done.settings.config)
    labelling = Labelling(base)
    given = labelling.batch(done.labelled(done.store.task("size"), "eval")[1])
    with torch.no_grad():
        theirs = peft(**given.inputs).logits
        with applied(base, weights), head_attached(base, weights.heads["size"]):
            ours = labelling.logits(given)
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
    assert "Labels: big, old, tiny" in (folder / "README.md").read_text()


def test_diff_shows_labels_and_audit_and_report_read_outcomes(done):
    done.score(["base"])
    found = done.diff("base", "size@1", "size", rows=5).tasks[0]
    assert found.gained > 90
    for flip in found.flips:
        assert flip.answer_before == NO_HEAD
        assert flip.answer_after == flip.expected
    done.train(["size"], brief(done))
    worse = done.diff("size@1", "size@2", "size", rows=100).tasks[0]
    lost = [flip for flip in worse.flips if not flip.better]
    assert lost
    for flip in lost:
        assert flip.answer_after in LABELS["size"]
        assert flip.answer_after != flip.expected == flip.answer_before
    (one,) = [found for found in done.audit().tasks if found.task == "size"]
    assert one.scorer == "label_accuracy"
    assert [task.name for task in done.report().tasks] == ["colour", "size"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "red box", "label": "far"}, r"no training row has the label 'far'.*blue, red"),
        ({"text": "red box"}, "`label` must be a printable word"),
        ({"text": "red box", "label": 0.5}, "`label` must be a printable word.*found a number"),
        ({"text": "red box", "label": " red"}, "`label` must be"),
        ({"text": " ", "label": "red"}, "`text` must be text"),
        ({"prompt": "red box", "completion": "red"}, "`text` must be text"),
        ({"text": "red box", "label": "red", "text_pair": 3}, "`text_pair` must be text"),
        ({"text": "red box", "label": "red", "choices": ["red", "blue"]}, "the field `choices`"),
    ],
)
def test_rows_that_carry_no_usable_label_are_refused_by_file_and_line(ws, row, problem):
    file = write_jsonl(ws.root / "bad.jsonl", [{"text": "blue ball", "label": "blue"}, row])
    with pytest.raises(BadData, match=f"bad.jsonl, line 2: .*{problem}"):
        ws.add_task("colour", eval=str(file), train=str(ws.root / "tasks/colour/train.jsonl"))
    assert ws.store.task("colour").revision == 1


def test_one_label_alone_is_no_task(ws):
    file = write_jsonl(ws.root / "one.jsonl", [{"text": "blue ball", "label": "blue"}])
    with pytest.raises(BadData, match="every row has the label 'blue'"):
        ws.add_task("one", eval=str(file))


def test_numbers_and_truth_values_are_labels(ws):
    for name, labels in {"number": (0, 1, 10), "truth": (False, True)}.items():
        rows = [{"text": f"red {i}", "label": labels[i % len(labels)]} for i in range(6)]
        task = ws.add_task(name, eval=str(write_jsonl(ws.root / f"{name}.jsonl", rows))).task
        assert task.labels == tuple(sorted(map(json.dumps, labels)))


def test_rows_of_two_texts_share_a_prompt_only_where_both_are_the_same(ws):
    def pairs(seconds):
        return [{"text": "red box", "text_pair": s, "label": "ab"[i]} for i, s in seconds]

    train = write_jsonl(ws.root / "train.jsonl", pairs([(0, "big"), (1, "old")] * 20))
    fresh = write_jsonl(ws.root / "fresh.jsonl", pairs([(0, "tiny"), (1, "by")]))
    same = write_jsonl(ws.root / "same.jsonl", pairs([(0, "tiny"), (1, "old")]))
    with pytest.raises(BadData, match="1 of 2 eval rows share their prompt"):
        ws.add_task("pairs", train=str(train), eval=str(same))
    task = ws.add_task("pairs", train=str(train), eval=str(fresh)).task
    assert ws.train(["pairs"], brief(ws))[0].scores[0].rows == 2
    assert {row.length for row in ws.labelled(task, "eval")[1]} == {6}


def test_a_new_revision_with_other_labels_gets_a_new_head(done):
    rows = sentences(("blue", "red", "green"), 100, 3)
    file = str(write_jsonl(done.root / "more.jsonl", rows[:80]))
    done.add_task("colour", train=file, eval=str(write_jsonl(done.root / "e.jsonl", rows[80:])))
    assert value(done, "colour@1", "colour") > 0.3  # it answers with the labels that it knows
    (new,) = done.train(["colour"], brief(done), TrainOptions(start="colour@1"))
    assert done.stored(new.adapter).heads["colour"].labels == ("blue", "green", "red")
