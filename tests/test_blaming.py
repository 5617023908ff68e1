"""Blame: the member of a merge, or the stage of a sequence, that a task was lost by."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from small_workspaces import DEFAULTS, WORDS, copied, write_rows

from lori_manager import remerging
from lori_manager.context import Context, library_versions
from lori_manager.engine.codec import encode_adapter
from lori_manager.engine.weights import AdapterWeights
from lori_manager.errors import InvalidInput, NotFound
from lori_manager.metrics.multiple import holm
from lori_manager.records import NewAdapter, NewScore, Parent
from lori_manager.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")
MEMBERS = ["colour@1", "shape@1", "vandal@1"]


def add_vandal(ws):
    """An adapter of no task that drowns what others say."""
    weights = ws.weights(ws.adapter("colour@1"))
    (block,) = weights.blocks
    draw = torch.Generator().manual_seed(5)
    B = {n: 1.0 * torch.randn(b.shape, generator=draw) for n, b in block.B.items()}
    noise = AdapterWeights((dataclasses.replace(block, B=B, mask=None),))
    base = ws.store.base().fingerprint
    new = NewAdapter("vandal", "imported", None, None, None, (), "lora", 4, None, base)
    return ws.store.add_adapter(new, encode_adapter(noise, {"base": base}))


@pytest.fixture(scope="module")
def taught(tiny_base, tmp_path_factory):
    """Two tasks scored by perplexity with an adapter each, a vandal, and all three merged."""
    folder = tmp_path_factory.mktemp("blaming") / "ws"
    ws = Workspace.create(folder, str(tiny_base))
    lines = [f"{key} = {value}" for key, value in (DEFAULTS | {"steps": 12}).items()]
    (folder / "lori.toml").write_text("[defaults]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    for task in WORDS:
        write_rows(folder / "tasks" / task / "train.jsonl", task, 24)
        write_rows(folder / "tasks" / task / "eval.jsonl", task, 12, 100)
        write_rows(folder / "tasks" / task / "probe.jsonl", task, 18, 200)
        ws.add_task(task, scorer="perplexity")
    ws.train(["colour", "shape"])
    add_vandal(ws)
    ws.merge(MEMBERS, method="concat")
    return ws


@pytest.fixture
def ws(taught, tmp_path):
    ws = copied(taught, tmp_path / "ws")
    ws.said = []
    ws.on_message = ws.said.append
    return ws


@pytest.fixture
def no_model(monkeypatch):
    """From the call on, whatever wants the model or a merge fails."""

    def refuse(*_args, **_kwargs):
        pytest.fail("the model was loaded")

    def forbid():
        monkeypatch.setattr(Context, "base_model", refuse)
        monkeypatch.setattr(remerging.Remade, "_make", refuse)

    return forbid


def by_member(found, how="dropped"):
    return {s.ref: s for s in found.suspects if s.how == how}


# Members


def test_the_member_that_drowns_the_others_is_named(ws):
    found = ws.blame("main@1", "shape")
    assert (found.kind, found.task, found.own.subject) == ("merge", "shape#1", "shape@1")
    assert found.loss.worse
    assert found.loss.real
    assert [s.ref for s in found.suspects] == ["vandal@1", "colour@1"]  # shape@1 stays in
    assert found.suspects[0].verdict == "cause" != found.suspects[1].verdict
    assert found.cause == "vandal@1"
    vandal, colour = found.suspects
    assert not vandal.change.worse
    assert vandal.change.change < colour.change.change
    # On the way from the own adapter to the merge: own + left = merge + change.
    for suspect in found.suspects:
        assert found.own.value + suspect.left.change == pytest.approx(suspect.value)
        assert found.score.value + suspect.change.change == pytest.approx(suspect.value)
    assert [s.p for s in found.suspects] == list(holm([s.change.p for s in found.suspects]))


def test_what_is_tried_is_what_a_merge_made_anew_would_be(ws):
    found = ws.blame("main@1", "shape", halve=True)
    dropped = ws.merge_again("main@1", drop=["vandal@1"]).adapter
    halved = ws.merge_again("main@1", reweight={"colour@1": 1 / 6}).adapter
    value = {s.subject: s.value for s in ws.store.scores(task="shape")}
    assert by_member(found)["vandal@1"].value == value[dropped.ref]
    assert by_member(found, "halved")["colour@1"].value == value[halved.ref]
    assert value[dropped.ref] != value[halved.ref] != found.score.value
    assert [s.how for s in found.suspects] == ["dropped"] * 2 + ["halved"] * 2


def test_a_merge_that_was_made_by_hand_is_not_scored_again(ws, monkeypatch):
    ws.merge_again("main@1", drop=["vandal@1"])
    ws.merge_again("main@1", drop=["colour@1"])
    monkeypatch.setattr(remerging, "run_weights", lambda *_: pytest.fail("scored again"))
    assert ws.blame("main@1", "shape").cause == "vandal@1"


def test_the_second_time_nothing_is_loaded_merged_or_scored(ws, no_model):
    first = ws.blame("main@1", "shape", halve=True)
    assert "4 merges to make and score on 12 rows of shape#1" in ws.said
    again = Workspace.open(ws.root)
    no_model()
    assert again.blame("main@1", "shape", halve=True) == first
    # What is dropped is known alone, too.
    assert again.blame("main@1", "shape").suspects == first.suspects[:2]
    with pytest.raises(pytest.fail.Exception):
        again.blame("main@1", "colour")


def test_outcomes_of_another_precision_do_not_count(ws, no_model):
    first = ws.blame("main@1", "shape")
    config = ws.settings.config.replace(precision="bf16")
    other = ws.blame("main@1", "shape", config=config)
    assert other.score.precision == "bf16"
    assert other.suspects != first.suspects
    no_model()
    assert ws.blame("main@1", "shape", config=config) == other
    assert ws.blame("main@1", "shape", config=config.replace(precision="fp32")) == first


def test_weights_that_were_chosen_are_kept(ws):
    refs = ["colour@1", "shape@1", "vandal@1"]
    ref = ws.merge(refs, method="concat", weights=[0.2, 0.9, 0.1]).adapter.ref
    found = by_member(ws.blame(ref, "shape"))
    assert {ref: s.weight for ref, s in found.items()} == {"colour@1": 0.2, "vandal@1": 0.1}
    dropped = ws.merge_again(ref, drop=["colour@1"])
    assert [p.weight for p in dropped.adapter.parents] == [0.9, 0.1]
    assert found["colour@1"].value == ws.store.scores(subject=dropped.adapter.ref)[-1].value


def test_a_task_that_no_member_knows_is_measured_against_the_base(ws):
    found = ws.blame("main@1", "size")
    assert found.own.subject == "base"
    assert {s.ref for s in found.suspects} == set(MEMBERS)
    assert found.suspects[0].ref == "vandal@1"
    assert "no member was trained on size: measured against base" in found.notes


def test_of_two_members_that_know_the_task_each_is_tried(ws):
    ws.train(["shape"], config=ws.settings.config.replace(seed=1))
    ref = ws.merge(["shape@1", "shape@2", "vandal@1"], method="concat").adapter.ref
    found = ws.blame(ref, "shape")
    assert {s.ref for s in found.suspects} == {"shape@1", "shape@2", "vandal@1"}
    value = {s.subject: s.value for s in ws.store.scores(task="shape")}
    assert value["shape@1"] != value["shape@2"]
    assert found.own.value == min(value["shape@1"], value["shape@2"])  # lower is better


def test_a_merge_fitted_to_rows_that_changed_is_made_anew_as_a_whole(ws):
    ref = ws.merge(["colour@1", "shape@1"], method="layerwise").adapter.ref
    before = ws.blame(ref, "shape", halve=True)
    assert before.notes == ()
    write_rows(ws.root / "tasks" / "colour" / "probe.jsonl", "colour", 18, 400)
    ws.add_task("colour", scorer="perplexity")
    after = ws.blame(ref, "shape", halve=True)
    assert any("rows of colour changed since" in note for note in after.notes)
    assert after.score.digest == before.score.digest
    whole = ws.merge_again(ref).adapter
    assert whole.digest != after.score.digest
    anew = ws.store.scores(subject=whole.ref, task="shape")[-1].value
    assert after.score.value != anew
    for suspect in after.suspects:
        assert anew + suspect.change.change == pytest.approx(suspect.value)
    # Alone, shape@1 is itself on any rows; together with half of colour@1 it is not.
    values = [[s.value for s in found.suspects] for found in (before, after)]
    assert values[0][0] == values[1][0]
    assert values[0][1] != values[1][1]


def test_another_library_alone_changes_nothing_where_the_merge_comes_out_the_same(ws, monkeypatch):
    found = ws.blame("main@1", "shape")
    versions = library_versions() | {"torch": "9.9"}
    monkeypatch.setattr(remerging, "library_versions", lambda: versions)
    ws.said.clear()
    other = ws.blame("main@1", "shape")
    assert "3 merges to make and score on 12 rows of shape#1" in ws.said  # the whole, too
    assert (other.notes, other.suspects) == ((), found.suspects)


def test_a_merge_that_was_searched_for_can_be_blamed(ws):
    ref = ws.merge(["colour@1", "shape@1"], method="concat", weights="search").adapter.ref
    with pytest.raises(InvalidInput, match="merge afresh"):
        ws.merge_again(ref, drop=["colour@1"])
    (suspect,) = ws.blame(ref, "shape").suspects
    assert suspect.weight == ws.adapter(ref).parents[0].weight


def test_of_a_routed_merge_it_is_told_where_prompts_go(ws):
    ref = ws.merge(["colour@1", "shape@1"], method="routed").adapter.ref
    found = ws.blame(ref, "shape")
    held_out = ws.adapter(ref).facts["routing"]["held_out"]
    assert found.kind == "routed"
    assert found.routed == {"colour@1": held_out[1][0], "shape@1": held_out[1][1]}
    assert sum(found.routed.values()) > 0
    assert found.suspects == ()
    assert found.cause is None
    assert "one member acts on each prompt" in found.notes[0]


def test_a_damaged_outcome_is_measured_again(ws):
    first = ws.blame("main@1", "shape")
    with ws.store._db.write() as connection:
        connection.exec_driver_sql("UPDATE trials SET outcomes = X'00112233445566' WHERE id = 1")
    assert ws.blame("main@1", "shape") == first
    with ws.store._db.read() as connection:
        count = connection.exec_driver_sql("SELECT count(*) FROM trials").scalar_one()
    assert count == 2


@pytest.mark.parametrize(
    ("ref", "options", "told"),
    [
        ("colour@1", {}, "made in one step from the base"),
        ("vandal@1", {}, "made in one step from the base"),
        ("base", {}, "`base` is not an adapter"),
        ("main@1", {"general": "README"}, "read no general text of its own"),
    ],
)
def test_what_cannot_be_blamed_is_refused(ws, tmp_path, ref, options, told):
    if options:
        options = {"general": tmp_path / "text.txt"}
        options["general"].write_text("words")
    with pytest.raises(InvalidInput, match=told):
        ws.blame(ref, "shape", **options)


def test_a_merge_of_one_is_refused(ws):
    ref = ws.merge(["colour@1"]).adapter.ref
    with pytest.raises(InvalidInput, match="made of one member"):
        ws.blame(ref, "colour")


# Stages


RIGHT = {  # of 12 rows, by stage
    "base": [0] * 12,
    "both@1": [1] * 11 + [0],
    "both@2": [1] * 2 + [0] * 10,
    "both@3": [1] * 2 + [0] * 9 + [1],
}


@pytest.fixture
def staged(ws):
    """Three stages, of which the second loses the task; outcomes are as above."""
    ws.add_task("colour", scorer="exact_match")
    base = ws.store.base().fingerprint
    parents = ()
    for number, task in enumerate(("colour", "shape", "size"), 1):
        new = NewAdapter(
            "both", "trained", task, ws.store.task(task).revision, None, parents, "lori-s", 4,
            None, base, sequence=True,
        )  # fmt: skip
        adapter = ws.store.add_adapter(new, f"stage {number}".encode())
        parents = (Parent(adapter.ref, adapter.digest),)
    return ws


def put(ws, ref, outcomes, task="colour", **changes):
    about = ws.store.task(task)
    digest = ws.store.base().fingerprint if ref == "base" else ws.adapter(ref).digest
    values = np.array(outcomes, np.float32)
    fields = {
        "subject": ref, "digest": digest, "task": task, "task_revision": about.revision,
        "scorer": about.scorer, "scorer_version": "1", "precision": "fp32",
        "value": float(np.nanmean(values)), "error": 0.1, "rows": len(values),
        "facts": {"higher_is_better": True},
    }  # fmt: skip
    return ws.store.add_score(NewScore(**fields | changes), values)


def test_the_stage_that_lost_the_task_is_named_from_stored_scores(staged, no_model):
    for ref, outcomes in RIGHT.items():
        put(staged, ref, outcomes)
    no_model()
    found = staged.blame("both@3", "colour")
    assert (found.kind, found.task, found.own.subject) == ("stages", "colour#2", "both@1")
    assert [s.ref for s in found.suspects] == ["both@2", "both@3"]
    assert [s.task for s in found.suspects] == ["shape", "size"]
    assert [s.change.lost for s in found.suspects] == [9, 0]
    assert [s.change.gained for s in found.suspects] == [0, 1]
    assert [s.verdict for s in found.suspects] == ["cause", ""]
    assert found.cause == "both@2"
    assert found.loss.change == pytest.approx(-8 / 12)
    assert found.suspects[0].p == pytest.approx(2 * found.suspects[0].change.p)


def test_a_stage_without_a_score_is_told_and_its_loss_is_the_next_ones(staged):
    put(staged, "both@1", RIGHT["both@1"])
    put(staged, "both@3", RIGHT["both@3"])
    found = staged.blame("both@3", "colour")
    assert [s.ref for s in found.suspects] == ["both@3"]
    assert "not scored on colour: both@2" in found.notes[0]
    assert "lori score both@2 --tasks colour" in found.notes[0]


def test_without_a_score_of_the_end_nothing_can_be_said(staged):
    put(staged, "both@1", RIGHT["both@1"])
    with pytest.raises(
        NotFound, match=r"both@3 was not scored on colour.*lori score both@2 both@3"
    ):
        staged.blame("both@3", "colour")


def test_stages_are_compared_in_one_precision(staged):
    for ref, outcomes in RIGHT.items():
        put(staged, ref, outcomes)
    put(staged, "both@2", [1] * 12, precision="bf16")  # newer, and alone
    assert staged.blame("both@3", "colour").cause == "both@2"


def test_a_task_that_was_never_taught_is_measured_from_the_base_on(staged):
    about = staged.add_task("other", train=staged.root / "tasks/size/train.jsonl",
                            eval=staged.root / "tasks/size/eval.jsonl").task  # fmt: skip
    assert about.name == "other"
    for ref, outcomes in RIGHT.items():
        put(staged, ref, outcomes, "other")
    found = staged.blame("both@3", "other")
    assert found.own.subject == "base"
    assert [s.ref for s in found.suspects] == ["both@1", "both@2", "both@3"]
    assert [s.verdict for s in found.suspects] == ["helps", "cause", ""]


def test_what_taught_the_task_last_has_nothing_after_it(staged):
    put(staged, "both@1", RIGHT["both@1"])
    put(staged, "both@2", RIGHT["both@2"], "shape")
    found = staged.blame("both@2", "shape")
    assert found.suspects == ()
    assert found.cause is None
    assert "nothing came after" in found.notes[0]


def test_members_options_are_refused_for_stages(staged):
    with pytest.raises(InvalidInput, match="go with merges"):
        staged.blame("both@3", "colour", halve=True)


def test_all_of_it_becomes_plain_json(ws, staged):
    for ref, outcomes in RIGHT.items():
        put(staged, ref, outcomes)
    for found in (ws.blame("main@1", "shape"), staged.blame("both@3", "colour")):
        told = json.loads(json.dumps(found.to_json(), allow_nan=False))
        assert told["cause"] == found.cause
        assert [s["ref"] for s in told["suspects"]] == [s.ref for s in found.suspects]
        assert told["suspects"][0]["change"]["p"] == found.suspects[0].change.p
