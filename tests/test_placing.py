"""Layers chosen for a task in a workspace, and training that goes there."""

import dataclasses
import json
import math
import shutil

import pytest
from small_workspaces import DEFAULTS, copied, make_workspace

from lori_manager import feature_norms as norms
from lori_manager.errors import InvalidInput
from lori_manager.kinds import KINDS, Kind
from lori_manager.placing import PROMPTS, placed
from lori_manager.teaching import TrainOptions
from lori_manager.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def untaught(tiny_base, tmp_path_factory):
    """Three tasks, nothing placed or trained. Not to be changed."""
    return make_workspace(tmp_path_factory.mktemp("placing") / "ws", tiny_base)


@pytest.fixture
def ws(untaught, tmp_path):
    return copied(untaught, tmp_path / "ws")


def settings(ws, **changes):
    return dataclasses.replace(ws.settings.config, **changes)


def plop(ws, **changes):
    return settings(ws, targets=("plop:2",), **changes)


def types_of(ws, adapter):
    return {name.rsplit(".", 1)[-1] for name in ws.weights(adapter).updates()}


def forbid_scoring(monkeypatch):
    def refuse(*_):
        raise AssertionError("layers are scored again")

    monkeypatch.setattr(norms, "feature_norms", refuse)


def told(ws):
    lines = []
    ws.on_message = lines.append
    return lines


# Scores


def test_scores_are_those_of_the_drawn_prompts_alone(ws):
    found = ws.place("colour")
    task = ws.store.task("colour")
    rows, encoded = ws.rows(task, "train")
    prompts = norms.feature_norms(
        ws.base_model(ws.settings.config),
        [type(e)(e.ids[: e.prompt_length], e.prompt_length) for e in encoded],
        8,
    )
    assert len(rows) < PROMPTS  # so all of them were drawn
    assert found.scores == pytest.approx(prompts, rel=1e-5)
    assert (found.prompts, found.seed, found.precision) == (len(rows), 0, "fp32")
    assert found.tokens == sum(e.prompt_length for e in encoded)
    assert found.shapes == ws.base_model(ws.settings.config).linear_shapes


def test_a_draw_is_seeded_and_as_large_as_asked_for(ws):
    few = ws.place("colour", prompts=3)
    assert few.prompts == 3
    other = ws.place("colour", settings(ws, seed=1), prompts=3)
    assert other.scores != few.scores
    shutil.rmtree(ws.store.root / "placements")
    assert ws.place("colour", prompts=3) == few


def test_rows_without_a_prompt_are_scored_on_their_text(ws):
    path = ws.root / "text.jsonl"
    lines = ({"prompt": "", "completion": f"a piece of text {i}"} for i in range(9))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ws.add_task("text", train=str(path), eval=str(path), scorer="perplexity", allow_overlap=True,
                probe_rows=0)  # fmt: skip
    found = ws.place("text", prompts=2)
    assert found.tokens == 2 * (1 + len("a piece of text 0"))  # bytes, behind a first token


@pytest.mark.parametrize("count", [0, -1])
def test_no_prompts_are_refused(ws, count):
    with pytest.raises(InvalidInput, match=f"`prompts` must be at least 1, got {count}"):
        ws.place("colour", prompts=count)


def test_a_task_that_is_only_scored_is_refused(ws):
    ws.add_task("judged", eval=str(ws.root / "tasks" / "colour" / "eval.jsonl"))
    with pytest.raises(InvalidInput, match="'judged' has no train rows"):
        ws.place("judged")


# What is remembered


def test_what_was_scored_is_not_scored_again_not_even_for_another_top(ws, monkeypatch):
    first = ws.place("colour")
    forbid_scoring(monkeypatch)
    ws._model = None
    monkeypatch.setattr("lori_manager.models.load_base", None)
    assert Workspace.open(ws.root).place("colour") == first


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"precision": "bf16"}, {"prompts": 5}, {"rows": True}]
)
def test_another_draw_precision_or_revision_is_scored_anew(ws, monkeypatch, change):
    ws.place("colour")
    forbid_scoring(monkeypatch)
    prompts = change.pop("prompts", PROMPTS)
    if change.pop("rows", False):
        path = ws.root / "tasks" / "colour" / "train.jsonl"
        path.write_text(path.read_text() + '{"prompt": "colour 77:", "completion": " red"}\n')
        ws.add_task("colour", probe_rows=4)
    with pytest.raises(AssertionError, match="scored again"):
        ws.place("colour", settings(ws, **change), prompts=prompts)


def test_a_revision_of_the_same_rows_has_the_same_scores(ws, monkeypatch):
    first = ws.place("colour")
    forbid_scoring(monkeypatch)
    added = ws.add_task("colour", scorer="perplexity", probe_rows=4).task
    assert added.revision == 2
    assert ws.place("colour") == dataclasses.replace(first, task_revision=2)


def test_a_damaged_memory_is_scored_again(ws, caplog):
    first = ws.place("colour")
    (file,) = (ws.store.root / "placements").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    assert ws.place("colour") == first
    assert "layers are scored again" in caplog.text
    assert ws.place("colour") == first


# Training


def test_training_goes_to_the_chosen_layers_and_says_how_they_were_chosen(ws):
    lines = told(ws)
    (one,) = ws.train(["colour"], plop(ws))
    found = ws.place("colour")
    targets = found.targets(2)
    assert types_of(ws, one.adapter) == set(targets)
    assert one.adapter.config["targets"] == list(targets)
    facts = one.adapter.facts["placement"]
    assert facts["task"] == "colour#1"
    assert (facts["prompts"], facts["seed"]) == (found.prompts, 0)
    assert sorted(facts["scores"], key=facts["scores"].get)[:2] == list(targets)
    assert facts["scores"][targets[0]] == pytest.approx(found.types[0].score, abs=1e-4)
    assert f"layers for colour#1: {found.reason(2)}" in lines


def test_what_was_placed_is_what_naming_the_layers_gives(ws, tmp_path):
    other = copied(ws, tmp_path / "other")
    (placed,) = ws.train(["colour"], plop(ws))
    targets = ws.place("colour").targets(2)
    (named,) = other.train(["colour"], settings(other, targets=targets))
    assert placed.adapter.digest == named.adapter.digest
    assert "placement" not in named.adapter.facts


def test_each_task_has_layers_of_its_own(ws, monkeypatch):
    choices = {"colour": "q_proj", "shape": "up_proj"}

    def scores(base, rows, *_):
        said = base.tokenizer.decode(rows[0].ids).split()[0]
        return {n: 0.5 if n.endswith(choices[said]) else 1.0 for n in base.linear_shapes}

    monkeypatch.setattr(norms, "feature_norms", scores)
    trained = ws.train(["colour", "shape"], settings(ws, targets=("plop:1",)))
    assert [types_of(ws, one.adapter) for one in trained] == [{"q_proj"}, {"up_proj"}]


@pytest.mark.parametrize("projection", ["task", "orthogonal", "nullspace"])
def test_a_sequence_goes_where_its_first_task_does(ws, monkeypatch, projection):
    ws.train(["shape", "colour"], plop(ws, projection=projection), sequence="s")
    targets = ws.place("shape").targets(2)
    for adapter in ws.store.adapters("s"):
        assert types_of(ws, adapter) == set(targets)
        assert adapter.config["targets"] == list(targets)
        assert adapter.facts["placement"]["task"] == "shape#1"


def test_more_types_than_there_are_are_refused_and_claim_no_name(ws):
    with pytest.raises(
        InvalidInput, match=r"^the N of --targets plop:N must be from 1 to 7, .*got 8$"
    ):
        ws.train(["colour"], settings(ws, targets=("plop:8",)), sequence="s")
    assert "s" not in {line.name for line in ws.store.lines()}


def test_what_is_continued_stays_in_its_own_layers(ws, monkeypatch):
    ws.train(["colour"], settings(ws, targets=("q_proj", "down_proj")))
    forbid_scoring(monkeypatch)
    lines = told(ws)
    (one,) = ws.train(["shape"], plop(ws), TrainOptions(start="colour@1", line="on"))
    assert types_of(ws, one.adapter) == {"q_proj", "down_proj"}
    assert sorted(one.adapter.config["targets"]) == ["down_proj", "q_proj"]
    assert "placement" not in one.adapter.facts
    assert "colour@1 is continued in its own layers: nothing is placed" in lines


def test_what_is_continued_in_single_layers_is_recorded_by_their_names(ws):
    names = ("layers.0.self_attn.q_proj", "v_proj")
    ws.train(["colour"], settings(ws, targets=names))
    (one,) = ws.train(["shape"], plop(ws), TrainOptions(start="colour@1", line="on"))
    assert sorted(one.adapter.config["targets"]) == sorted(ws.weights(one.adapter).updates())


def test_a_block_beside_a_parent_goes_where_its_own_task_does(ws):
    ws.train(["colour"], settings(ws, targets=("q_proj",)))
    config = plop(ws, projection="orthogonal")
    (one,) = ws.train(["shape"], config, TrainOptions(start="colour@1", line="on"))
    assert types_of(ws, one.adapter) == {"q_proj", *ws.place("shape").targets(2)}
    assert one.adapter.facts["placement"]["task"] == "shape#1"


def test_lora_is_placed_as_lori_is(ws, monkeypatch):
    (one,) = ws.train(["colour"], plop(ws, kind="lora"))
    assert types_of(ws, one.adapter) == set(ws.place("colour").targets(2))
    forbid_scoring(monkeypatch)
    # Its blocks are continued, whatever the projection that counts for LoRI alone.
    config = plop(ws, kind="lora", projection="orthogonal")
    (more,) = ws.train(["shape"], config, TrainOptions(start="colour@1", line="on"))
    assert types_of(ws, more.adapter) == types_of(ws, one.adapter)


def test_kinds_that_take_no_targets_are_not_placed(ws, monkeypatch):
    forbid_scoring(monkeypatch)
    monkeypatch.setitem(KINDS, "whole", Kind("whole", "Whole", "", 1e-3, frozenset()))
    found = placed(ws, ws.store.task("colour"), plop(ws, kind="whole"))
    assert found.config == settings(ws, kind="whole")


def test_a_mask_is_calibrated_for_the_layers_that_training_takes(ws):
    mask = ws.calibrate("colour", plop(ws))
    (one,) = ws.train(["colour"], plop(ws))
    assert one.adapter.mask == mask.ref
    assert len(ws.store.masks("colour")) == 1


class Stopped(Exception):
    """Stands for a kill."""


def test_a_training_that_was_interrupted_goes_on_with_the_same_layers(ws, tmp_path, monkeypatch):
    other = copied(ws, tmp_path / "other")
    (whole,) = other.train(["colour"], plop(other, checkpoint_seconds=0))

    def stop(progress):
        if progress.phase == "training colour" and progress.step == 2:
            raise Stopped

    ws.on_progress = stop
    with pytest.raises(Stopped):
        ws.train(["colour"], plop(ws, checkpoint_seconds=0))
    ws.on_progress = lambda _: None
    forbid_scoring(monkeypatch)
    (one,) = ws.train(["colour"], plop(ws, checkpoint_seconds=0))
    assert one.adapter.digest == whole.adapter.digest


# Settings


def test_a_choice_becomes_the_default_of_the_workspace(ws):
    targets = ws.place("colour").targets(2)
    assert ws.apply_placement(targets) == ws.root / "lori.toml"
    assert ws.settings.config == settings(ws, targets=targets)
    assert ws.settings.config.rank == DEFAULTS["rank"]


def test_scores_are_of_the_scale_that_random_weights_have(ws):
    assert all(0.5 < s < 2 and math.isfinite(s) for s in ws.place("colour").scores.values())
