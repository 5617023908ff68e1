"""Diff: what two versions are made of, how they score, and what they answer to flipped rows."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_workspaces import DEFAULTS, copied

from lori_manager.context import Context
from lori_manager.differing import stored_answers
from lori_manager.engine.codec import encode_adapter
from lori_manager.engine.layers import attached, low_rank_layers
from lori_manager.engine.weights import AdapterWeights
from lori_manager.errors import InvalidInput, NotFound
from lori_manager.generation import completions
from lori_manager.records import NewAdapter, NewScore, Parent
from lori_manager.scoring import token_stats
from lori_manager.tasks.encoding import encode_rows
from lori_manager.tasks.rows import Row
from lori_manager.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")
NAN = float("nan")
SCORERS = {"words": "exact_match", "picks": "choice_accuracy", "nats": "perplexity",
           "shared": "token_f1"}  # fmt: skip
COLOURS = (" red", " tan", " sky")


def rows_of(task, count, offset=0):
    return [
        {"prompt": f"{task} {offset + i}:", "completion": COLOURS[i % 3], "choices": list(COLOURS)}
        for i in range(count)
    ]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def add_version(ws, line, seed, **changes):
    """An adapter of random weights, so that it answers in its own way."""
    weights = ws.weights(ws.adapter("words@1"))
    (block,) = weights.blocks
    draw = torch.Generator().manual_seed(seed)
    B = {n: torch.randn(b.shape, generator=draw) for n, b in block.B.items()}
    made = AdapterWeights((dataclasses.replace(block, B=B, mask=None),))
    base = ws.store.base().fingerprint
    fields = {
        "line": line, "origin": "trained", "task": "words", "task_revision": 1, "mask": None,
        "parents": (), "method": "lori-d", "rank": 4, "projection": None, "base": base,
        "config": {"steps": 4, "options": {"dense": True}}, "versions": {"torch": "1"},
    }  # fmt: skip
    return ws.store.add_adapter(NewAdapter(**fields | changes), encode_adapter(made, {}))


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    """A task by each kind of scorer, a trained adapter, two random ones, all scored."""
    folder = tmp_path_factory.mktemp("differing") / "ws"
    ws = Workspace.create(folder, str(tiny_base))
    lines = [f"{key} = {value}" for key, value in (DEFAULTS | {"score_batch": 4}).items()]
    (folder / "lori.toml").write_text("[defaults]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    for task, scorer in SCORERS.items():
        write(folder / "tasks" / task / "train.jsonl", rows_of(task, 24))
        write(folder / "tasks" / task / "eval.jsonl", rows_of(task, 12, 100))
        ws.add_task(task, scorer=scorer, probe_rows=4)
    ws.train(["words"])
    for seed in (1, 2):
        add_version(ws, "main", seed)
    ws.score(["main@1", "main@2", "base"], ["picks", "nats"])
    return ws


@pytest.fixture
def ws(made, tmp_path):
    ws = copied(made, tmp_path / "ws")
    ws.said = []
    ws.on_message = ws.said.append
    return ws


@pytest.fixture
def no_model(monkeypatch):
    def forbid():
        monkeypatch.setattr(Context, "base_model", lambda *_: pytest.fail("the model was loaded"))

    return forbid


def put(ws, ref, outcomes, task="words", **changes):
    """Outcomes as if lori had measured them, under a precision of their own."""
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


def only(found):
    (task,) = found.tasks
    return task


# What they are made of


def changed(found, kind=None):
    return {(c.of, c.name): (c.before, c.after) for c in found.changes if kind in (None, c.kind)}


def test_what_two_adapters_are_made_of_is_told_by_kind(ws):
    parent = ws.adapter("main@1")
    config = {"steps": 9, "options": {"dense": True, "replay": 3}}
    add_version(
        ws, "main", 3, task="picks", rank=8, config=config, versions={"torch": "2", "peft": "1"},
        parents=(Parent(parent.ref, parent.digest),),
    )  # fmt: skip
    found = ws.diff("main@1", "main@3", answers=False)
    assert found.relation == "main@3 was continued from main@1"
    told = changed(found, "adapter")
    assert told["", "rank"] == (4, 8)
    assert told["", "digest"] == (parent.digest, ws.adapter("main@3").digest)
    assert ("", "method") not in told
    assert changed(found, "member") == {("", "main"): (None, "main@1")}
    assert changed(found, "data") == {("", "picks"): (None, "picks#1")}
    assert changed(found, "config") == {
        ("", "steps"): (4, 9), ("", "options.replay"): (None, 3),
    }  # fmt: skip
    assert changed(found, "code") == {("", "torch"): ("1", "2"), ("", "peft"): (None, "1")}
    back = ws.diff("main@3", "main@1", answers=False)
    assert back.relation == found.relation
    assert changed(back) == {name: pair[::-1] for name, pair in changed(found).items()}


def test_of_two_merges_members_weights_and_what_changed_in_a_member_are_told(ws):
    write(ws.root / "tasks" / "words" / "train.jsonl", rows_of("words", 20))
    ws.add_task("words", scorer="exact_match", probe_rows=4)
    ws.train(["words"], config=ws.settings.config.replace(seed=5))
    ws.merge(["words@1", "main@1"], method="concat", into="all")
    ws.merge(["words@2", "main@2", "main@1"], method="ties", into="all")
    found = ws.diff("all@1", "all@2", answers=False)
    told = changed(found)
    assert told["", "method"] == ("concat", "ties")
    members = changed(found, "member")
    assert members["", "words"] == ("0.5 words@1", "0.3333 words@2")
    both = [(c.before, c.after) for c in found.changes if (c.kind, c.name) == ("member", "main")]
    assert both == [("0.5 main@1", "0.3333 main@1"), (None, "0.3333 main@2")]
    assert told["words@1 -> words@2", "seed"] == (0, 5)
    assert not {name for of, name in told if of} & {"digest", "words"}
    (data,) = [c for c in found.changes if c.kind == "data"]
    assert (data.before, data.after) == ("words#1", "words#1, words#2")
    assert data.note == "train: 1 rows came, 4 went; probe: 0 rows came, 1 went"


def test_settings_of_what_was_made_in_different_ways_are_not_compared(ws):
    ref = ws.merge(["words@1", "main@1"], method="concat", into="all").adapter.ref
    found = ws.diff("main@1", ref, answers=False)
    assert found.relation == f"main@1 is a member of {ref}"
    assert changed(found, "config") == {}
    assert changed(found)["", "origin"] == ("trained", "merged")


def test_the_same_version_on_both_sides_differs_in_nothing(ws, no_model):
    no_model()
    found = ws.diff("main@1", "main@1")
    assert found.changes == ()
    assert found.notes == ("main@1 and main@1 have the same weights",)
    assert all(t.gained == t.lost == 0 and t.difference.p == 1 for t in found.tasks)


# Scores and flipped rows


def test_rows_that_flipped_are_told_with_prompt_and_what_is_right(ws, no_model):
    put(ws, "main@1", [1, 1, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0])
    put(ws, "main@2", [1, 0, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0])
    no_model()
    found = only(ws.diff("main@1", "main@2", "words", answers=False))
    assert (found.gained, found.lost) == (1, 2)
    assert found.difference.change == pytest.approx(-1 / 12)
    assert found.difference.low < found.difference.change < found.difference.high
    assert [f.row for f in found.flips] == [1, 8, 3]  # the lost ones first
    assert [f.better for f in found.flips] == [False, False, True]
    keys = ws.store.eval_keys(ws.store.task("words"))
    for flip in found.flips:
        assert flip.key == keys[flip.row].hex()
        assert flip.prompt == f"words {100 + flip.row}:"
        assert flip.expected == COLOURS[flip.row % 3]
    # What was right is known without a model; what was wrong is not.
    assert [f.answer_before for f in found.flips] == [" tan", " sky", None]
    assert [f.answer_after for f in found.flips] == [None, None, " red"]


def test_of_many_rows_some_lost_and_some_gained_are_shown(ws):
    put(ws, "main@1", [1] * 6 + [0] * 6)
    put(ws, "main@2", [0] * 6 + [1] * 6)
    for limit, rows in {0: [], 1: [0], 4: [0, 1, 6, 7], 5: [0, 1, 2, 6, 7]}.items():
        found = only(ws.diff("main@1", "main@2", "words", rows=limit, answers=False))
        assert [f.row for f in found.flips] == rows
        assert (found.gained, found.lost) == (6, 6)
    put(ws, "base", [0, 1] + [0] * 10)
    found = only(ws.diff("main@1", "base", "words", rows=3, answers=False))
    assert [f.row for f in found.flips] == [0, 2, 3]
    with pytest.raises(InvalidInput, match="`rows` must be at least 0, got -1"):
        ws.diff("main@1", "base", rows=-1)


def test_rows_that_only_one_side_was_scored_on_are_told_and_not_compared(ws):
    put(ws, "main@1", [NAN, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    put(ws, "main@2", [1, 0, NAN, NAN, 1, 1, 1, 1, 1, 1, 1, 1])
    found = only(ws.diff("main@1", "main@2", "words", answers=False))
    assert (found.difference.rows, found.lost, found.gained) == (9, 1, 0)
    assert "2 rows were scored for main@1 alone and not compared" in found.notes
    assert "1 row was scored for main@2 alone and not compared" in found.notes


def test_without_a_common_revision_the_rows_of_both_are_compared(ws):
    put(ws, "main@1", [1, 1, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0])
    twelve = rows_of("words", 12, 100)
    write(ws.root / "tasks/words/eval.jsonl", [*rows_of("words", 2, 700), *twelve[4:], twelve[1]])
    ws.add_task("words", scorer="exact_match", probe_rows=4)
    outcomes = [1, 1, 0, 1, 0, 0, 0, 0, 1, 0, 0]  # two new rows, rows 4 to 11, row 1
    add_version(ws, "main", 4)
    put(ws, "main@3", outcomes)
    found = only(ws.diff("main@1", "main@3", "words", answers=False))
    assert found.task == "words#2"
    assert (found.difference.rows, found.gained, found.lost) == (9, 1, 3)
    assert [(f.row, f.prompt) for f in found.flips] == [
        (4, "words 106:"), (6, "words 108:"), (10, "words 101:"), (3, "words 105:"),
    ]  # fmt: skip
    assert any("scored on words#1, main@3 on words#2" in note for note in found.notes)
    assert "3 rows were scored for main@1 alone and not compared" in found.notes
    assert "2 rows were scored for main@3 alone and not compared" in found.notes
    heard = only(ws.diff("main@1", "main@3", "words", answers=True))
    assert all(None not in (f.answer_before, f.answer_after) for f in heard.flips)


def test_the_newest_revision_that_both_have_is_compared(ws):
    put(ws, "main@1", [1] * 12)
    put(ws, "main@2", [0] * 12)
    write(ws.root / "tasks/words/eval.jsonl", rows_of("words", 5, 700))
    ws.add_task("words", scorer="exact_match", probe_rows=4)
    put(ws, "main@2", [1] * 5)
    found = only(ws.diff("main@1", "main@2", "words", answers=False))
    assert (found.task, found.lost) == ("words#1", 12)
    assert found.notes == ("not both were scored on words#2, the latest revision",)
    put(ws, "main@1", [0] * 5)
    found = only(ws.diff("main@1", "main@2", "words", answers=False))
    assert (found.task, found.gained, found.notes) == ("words#2", 5, ())


def test_what_only_one_side_was_scored_on_says_what_to_run(ws):
    add_version(ws, "main", 4)
    found = only(ws.diff("main@3", "main@1", "picks"))
    assert found.before is None
    assert found.after.subject == "main@1"
    assert found.difference is None
    assert found.flips == ()
    assert found.notes == ("run `lori score main@3 --tasks picks`: not scored yet",)
    add_version(ws, "main", 5)
    assert ws.diff("main@3", "main@4").tasks == ()
    assert only(ws.diff("main@3", "main@4", "picks")).before is None
    with pytest.raises(NotFound):
        ws.diff("main@3", "main@4", "nowhere")


def test_scores_of_one_precision_are_preferred_and_others_told(ws):
    put(ws, "main@1", [0] * 12)
    put(ws, "main@2", [0] * 12)
    put(ws, "main@1", [1] * 12, precision="bf16")
    found = only(ws.diff("main@1", "main@2", "words", answers=False))
    assert found.before.precision == found.after.precision == "fp32"
    add_version(ws, "main", 4)
    put(ws, "main@3", [0] * 12, precision="bf16")
    assert only(ws.diff("main@1", "main@3", "words", answers=False)).lost == 12
    found = only(ws.diff("main@2", "main@3", "words", answers=False))
    assert "precision: main@2 fp32, main@3 bf16" in found.notes


def test_rows_weighted_differently_are_not_compared(ws):
    for ref, weight in (("main@1", 1.0), ("main@2", 2.0)):
        about = ws.store.task("nats")
        new = NewScore(ref, ws.adapter(ref).digest, "nats", 1, about.scorer, "1", "fp64", 1.0, 0.1,
                       12, facts={"higher_is_better": False})  # fmt: skip
        weights = np.arange(1, 13, dtype=np.float32) ** weight
        ws.store.add_score(new, np.linspace(0, 1, 12, dtype=np.float32), weights)
    found = only(ws.diff("main@1", "main@2", "nats"))
    assert found.difference is None
    assert found.flips == ()
    assert any("weighted differently" in note for note in found.notes)


# Answers


def said(ws, ref, task, numbers):
    """What the model writes now, by `generation` itself."""
    base = ws.base_model(ws.settings.config)
    encoded = ws.rows(ws.store.task(task), "eval")[1]
    layers = {}
    if ref != "base":
        layers = low_rank_layers(base.model, ws.weights(ws.adapter(ref)).updates())
    with attached(base.model, layers):
        most = max(len(e.ids) - e.prompt_length for e in encoded) + 16
        return [text for text, _ in completions(base, [encoded[i] for i in numbers], most, 4)]


def test_answers_to_flipped_rows_are_what_each_side_writes_and_are_kept(ws, no_model):
    put(ws, "main@1", [1, 1, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0])
    put(ws, "main@2", [1, 0, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0])
    found = only(ws.diff("main@1", "main@2", "words"))
    assert [f.row for f in found.flips] == [1, 8, 3]
    assert [f.answer_after for f in found.flips[:2]] == said(ws, "main@2", "words", [1, 8])
    assert [found.flips[2].answer_before] == said(ws, "main@1", "words", [3])
    assert "main@2 answers 2 rows of words#1, to be kept" in ws.said
    assert "main@1 answers 1 row of words#1, to be kept" in ws.said
    assert len({f.answer_after for f in found.flips}) > 1
    again = Workspace.open(ws.root)
    no_model()
    assert only(again.diff("main@1", "main@2", "words")) == found
    assert only(again.diff("main@1", "main@2", "words", answers=False)) == found


def test_a_report_shows_the_answers_that_are_known(ws, no_model):
    put(ws, "main@1", [1, 1, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0])
    put(ws, "main@2", [1, 0, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0])
    asked = [SimpleNamespace(task="words#1", index=i, before="main@1", after="main@2")
             for i in (1, 8, 3, 0)]  # fmt: skip
    assert [stored_answers(ws)(one) for one in asked] == [None] * 4
    found = only(ws.diff("main@1", "main@2", "words"))
    no_model()
    told = [stored_answers(ws)(one) for one in asked]
    assert told == [*((f.answer_before, f.answer_after) for f in found.flips), None]
    assert told[0][0] == found.flips[0].expected


def test_of_choices_the_answer_is_the_one_that_was_taken(ws, no_model):
    found = only(ws.diff("base", "main@1", "picks"))
    assert len(found.flips) >= 2
    for flip in found.flips:
        for answer, outcome in ((flip.answer_before, flip.before), (flip.answer_after, flip.after)):
            assert answer in COLOURS
            assert (answer == flip.expected) == (outcome == 1)
    no_model()
    assert only(ws.diff("base", "main@1", "picks")) == found
    wrong = [f for f in found.flips if f.before == 0]
    base = ws._model
    for flip in wrong:
        rows = [Row(flip.prompt, colour) for colour in COLOURS]
        encoded = encode_rows(base.tokenizer, rows, max_length=64, context=128)
        likelihood = [-float(s.nll[:-1].sum()) for s in token_stats(base, encoded, 4)]
        assert flip.answer_before == COLOURS[int(np.argmax(likelihood))]


def test_numbers_are_told_by_how_far_they_moved_and_nothing_is_run(ws, no_model):
    no_model()
    found = only(ws.diff("main@1", "main@2", "nats", rows=5))
    assert not found.higher_is_better
    assert found.difference.gained is None
    moved = [abs(f.after - f.before) for f in found.flips]
    assert moved == sorted(moved, reverse=True)
    assert len(moved) == 5
    assert all(f.better == (f.after < f.before) for f in found.flips)
    assert all(f.answer_before is f.answer_after is None for f in found.flips)
    assert found.gained + found.lost == 12


def test_of_generated_text_both_answers_are_asked_for(ws):
    put(ws, "main@1", [0.5] * 12, "shared")
    put(ws, "main@2", [1.0, 0.25] + [0.5] * 10, "shared")
    found = only(ws.diff("main@1", "main@2", "shared"))
    assert [(f.row, f.better) for f in found.flips] == [(0, True), (1, False)]
    assert [f.answer_before for f in found.flips] == said(ws, "main@1", "shared", [0, 1])
    assert [f.answer_after for f in found.flips] == said(ws, "main@2", "shared", [0, 1])


def test_outcomes_measured_elsewhere_do_not_stand_for_answers(ws):
    put(ws, "main@1", [1] + [0] * 11, origin="elsewhere", precision="")
    put(ws, "main@2", [0] * 12, origin="elsewhere", precision="")
    (flip,) = only(ws.diff("main@1", "main@2", "words")).flips
    assert [flip.answer_before] == said(ws, "main@1", "words", [0])
    assert flip.answer_before != flip.expected


def test_a_routed_adapter_answers_each_row_by_its_member(ws):
    write(ws.root / "train.jsonl", rows_of("zebra", 24))
    write(ws.root / "eval.jsonl", [*rows_of("zebra", 6, 500), *rows_of("words", 6, 500)])
    ws.add_task("zebra", train=ws.root / "train.jsonl", eval=ws.root / "eval.jsonl",
                probe_rows=4, scorer="exact_match")  # fmt: skip
    add_version(ws, "main", 3, task="zebra")
    ref = ws.merge(["main@1", "main@3"], method="routed", into="all").adapter.ref
    put(ws, "base", [1] * 12, "zebra")
    for member in ("main@1", "main@3"):
        put(ws, member, [0] * 12, "zebra")
    told = {}
    for subject in (ref, "main@1", "main@3"):
        found = only(ws.diff("base", subject, "zebra"))
        told[subject] = [flip.answer_after for flip in found.flips]
    goes = ws.routed(ref).route([flip.prompt for flip in found.flips])
    assert set(goes) == {"words", "zebra"}
    assert all(a != b for a, b in zip(told["main@1"], told["main@3"], strict=True))
    own = {"words": told["main@1"], "zebra": told["main@3"]}
    assert told[ref] == [own[name][row] for row, name in enumerate(goes)]


def test_where_the_base_is_gone_answers_are_left_out_unless_asked_for(ws):
    put(ws, "main@1", [1] + [0] * 11)
    put(ws, "main@2", [0] * 12)
    copy = Workspace.open(ws.root)
    with copy.store._db.write() as connection:
        connection.exec_driver_sql("UPDATE base SET path = '/nowhere', source = '/nowhere'")
    found = copy.diff("main@1", "main@2", "words")
    assert only(found).flips[0].answer_after is None
    assert found.notes[0].startswith("answers that were not known are left out: ")
    with pytest.raises(NotFound):
        copy.diff("main@1", "main@2", "words", answers=True)


def test_all_of_it_becomes_plain_json(ws):
    put(ws, "main@1", [NAN] + [1] * 11)
    put(ws, "main@2", [1] + [0] * 11)
    found = ws.diff("main@1", "main@2")
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [t["task"] for t in told["tasks"]] == ["words#1", "picks#1", "nats#1"]
    assert told["tasks"][0]["flips"][0]["expected"] == found.tasks[0].flips[0].expected
    assert told["changes"][0]["name"] == found.changes[0].name
