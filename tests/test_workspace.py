"""What names, masks, continuing, sequences, scores and merges mean, through the Python API."""

import dataclasses
import json
import os
import sqlite3
import subprocess
import sys

import pytest
import torch
from small_workspaces import WORDS, copied, make_workspace, object_file, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from lori_manager import models
from lori_manager.context import Context
from lori_manager.errors import Conflict, InvalidInput, NotFound, StorageFailed
from lori_manager.refs import BASE, parse_mask_ref
from lori_manager.teaching import TrainOptions
from lori_manager.workspace import Workspace


@pytest.fixture(scope="module")
def untaught(tiny_base, tmp_path_factory):
    """Three tasks, nothing trained. Not to be changed."""
    return make_workspace(tmp_path_factory.mktemp("untaught") / "ws", tiny_base)


@pytest.fixture(scope="module")
def taught(untaught, tmp_path_factory):
    """colour@1, shape@1, their merge main@1 and the sequence both@1, both@2. Not to be changed."""
    workspace = copied(untaught, tmp_path_factory.mktemp("taught") / "ws")
    workspace.train(["colour", "shape"])
    workspace.merge([], names=["colour", "shape"])
    workspace.train(["colour", "shape"], sequence="both")
    return workspace


@pytest.fixture
def fresh(untaught, tmp_path):
    return copied(untaught, tmp_path / "fresh")


@pytest.fixture
def ws(taught, tmp_path):
    return copied(taught, tmp_path / "ws")


def settings(workspace, **changes):
    return dataclasses.replace(workspace.settings.config, **changes)


def block(workspace, ref):
    """The one block of a stored adapter."""
    (only,) = workspace.weights(workspace.adapter(ref)).blocks
    return only


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def same_outside(mask, before, after):
    """Whether no bit of B changed where the mask is False."""
    return all(torch.equal(bits(before[n])[~mask[n]], bits(after[n])[~mask[n]]) for n in before)


def logits(workspace, ref):
    from lori_manager.engine.layers import attached, low_rank_layers

    base = workspace.base_model(workspace.settings.config)
    layers = {}
    if ref != BASE:
        updates = workspace.weights(workspace.adapter(ref)).updates()
        layers = low_rank_layers(base.model, updates)
    with attached(base.model, layers), torch.no_grad():
        return base.model(input_ids=IDS).logits


def largest_difference(a, b):
    """The largest difference over the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


IDS = torch.arange(60).reshape(3, 20) * 3 % 250


def findings(workspace):
    return [(f.kind, f.subject) for f in workspace.verify()]


# Names and references


def test_references_by_version_latest_and_alias_mean_adapters(ws):
    ws.train(["colour"], settings(ws, seed=1))
    ws.set_alias("colour@1", "good")
    refs = ("colour@1", "colour@2", "colour@latest", "colour", "colour@good", "both@1")
    assert [ws.adapter(ref).ref for ref in refs] == [
        "colour@1", "colour@2", "colour@2", "colour@2", "colour@1", "both@1",
    ]  # fmt: skip
    with pytest.raises(NotFound, match="good"):
        ws.adapter("shape@good")
    with pytest.raises(InvalidInput, match="base"):
        ws.adapter("base")


def test_a_task_means_the_latest_adapter_trained_on_it_alone(ws):
    ws.train(["shape"], options=TrainOptions(start="colour@1"))
    assert ws.adapter("shape@2").parents[0].ref == "colour@1"
    assert ws.task_adapter("shape").ref == "shape@1"
    ws.train(["shape"], options=TrainOptions(start="shape@1"))
    assert ws.task_adapter("shape").ref == "shape@3"


def test_a_task_means_its_champion_if_it_has_one(ws):
    ws.train(["shape"], options=TrainOptions(start="colour@1"))
    ws.set_alias("shape@2", "champion")
    assert ws.task_adapter("shape").ref == "shape@2"
    ws.set_alias("shape@1", "champion")
    assert ws.task_adapter("shape").ref == "shape@1"


def test_a_task_never_means_a_stage_of_a_sequence(fresh):
    fresh.train(["colour", "shape"], sequence="both")
    with pytest.raises(NotFound, match="lori train colour"):
        fresh.task_adapter("colour")


def test_commands_with_task_names_say_which_adapter_they_mean(ws):
    told = []
    ws.on_message = told.append
    ws.merge([], names=["colour"], into="copy")
    ws.score(["shape"], ["shape"])
    assert "colour means colour@1" in told
    assert "shape means shape@1" in told


def test_a_name_is_a_tasks_or_a_lines_but_not_both(ws, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", "size", 4)
    for line in ("main", "both"):
        with pytest.raises(Conflict):
            ws.add_task(line, eval=str(rows))
    for options in ({"line": "shape"}, {"line": "size"}):
        with pytest.raises(Conflict, match="own line"):
            ws.train(["colour"], options=TrainOptions(**options))
    with pytest.raises(Conflict, match="own line"):
        ws.train(["colour", "shape"], sequence="size")
    with pytest.raises(Conflict, match="own line"):
        ws.merge(["colour@1", "shape@1"], into="size")
    with pytest.raises(Conflict, match="sequence"):
        ws.merge(["colour@1", "shape@1"], into="both")


def test_nothing_but_its_own_stages_is_put_on_the_line_of_a_sequence(ws):
    with pytest.raises(Conflict, match="both"):
        ws.train(["size"], options=TrainOptions(line="both"))
    assert ws.store.line("both").versions == 2
    assert ws.store.open_runs() == []


def test_a_line_gathers_versions_that_are_never_renumbered(ws):
    before = ws.adapter("colour@1")
    for seed in (1, 2):
        ws.train(["colour"], settings(ws, seed=seed), TrainOptions(line="other"))
    ws.train(["shape"], options=TrainOptions(line="other"))
    assert [(a.ref, a.task) for a in ws.store.adapters("other")] == [
        ("other@1", "colour"), ("other@2", "colour"), ("other@3", "shape"),
    ]  # fmt: skip
    assert ws.adapter("colour@1") == before
    assert ws.store.line("other").task is None


# Tasks


def test_changed_rows_make_a_revision_and_scores_of_the_old_one_do_not_count(ws):
    old = ws.score(["colour@1"], ["colour"])[0]
    write_rows(ws.root / "tasks" / "colour" / "eval.jsonl", "colour", 10, 200)
    added = ws.add_task("colour", probe_rows=4)
    assert (added.task.ref, added.new) == ("colour#2", True)
    assert not ws.add_task("colour", probe_rows=4).new
    new = ws.score(["colour@1"], ["colour"])[0]
    assert (old.task_revision, old.rows, new.task_revision, new.rows) == (1, 8, 2, 10)
    audited = {a.ref: a for a in ws.audit("colour@1", task="colour").tasks}
    assert not audited["colour#1"].latest
    assert all(e.rows == 8 for e in audited["colour#1"].entries)
    assert [(e.subject, e.rows) for e in audited["colour#2"].entries] == [("colour@1", 10)]


def test_a_mask_of_the_old_revision_is_not_taken_for_the_new_one(ws):
    write_rows(ws.root / "tasks" / "colour" / "train.jsonl", "colour", 30)
    ws.add_task("colour", probe_rows=4)
    made = ws.train(["colour"])[0].adapter
    assert made.mask != ws.adapter("colour@1").mask
    mask = next(m for m in ws.store.masks("colour") if m.ref == made.mask)
    assert (made.task_revision, mask.task_revision) == (2, 2)


def test_probe_rows_are_neither_trained_nor_scored(untaught):
    task = untaught.store.task("colour")
    keys = {s: {row.key for row in untaught.rows(task, s)[0]} for s in task.splits}
    assert len(keys["probe"]) == 3
    assert not keys["probe"] & (keys["train"] | keys["eval"])


# Masks


def test_the_mask_keeps_the_exact_count_and_the_adapter_nothing_outside_it(ws):
    mask = ws.store.mask("colour", 1)
    assert mask.kept == round(0.1 * mask.total)
    tensors = ws.mask_tensors(mask)
    stored = block(ws, "colour@1")
    assert sum(int(m.sum()) for m in tensors.values()) == mask.kept
    assert all(not bool(stored.B[n][~tensors[n]].any()) for n in tensors)
    assert any(bool(b.any()) for b in stored.B.values())


def test_a_mask_of_another_a_is_refused_unless_allowed(ws):
    foreign = ws.calibrate("colour", line="other")
    assert foreign.projection != ws.adapter("colour@1").projection
    options = TrainOptions(mask=foreign.ref)
    with pytest.raises(InvalidInput, match="another A"):
        ws.train(["colour"], options=options)
    assert ws.store.line("colour").versions == 1
    made = ws.train(["colour"], options=dataclasses.replace(options, allow_foreign_mask=True))[
        0
    ].adapter
    assert (made.ref, made.mask) == ("colour@2", foreign.ref)
    assert ws.train(["colour"], options=TrainOptions(line="other"))[0].adapter.mask == foreign.ref


def test_a_mask_of_other_modules_is_refused_even_if_allowed(ws):
    narrow = ws.calibrate("colour", settings(ws, targets=("q_proj",)))
    with pytest.raises(InvalidInput, match="other modules"):
        ws.train(["colour"], options=TrainOptions(mask=narrow.ref, allow_foreign_mask=True))


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"steps": 6}, 6),
        ({"steps": 0, "epochs": 2.0, "batch": 5}, 10),  # 24 rows, all of them
        ({"steps": 0, "epochs": 2.0, "batch": 5, "calibration_rows": 8}, 10),
        ({"steps": 6, "calibration_steps": 3}, 3),
    ],
)
def test_a_mask_takes_as_many_dense_steps_as_a_training_unless_told(fresh, changes, steps):
    told, seen = [], []
    fresh.on_message, fresh.on_progress = told.append, seen.append
    fresh.calibrate("colour", settings(fresh, **{"calibration_steps": 0} | changes))
    assert [(p.phase, p.step, p.steps) for p in seen] == [
        ("calibrating colour", i + 1, steps) for i in range(steps)
    ]
    assert f"entries of B kept, {steps} dense steps in" in told[-1]


def test_a_mask_of_another_length_is_taken_only_where_it_was_asked_for(fresh):
    whole = {"calibration_steps": 0, "checkpoint_seconds": 0.0}
    short = fresh.train(["colour"], settings(fresh, steps=2, **whole))[0]
    long = fresh.train(["colour"], settings(fresh, steps=6, **whole))[0]
    again = fresh.train(["colour"], settings(fresh, steps=6, seed=0, **whole))[0]
    masks = [fresh.store.mask(*parse_mask_ref(one.adapter.mask)) for one in (short, long, again)]
    assert [m.config["dense_steps"] for m in masks] == [2, 6, 6]
    assert masks[1] == masks[2] != masks[0]
    assert masks[1].config["seconds"] > 0
    asked = fresh.calibrate("colour", settings(fresh, calibration_steps=3))
    assert fresh.train(["colour"], settings(fresh, steps=6, **whole))[0].adapter.mask == asked.ref


def test_a_mask_is_calibrated_only_on_a_line_that_can_be_named(fresh):
    for name in ("a/b", "x@y", "", "-x", "latest"):
        with pytest.raises(InvalidInput, match="line"):
            fresh.calibrate("colour", line=name)


# Continuing


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_continuing_leaves_entries_outside_the_new_mask_bit_for_bit(ws, clip):
    config = settings(ws, weight_decay=0.5, clip=clip, learning_rate=0.05)
    made = ws.train(["shape"], config, TrainOptions(start="colour@1"))[0].adapter
    parent, child = block(ws, "colour@1"), block(ws, made.ref)
    new = ws.mask_tensors(ws.store.mask("shape", int(made.mask.split("%")[1])))
    assert child.projection_digest == parent.projection_digest
    assert same_outside(new, parent.B, child.B)
    assert any(bool((child.B[n] != parent.B[n]).any()) for n in new)
    alone = {n: m & ~new[n] for n, m in parent.mask.items()}
    assert any(bool(parent.B[n][alone[n]].any()) for n in alone)
    assert all(torch.equal(child.mask[n], parent.mask[n] | new[n]) for n in new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_continuing_an_imported_adapter_leaves_the_rest_bit_for_bit(ws, tmp_path, dtype):
    from safetensors.torch import load_file, save_file

    ws.export("colour@1", tmp_path / "foreign")
    file = tmp_path / "foreign" / "adapter_model.safetensors"
    torch.manual_seed(0)
    save_file({n: torch.randn_like(t).mul(0.01).to(dtype) for n, t in load_file(file).items()},
              file)  # fmt: skip
    (imported,) = ws.import_adapters([tmp_path / "foreign"], assume_base=True)
    made = ws.train(["shape"], None, TrainOptions(start=imported.adapter.ref, line="on"))[0]
    mask = ws.mask_tensors(made.mask)
    before, after = block(ws, "foreign@1"), block(ws, "on@1")
    assert after.projection is None
    assert after.projection_digest == before.projection_digest
    for name in mask:
        old, new = before.B[name].double(), after.B[name].double()
        assert torch.equal(old[~mask[name]], new[~mask[name]])
    assert any(bool((before.B[n].double() != after.B[n].double()).any()) for n in mask)


def test_continuing_a_merge_starts_from_what_the_merge_does(ws):
    config = settings(ws, learning_rate=1e-12)
    ws.train(["size"], config, TrainOptions(start="main@1", line="on"))
    assert largest_difference(logits(ws, "on@1"), logits(ws, "main@1")) < 1e-5
    assert ws.adapter("on@1").rank == ws.adapter("main@1").rank
    assert ws.tasks_of(ws.adapter("on@1")) == ["colour", "shape", "size"]
    assert findings(ws) == []


def test_a_mask_on_the_a_of_a_merge_is_no_finding_before_its_adapter_is_there(ws):
    def stop(progress):
        if progress.phase.startswith("training"):
            raise KeyboardInterrupt

    ws.on_progress = stop
    with pytest.raises(KeyboardInterrupt):
        ws.train(["size"], options=TrainOptions(start="main@1", line="on"))
    assert len(ws.store.masks("size")) == 1
    assert findings(ws) == []


def test_protect_keeps_off_the_parents_entries_and_tells_the_capacity_left(ws):
    config = settings(ws, sparsity=0.6)
    first = ws.train(["colour"], config, TrainOptions(line="kept"))[0]
    assert first.capacity is None
    made = ws.train(["shape"], config, TrainOptions(start="kept@1", line="kept", protect=True))[0]
    parent, child = block(ws, "kept@1"), block(ws, "kept@2")
    mask = ws.mask_tensors(made.mask)
    assert made.mask.kept == round(0.4 * made.mask.total)
    assert all(not bool((mask[n] & parent.mask[n]).any()) for n in mask)
    assert all(torch.equal(child.B[n][parent.mask[n]], parent.B[n][parent.mask[n]]) for n in mask)
    for name, left in made.capacity.items():
        used = (mask[name] | parent.mask[name]).float().mean()
        assert left == pytest.approx(1 - float(used))
    third = ws.train(["size"], config, TrainOptions(start="kept@2", line="kept", protect=True))[0]
    assert third.mask.kept == third.mask.total - 2 * first.mask.kept
    assert all(left == pytest.approx(0) for left in third.capacity.values())
    with pytest.raises(InvalidInput, match="no entry of B is left"):
        ws.train(["colour"], config, TrainOptions(start="kept@3", line="kept", protect=True))
    assert ws.store.line("kept").versions == 3


def test_protect_refuses_a_mask_that_touches_the_parents(ws):
    mask = ws.calibrate("shape", line="colour")
    options = TrainOptions(mask=mask.ref, start="colour@1", line="on", protect=True)
    with pytest.raises(InvalidInput, match="parents"):
        ws.train(["shape"], options=options)


def test_a_mask_that_kept_off_parents_is_not_taken_without_protect(fresh):
    config = settings(fresh, projection="shared", sparsity=0.6)
    fresh.train(["colour"], config)
    options = TrainOptions(start="colour@1", line="on", protect=True)
    kept_off = fresh.train(["shape"], config, options)[0].mask
    alone = fresh.train(["shape"], config)[0]
    assert alone.adapter.mask != kept_off.ref
    assert not alone.mask.config["protected"]


def test_a_dense_adapter_uses_all_of_b_and_can_be_continued(ws):
    ws.train(["colour"], options=TrainOptions(dense=True, line="dense"))
    made = ws.train(["shape"], None, TrainOptions(start="dense@1", line="dense"))[0]
    before, after = block(ws, "dense@1"), block(ws, "dense@2")
    assert before.mask is None
    assert all(float((b != 0).float().mean()) > 0.9 for b in before.B.values())
    assert same_outside(ws.mask_tensors(made.mask), before.B, after.B)
    assert ws.adapter("dense@1").method == "lori-d"


# Sequences and independent tasks


def test_a_sequence_has_one_a_and_each_stage_continues_the_one_before(ws):
    first, second = ws.store.adapters("both")
    assert first.projection == second.projection
    assert first.parents == ()
    assert [p.ref for p in second.parents] == ["both@1"]
    assert (first.task, second.task) == ("colour", "shape")
    assert ws.store.line("both").sequence == ("colour#1", "shape#1")
    new = ws.mask_tensors(ws.store.mask("shape", int(second.mask.split("%")[1])))
    assert same_outside(new, block(ws, "both@1").B, block(ws, "both@2").B)


def test_masks_of_a_sequence_are_calibrated_from_nothing_on_its_a(ws):
    """So the second stage's mask does not depend on what the first one learned."""
    masks = [ws.store.mask(*ref) for ref in (("colour", 2), ("shape", 2))]
    assert {m.projection for m in masks} == {ws.adapter("both@1").projection}
    alone = ws.calibrate("shape", line="both")
    assert alone.digest == masks[1].digest


def test_every_stage_and_the_base_are_scored_on_all_tasks_also_the_coming_ones(ws):
    scored = {(s.subject, s.task) for s in ws.store.scores()}
    for subject in ("base", "both@1", "both@2"):
        assert {(subject, "colour"), (subject, "shape")} <= scored
    (audited,) = ws.audit("both").sequences
    assert audited.tasks == ("colour#1", "shape#1")
    assert all(value == value for row in (*audited.R, audited.base) for value in row)
    assert audited.references == ("colour@1", "shape@1")


def test_a_second_equal_sequence_is_refused_and_changes_nothing(ws):
    with pytest.raises(Conflict, match="holds 2 stage"):
        ws.train(["colour", "shape"], sequence="both")
    with pytest.raises(Conflict, match="as the sequence"):
        ws.train(["shape", "colour"], sequence="both")
    assert ws.store.line("both").versions == 2
    assert ws.store.open_runs() == []


def test_an_unfinished_sequence_goes_on_with_its_own_settings_alone(fresh, taught):
    def stop(progress):
        if progress.phase == "training shape":
            raise KeyboardInterrupt

    fresh.on_progress = stop
    with pytest.raises(KeyboardInterrupt):
        fresh.train(["colour", "shape"], sequence="both")
    assert fresh.store.line("both").versions == 1
    fresh.on_progress = lambda _: None
    with pytest.raises(Conflict, match="other settings"):
        fresh.train(["colour", "shape"], settings(fresh, seed=1), sequence="both")
    results = fresh.train(["colour", "shape"], sequence="both")
    assert [r.resumed for r in results] == [True, False]
    assert [a.digest for a in fresh.store.adapters("both")] == [
        a.digest for a in taught.store.adapters("both")
    ]
    assert fresh.store.open_runs() == []


def test_a_protected_sequence_keeps_its_masks_apart(fresh):
    config = settings(fresh, sparsity=0.7)
    results = fresh.train(list(WORDS), config, TrainOptions(protect=True), sequence="all")
    masks = [fresh.mask_tensors(r.mask) for r in results]
    for name in masks[0]:
        assert int(sum(m[name].int() for m in masks).max()) == 1
    assert all(0 <= left < 1 for left in results[-1].capacity.values())


def test_tasks_trained_apart_write_to_their_own_lines_with_their_own_a(ws):
    one, other = ws.adapter("colour@1"), ws.adapter("shape@1")
    assert one.projection != other.projection
    assert one.parents == other.parents == ()
    with pytest.raises(InvalidInput, match="shared"):
        ws.merge(["colour@1", "shape@1"], method="linear", into="sum")


def test_a_shared_projection_is_one_a_and_allows_linear(fresh):
    config = settings(fresh, projection="shared")
    one, other = (r.adapter for r in fresh.train(["colour", "shape"], config))
    assert one.projection == other.projection
    linear = fresh.merge([one.ref, other.ref], method="linear", into="linear").adapter
    concat = fresh.merge([one.ref, other.ref], into="concat").adapter
    assert (linear.rank, concat.rank) == (4, 8)
    assert linear.projection == one.projection
    assert largest_difference(logits(fresh, "linear"), logits(fresh, "concat")) < 1e-5


def test_stages_of_a_sequence_share_one_a_and_can_be_merged_linearly(ws):
    made = ws.merge(["both@1", "both@2"], method="linear", into="mean").adapter
    assert (made.rank, made.projection) == (4, ws.adapter("both@1").projection)


# Equal seeds


def test_the_same_seed_gives_the_same_digest_and_another_does_not(ws, fresh):
    again = fresh.train(["colour"])[0].adapter
    assert again.digest == ws.adapter("colour@1").digest
    assert ws.train(["colour"])[0].adapter.ref == "colour@2"
    assert ws.adapter("colour@2").digest == again.digest
    assert fresh.train(["colour"], settings(fresh, seed=1))[0].adapter.digest != again.digest


def test_the_same_seed_gives_the_same_digest_in_another_process_and_workspace(
    taught, tiny_base, tmp_path
):
    other = make_workspace(tmp_path / "other", tiny_base)
    other.close()
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run(
        [sys.executable, "-m", "lori_manager", "-C", str(other.root), "train", "colour", "--json"],
        env=os.environ | threads, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    made = json.loads(run.stdout)[0]["adapter"]
    assert made["digest"] == taught.adapter("colour@1").digest
    assert made["facts"]["last_loss"] == taught.adapter("colour@1").facts["last_loss"]


# Scores


def forbid_the_model(monkeypatch, workspace):
    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(models, "load_base", load)
    workspace._model = None


def test_what_is_scored_is_never_run_again(ws, monkeypatch):
    refs = ["base", "colour@1", "main@1", "both@2"]
    first = ws.score(refs)
    forbid_the_model(monkeypatch, ws)
    assert ws.score(refs) == first
    with pytest.raises(AssertionError, match="loaded"):
        ws.score(["shape@1"])


def test_equal_weights_share_their_scores_under_their_own_names(ws, monkeypatch):
    ws.train(["colour"])
    assert ws.adapter("colour@2").digest == ws.adapter("colour@1").digest
    forbid_the_model(monkeypatch, ws)
    scores = ws.score(["colour@1", "colour@2", "colour@1"], ["colour"])
    assert [s.subject for s in scores] == ["colour@1", "colour@2", "colour@1"]


def test_outcomes_from_elsewhere_are_taken_by_index_and_by_key(ws, tmp_path):
    task = ws.store.task("shape")
    keys = [key.hex() for key in ws.store.eval_keys(task)]
    values = [1, 0, 1, 1, 0, 1, 1, 1]
    for origin, rows in (("by index", range(8)), ("by key", keys)):
        file = tmp_path / f"{origin}.jsonl"
        lines = [json.dumps({"row": r, "value": v}) for r, v in zip(rows, values, strict=True)]
        file.write_text("\n".join(reversed(lines)))
        score = ws.add_outcomes("colour@1", "shape", file, origin)
        assert (score.subject, score.origin, score.value) == ("colour@1", origin, 0.75)
        assert ws.store.outcomes(score)[0].tolist() == values
    assert ws.score(["colour@1"], ["shape"])[0].origin == "measured"
    entries = ws.audit("colour@1", task="shape").tasks[0].entries
    assert {e.origin: e.imported for e in entries if e.subject == "colour@1"} == {
        "by index": True, "by key": True, "measured": False,
    }  # fmt: skip


def test_what_is_scored_is_what_is_stored(ws):
    """A perplexity computed by hand from the stored file alone, row by row without padding."""
    ws.add_task("colour", scorer="perplexity", probe_rows=4)
    score = ws.score(["main@1"], ["colour"])[0]
    folder = ws.export("main@1", ws.root / "full", full=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    told, tokens = 0.0, 0
    for row in ws.rows(ws.store.task("colour"), "eval")[1]:
        ids = torch.tensor([[int(i) for i in row.ids]])
        with torch.no_grad():
            given = model(input_ids=ids).logits[0, row.prompt_length - 1 : -1].log_softmax(-1)
        wanted = ids[0, row.prompt_length :]
        told -= float(given[torch.arange(len(wanted)), wanted].sum())
        tokens += len(wanted)
    assert score.value == pytest.approx(told / tokens, rel=1e-5)
    base = ws.score(["base"], ["colour"])[0]
    assert abs(base.value - score.value) > 1e-3


# Merges


def test_a_merge_weighs_its_members_equally_unless_told_and_is_their_exact_sum(ws):
    merged = ws.merge(["colour@1", "shape@1"], into="mean")
    assert merged.weights == (0.5, 0.5)
    assert [(p.ref, p.weight) for p in merged.adapter.parents] == [
        ("colour@1", 0.5), ("shape@1", 0.5),
    ]  # fmt: skip
    assert merged.adapter.rank == 8
    sums = ws.merge(["colour@1", "shape@1"], weights=[2, -1], into="sum").adapter
    parts = [ws.weights(ws.adapter(r)).updates() for r in ("colour@1", "shape@1")]
    for name, update in ws.weights(sums).updates().items():
        expected = 2 * parts[0][name].delta() - parts[1][name].delta()
        assert torch.allclose(update.delta(), expected, atol=1e-7)


def test_a_merge_scores_each_members_task_for_the_member_and_for_the_merge(ws):
    merged = ws.merge(["colour@1", "both@2"], into="again")
    assert {(s.subject, s.task) for s in merged.scores} == {
        ("colour@1", "colour"), ("both@2", "colour"), ("both@2", "shape"),
        ("again@1", "colour"), ("again@1", "shape"),
    }  # fmt: skip


def test_a_merge_of_merges_and_of_imports_is_their_exact_sum(ws, tmp_path):
    ws.export("both@2", tmp_path / "foreign")
    (imported,) = ws.import_adapters([tmp_path / "foreign"])
    merged = ws.merge(["main@1", imported.adapter.ref], weights=[1, 0.5], into="deep")
    assert {(s.subject, s.task) for s in merged.scores} == {
        ("main@1", "colour"), ("main@1", "shape"), ("deep@1", "colour"), ("deep@1", "shape"),
    }  # fmt: skip
    parts = [ws.weights(ws.adapter(r)).updates() for r in ("main@1", "both@2")]
    for name, update in ws.weights(merged.adapter).updates().items():
        expected = parts[0][name].delta() + 0.5 * parts[1][name].delta()
        assert torch.allclose(update.delta(), expected, atol=1e-7)
    assert findings(ws) == []


# Export and import


@pytest.mark.parametrize("ref", ["colour@1", "both@2", "main@1"])
def test_an_export_loaded_by_peft_gives_our_logits(ws, tmp_path, ref):
    from peft import PeftModel

    ws.export(ref, tmp_path / "peft")
    base = AutoModelForCausalLM.from_pretrained(ws.base_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path / "peft"))
    with torch.no_grad():
        theirs = model(input_ids=IDS).logits
    assert largest_difference(theirs, logits(ws, ref)) <= 1e-5
    assert largest_difference(theirs, logits(ws, BASE)) > 1e-3


def test_a_full_export_gives_our_logits_without_lori(ws, tmp_path):
    ws.export("main@1", tmp_path / "full", full=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32)
    with torch.no_grad():
        theirs = model(input_ids=IDS).logits
    assert largest_difference(theirs, logits(ws, "main@1")) <= 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "full").eos_token == "<|end|>"


def test_an_import_does_what_was_exported_and_is_scored(ws, tmp_path):
    for name in ("one", "two"):
        ws.export("colour@1", tmp_path / name)
    (tmp_path / "two" / "adapter_config.json").write_text("{}")
    (tmp_path / "size").mkdir()
    found = ws.import_adapters([tmp_path / "two", tmp_path / "one", tmp_path / "size"])
    assert [i.adapter.ref if i.adapter else None for i in found] == [None, "one@1", None]
    assert ws.adapter("one@1").origin == "imported"
    assert largest_difference(logits(ws, "one@1"), logits(ws, "colour@1")) <= 1e-6
    ours, imported = ws.score(["colour@1", "one@1"], ["colour"])
    assert ws.store.outcomes(ours)[0].tolist() == ws.store.outcomes(imported)[0].tolist()
    assert ws.task_adapter("colour").ref == "colour@1"


# Verify and audit


def damaged(workspace, digest, how):
    file = object_file(workspace, digest)
    content = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 3] ^= 16
        file.write_bytes(content)


@pytest.mark.parametrize(("how", "kind"), [("gone", "missing"), ("cut", "damaged"),
                                           ("flipped", "damaged")])  # fmt: skip
def test_verify_finds_every_damaged_object_and_names_who_needs_it(ws, how, kind):
    mask, task = ws.store.mask("shape", 1), ws.store.task("size")
    for digest in (ws.adapter("colour@1").digest, mask.digest, task.splits["eval"].digest):
        damaged(ws, digest, how)
    found = findings(ws)
    assert {(kind, "colour@1"), (kind, mask.ref), (kind, f"{task.ref} eval")} <= set(found)
    assert {k for k, _ in found} == {kind}
    assert ws.train(["colour"])[0].adapter.digest == ws.adapter("colour@1").digest
    assert (kind, "colour@1") not in findings(ws)


def test_verify_finds_a_mask_whose_a_is_another(ws):
    assert findings(ws) == []
    with sqlite3.connect(ws.store.root / "registry.db") as database:
        database.execute(
            "UPDATE masks SET projection = (SELECT projection FROM masks WHERE task = 'shape')"
            " WHERE task = 'colour' AND version = 1"
        )
    database.close()
    assert findings(ws) == [("unfit", "colour%1")]


def test_verify_finds_files_that_nothing_needs_and_calls_them_so(ws):
    digest = ws.store.objects.put(b"nobody's")
    leftover = object_file(ws, digest).parent / ".tmp-0123456789abcdef"
    leftover.write_bytes(b"half")
    assert findings(ws) == [("orphan", digest), ("orphan", leftover.name)]


def test_verify_and_audit_are_content_after_the_whole_road(ws, tmp_path):
    ws.train(["size"], options=TrainOptions(start="both@2", line="more", protect=True))
    ws.export("more@1", tmp_path / "foreign")
    ws.import_adapters([tmp_path / "foreign"])
    ws.merge(["main@1", "foreign@1"], into="deep")
    ws.set_alias("deep@1", "production")
    ws.score(["base", "deep@production", "foreign@1"])
    assert findings(ws) == []
    told = ws.audit()
    assert {t.ref for t in told.tasks} == {"colour#1", "shape#1", "size#1"}
    assert all(e.parent is not None for t in told.tasks for e in t.entries if e.subject != BASE)
    assert [s.line for s in told.sequences] == ["both"]
    assert ws.audit("deep@production", max_drop=1.0).findings == ()


# Refusals and failures


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"rank": 33}, {}),
        ({"targets": ("q_proj", "nothing")}, {}),
        ({}, {"mask": "shape%9"}),
        ({}, {"mask": "shape%1"}),
    ],
    ids=["rank", "targets", "no such mask", "a mask of another A"],
)
def test_a_refused_training_leaves_no_run_behind(ws, changes, options):
    with pytest.raises((InvalidInput, NotFound)):
        ws.train(["colour"], settings(ws, **changes), TrainOptions(**options))
    assert ws.store.open_runs() == []
    assert list((ws.store.root / "runs").iterdir()) == []
    assert ws.store.line("colour").versions == 1


def test_a_refused_sequence_leaves_its_name_free(fresh):
    with pytest.raises(InvalidInput):
        fresh.train(["colour", "shape"], settings(fresh, rank=33), sequence="both")
    assert fresh.store.open_runs() == []
    assert [a.ref for a in fresh.store.adapters()] == []
    fresh.train(["shape", "colour"], sequence="both")


def test_a_refused_continuation_of_a_run_keeps_what_it_can_go_on_from(fresh):
    def stop(progress):
        if progress.phase.startswith("training") and progress.step == 2:
            raise StorageFailed("full")

    fresh.on_progress = stop
    config = settings(fresh, checkpoint_seconds=0.0)
    with pytest.raises(StorageFailed):
        fresh.train(["colour"], config)
    assert len(fresh.store.open_runs()) == 1
    steps = []
    fresh.on_progress = lambda p: steps.append(p.step)
    fresh.train(["colour"], config)
    assert min(steps) > 1
    assert fresh.store.open_runs() == []


def test_two_processes_are_never_at_the_same_training(fresh):
    other = Workspace.open(fresh.root)
    other._model = fresh._model

    def second(_):
        with pytest.raises(Conflict, match="another process"):
            other.train(["colour"])
        fresh.on_progress = Context.on_progress

    fresh.on_progress = second
    assert fresh.train(["colour"])[0].adapter.ref == "colour@1"
    assert fresh.on_progress is Context.on_progress


def test_a_failed_scoring_leaves_the_base_as_it_was(ws, monkeypatch):
    def full(*_, **__):
        raise StorageFailed("no space")

    before = logits(ws, BASE)
    with monkeypatch.context() as patch:
        patch.setattr(type(ws.store), "add_score", full)
        with pytest.raises(StorageFailed):
            ws.score(["shape@1"], ["colour", "size"])
    assert torch.equal(logits(ws, BASE), before)


def test_an_init_that_was_cut_short_can_be_repeated(tiny_base, tmp_path, monkeypatch):
    def full(*_):
        raise StorageFailed("no space")

    with monkeypatch.context() as patch:
        patch.setattr("lori_manager.store.store.Store.set_base", full)
        with pytest.raises(StorageFailed):
            Workspace.create(tmp_path / "ws", str(tiny_base))
    Workspace.create(tmp_path / "ws", str(tiny_base)).close()
    assert Workspace.open(tmp_path / "ws").settings.config.rank == 32
    with pytest.raises(Conflict):
        Workspace.create(tmp_path / "ws", str(tiny_base))
