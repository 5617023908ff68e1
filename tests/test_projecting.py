"""A's that keep out of each other's way: orthogonal ones, and those off earlier tasks' inputs."""

import dataclasses

import pytest
import torch
from small_workspaces import copied, make_workspace, write_rows

from lori_manager.consolidation import input_grams, prompts_of
from lori_manager.engine.codec import decode_meta
from lori_manager.engine.layers import attached, low_rank_layers
from lori_manager.engine.nullspace import response
from lori_manager.engine.projection import ORTHOGONAL, UNIFORM
from lori_manager.engine.update import concat_updates
from lori_manager.errors import InvalidInput, NotFound
from lori_manager.refs import BASE
from lori_manager.teaching import TrainOptions
from lori_manager.workspace import Workspace

IDS = torch.arange(60).reshape(3, 20) * 3 % 250
ENERGY = 0.9


@pytest.fixture(scope="module")
def untaught(tiny_base, tmp_path_factory):
    """Three tasks, nothing trained. Not to be changed."""
    folder = tmp_path_factory.mktemp("untaught") / "ws"
    return make_workspace(folder, tiny_base, nullspace_energy=ENERGY, store_dtype="fp32")


@pytest.fixture(scope="module", params=["orthogonal", "nullspace"])
def apart(request, untaught, tmp_path_factory):
    """All three tasks on the line `three`. Not to be changed."""
    ws = copied(untaught, tmp_path_factory.mktemp(request.param) / "ws")
    ws.train(["colour", "shape", "size"], with_a(ws, request.param), sequence="three")
    return ws


@pytest.fixture
def ws(untaught, tmp_path):
    return copied(untaught, tmp_path / "ws")


def with_a(workspace, projection, **changes):
    return dataclasses.replace(workspace.settings.config, projection=projection, **changes)


def weights(workspace, ref):
    return workspace.weights(workspace.adapter(ref))


def bits(tensor):
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.contiguous().view(integers[tensor.element_size()])


def same_bits(a, b):
    return set(a) == set(b) and all(torch.equal(bits(a[n]), bits(b[n])) for n in a)


def logits(workspace, updates):
    base = workspace.base_model(workspace.settings.config)
    with attached(base.model, low_rank_layers(base.model, updates)), torch.no_grad():
        return base.model(input_ids=IDS).logits


def own_row(workspace, ref):
    return workspace.adapter(ref).facts["A"]["first_row"]


def inputs_of(workspace, name, adapter, modules):
    """Second moments of what a task's probe prompts give the modules."""
    task = workspace.store.task(name)
    prompts = prompts_of(workspace.rows(task, "probe")[1])
    updates = weights(workspace, adapter).updates()
    assert set(modules) <= set(updates)
    return input_grams(workspace.base_model(workspace.settings.config), updates, prompts, 8)


# Sequences


def test_each_stage_adds_a_block_and_leaves_the_earlier_ones_to_the_bit(apart):
    stages = [weights(apart, f"three@{i}").blocks for i in (1, 2, 3)]
    assert [len(blocks) for blocks in stages] == [1, 2, 3]
    for before, after in ((stages[0], stages[1]), (stages[1], stages[2])):
        for old, kept in zip(before, after, strict=False):
            assert (old.scaling, old.projection) == (kept.scaling, kept.projection)
            assert same_bits(old.A, kept.A)
            assert same_bits(old.B, kept.B)
            assert same_bits(old.mask, kept.mask)
        new = after[-1]
        assert any(bool(b.any()) for b in new.B.values())
        assert all(not bool(b[~new.mask[n]].any()) for n, b in new.B.items())
    assert [apart.adapter(f"three@{i}").rank for i in (1, 2, 3)] == [4, 8, 12]
    assert apart.adapter("three@1").projection is not None
    assert apart.adapter("three@3").projection is None


def test_a_stage_is_the_sum_of_its_blocks(apart):
    whole = weights(apart, "three@3")
    parts = [block.updates() for block in whole.blocks]
    summed = {n: concat_updates([p[n] for p in parts], [1.0] * 3) for n in parts[0]}
    deltas = {n: sum(p[n].delta() for p in parts) for n in parts[0]}
    for name, update in whole.updates().items():
        assert torch.allclose(update.delta(), deltas[name], atol=1e-7)
    assert torch.equal(logits(apart, whole.updates()), logits(apart, summed))
    assert not torch.equal(logits(apart, whole.updates()), logits(apart, parts[2]))


def test_what_trains_beside_fixed_blocks_starts_from_what_they_do(ws, apart):
    """At a rate of nearly nothing, the losses and the model are those of the parent."""
    kind = apart.adapter("three@1").config["projection"]
    config = with_a(ws, kind, learning_rate=1e-12)
    ws.train(["colour"], with_a(ws, "task"))
    made = ws.train(["shape"], config, TrainOptions(start="colour@1", line="on"))[0].adapter
    before, after = (logits(ws, weights(ws, r).updates()) for r in ("colour@1", made.ref))
    assert float((before - after).abs().max() / before.abs().max()) < 1e-6
    other = ws.train(["shape"], with_a(ws, "task", learning_rate=1e-12),
                     TrainOptions(start="colour@1", line="same"))[0].adapter  # fmt: skip
    assert made.facts["first_loss"] == pytest.approx(other.facts["first_loss"], rel=1e-6)
    plain = ws.train(["shape"], config, TrainOptions(line="alone"))[0].adapter
    assert made.facts["first_loss"] != pytest.approx(plain.facts["first_loss"], rel=1e-6)


def test_a_sequence_is_whole_to_verify_and_to_peft(apart, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert [f for f in apart.verify() if f.kind != "orphan"] == []
    apart.export("three@3", tmp_path / "peft")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(apart.base_folder), tmp_path / "peft"
    ).eval()
    assert model.peft_config["default"].r == 12
    with torch.no_grad():
        theirs = model(input_ids=IDS).logits
    ours = logits(apart, weights(apart, "three@3").updates())
    assert float((theirs - ours).abs().max() / ours.abs().max()) < 1e-5


def test_the_same_sequence_again_has_the_same_digests(untaught, apart, tmp_path):
    kind = apart.adapter("three@1").config["projection"]
    again = copied(untaught, tmp_path / "again")
    again.train(["colour", "shape", "size"], with_a(again, kind), sequence="three")
    for stage in ("three@1", "three@2", "three@3"):
        assert again.adapter(stage).digest == apart.adapter(stage).digest


def test_an_interrupted_stage_goes_on_with_the_a_that_it_had(untaught, apart, tmp_path):
    kind = apart.adapter("three@1").config["projection"]
    ws = copied(untaught, tmp_path / "stopped")
    config = with_a(ws, kind, checkpoint_seconds=0.0)

    def stop(progress):
        if progress.phase == "training shape" and progress.step == 3:
            raise KeyboardInterrupt

    ws.on_progress = stop
    with pytest.raises(KeyboardInterrupt):
        ws.train(["colour", "shape", "size"], config, sequence="three")
    assert [f for f in ws.verify() if f.kind != "orphan"] == []
    del ws.on_progress
    told = []
    ws.on_message = told.append
    ws.train(["colour", "shape", "size"], config, sequence="three")
    assert not any(message.startswith("A of shape") for message in told)
    assert not any(message.startswith("mask shape") for message in told)
    assert ws.adapter("three@3").digest == apart.adapter("three@3").digest


def test_a_damaged_a_of_an_interrupted_stage_is_made_again(untaught, tmp_path):
    ws = copied(untaught, tmp_path / "ws")
    config = with_a(ws, "nullspace")

    def stop(progress):
        if progress.phase == "training shape":
            raise KeyboardInterrupt

    ws.on_progress = stop
    with pytest.raises(KeyboardInterrupt):
        ws.train(["colour", "shape"], config, sequence="two")
    (kept,) = ws.store.root.glob("runs/*/1-A")
    kept.write_bytes(kept.read_bytes()[:-3] + b"abc")
    del ws.on_progress
    ws.train(["colour", "shape"], config, sequence="two")
    assert [f for f in ws.verify() if f.kind != "orphan"] == []
    assert len(ws.store.masks("shape")) == 1


# Orthogonal


def test_lines_have_orthogonal_a_whatever_their_rank(ws):
    ws.train(["colour", "shape"], with_a(ws, "orthogonal"))
    ws.train(["size"], with_a(ws, "orthogonal", rank=8))
    assert [own_row(ws, f"{task}@1") for task in ("colour", "shape", "size")] == [0, 4, 8]
    blocks = [weights(ws, f"{task}@1").blocks[0] for task in ("colour", "shape", "size")]
    for name in blocks[0].B:
        rows = torch.cat([b.A[name] for b in blocks]).double()
        assert float((rows @ rows.T - torch.eye(16) / 3).abs().max()) < 1e-6
    assert {b.projection.generator for b in blocks} == {ORTHOGONAL}


def test_a_line_keeps_its_rows_and_so_its_masks(ws):
    config = with_a(ws, "orthogonal")
    mask = ws.calibrate("shape", config)
    ws.train(["colour", "shape"], config)
    assert own_row(ws, "shape@1") == 0
    assert ws.adapter("shape@1").mask == mask.ref
    ws.train(["shape"], config)
    assert ws.adapter("shape@2").digest == ws.adapter("shape@1").digest
    wider = ws.train(["shape"], with_a(ws, "orthogonal", rank=8))[0].adapter
    assert own_row(ws, wider.ref) == 8


def test_tasks_taught_beside_one_parent_have_rows_of_their_own(ws):
    config = with_a(ws, "orthogonal")
    ws.train(["colour"], config)
    for task in ("shape", "size", "shape"):
        ws.train([task], config, TrainOptions(start="colour@1", line="on"))
    assert [own_row(ws, f"on@{i}") for i in (1, 2, 3)] == [4, 8, 4]


def test_it_is_told_when_there_is_no_room_left_to_be_orthogonal_in(ws):
    told = []
    ws.on_message = told.append
    for task in ("colour", "shape", "size"):  # 3 x 16 rows, 32 inputs
        assert not any("not orthogonal" in message for message in told)
        ws.calibrate(task, with_a(ws, "orthogonal", rank=16))
    assert sum(message.startswith("rows 32 to 47 of A are more") for message in told) == 1


def test_merged_orthogonal_adapters_keep_apart(ws):
    ws.train(["colour", "shape"], with_a(ws, "orthogonal"))
    ws.merge([], names=["colour", "shape"], method="concat")
    one, two = (b.updates() for b in weights(ws, "main@1").blocks)
    for name in one:
        assert float((one[name].delta() @ two[name].delta().T).abs().max()) < 1e-9


# Off the inputs of earlier tasks


def test_earlier_tasks_inputs_hardly_reach_the_new_a(ws):
    ws.train(["colour"], with_a(ws, "task"))
    made = ws.train(["shape"], with_a(ws, "nullspace"))[0].adapter
    block = weights(ws, made.ref).blocks[0]
    seen = inputs_of(ws, "colour", "colour@1", block.B)
    plain = weights(ws, ws.train(["shape"], with_a(ws, "task"))[0].adapter.ref).blocks[0]
    assert {made.facts["A"]["energy"]} == {ENERGY}
    how = decode_meta(ws.store.adapter_bytes(made))
    for name, A in block.A.items():
        size, scale = A.shape[1], how["scale"][name]
        values = torch.linalg.eigvalsh(seen[name].double()).flip(0)
        removed = how["removed"][name]
        assert 0 < removed < size - 4
        assert float(values[removed:].sum() / values.sum()) <= 1 - ENERGY
        # In the leading directions A is nothing, so what is left is at most the rest.
        _, vectors = torch.linalg.eigh(seen[name].double())
        Q = vectors.flip(1)[:, :removed]
        assert float((A.double() @ Q).abs().max()) < 1e-6
        before = plain.A[name].double()
        assert torch.allclose(A.double(), scale * (before - before @ Q @ Q.T), atol=1e-4)
        assert float(A.square().sum()) == pytest.approx(float(before.square().sum()), rel=1e-3)
        largest = scale**2 * float(torch.linalg.svdvals(before)[0]) ** 2
        rest = float(values[removed:].sum())
        assert response(A, seen[name]) <= largest * rest * (1 + 1e-6)


def test_a_can_be_made_to_answer_the_tasks_own_inputs_as_strongly_as_before(ws):
    ws.train(["colour"], with_a(ws, "task"))
    made = ws.train(["shape"], with_a(ws, "nullspace", nullspace_scale="inputs"))[0].adapter
    block = weights(ws, made.ref).blocks[0]
    plain = ws.train(["shape"], with_a(ws, "task", learning_rate=1e-12))[0].adapter
    own = inputs_of(ws, "shape", plain.ref, block.B)
    before = weights(ws, plain.ref).blocks[0]
    how = decode_meta(ws.store.adapter_bytes(made))
    for name, A in block.A.items():
        if how["scale"][name] < 8:
            assert response(A, own[name]) == pytest.approx(
                response(before.A[name], own[name]), rel=1e-3
            )
    assert min(how["scale"].values()) < 8


def test_the_a_that_is_trained_is_the_one_that_is_stored(tiny_base, tmp_path):
    """Rounded to bf16 before training and not after."""
    ws = make_workspace(tmp_path / "ws", tiny_base, nullspace_energy=ENERGY)
    ws.train(["colour"], with_a(ws, "task"))
    made = ws.train(["shape"], with_a(ws, "nullspace"))[0]
    (block,) = weights(ws, "shape@1").blocks
    assert {a.dtype for a in block.A.values()} == {torch.bfloat16}
    assert made.mask.projection == made.adapter.projection == block.projection_digest
    assert ws.train(["shape"], with_a(ws, "nullspace"))[0].adapter.digest == made.adapter.digest


def test_what_is_avoided_is_every_task_taught_before_or_what_is_named(ws):
    config = with_a(ws, "nullspace")
    told = []
    ws.on_message = told.append
    ws.train(["colour", "shape", "size"], config)
    assert "nothing was taught before colour: its A is not restricted" in told
    assert weights(ws, "colour@1").blocks[0].projection.generator == UNIFORM
    assert "A" not in ws.adapter("colour@1").facts
    assert ws.adapter("shape@1").facts["A"]["avoided"] == ["colour#1 by colour@1"]
    both = ["colour#1 by colour@1", "shape#1 by shape@1"]
    assert ws.adapter("size@1").facts["A"]["avoided"] == both
    ws.train(["size"], config, TrainOptions(avoid=("shape",)))
    assert ws.adapter("size@2").facts["A"]["avoided"] == both[1:]
    ws.train(["size"], config, TrainOptions(start="colour@1", line="on"))
    assert ws.adapter("on@1").facts["A"]["avoided"] == both[:1]
    ws.train(["size"], config, TrainOptions(start="colour@1", line="on", avoid=("shape",)))
    assert ws.adapter("on@2").facts["A"]["avoided"] == both[1:]


def test_a_sequence_avoids_its_earlier_stages_as_the_stage_before_sees_them(ws):
    ws.train(["colour", "shape", "size"], with_a(ws, "nullspace"), sequence="three")
    assert ws.adapter("three@2").facts["A"]["avoided"] == ["colour#1 by three@1"]
    assert ws.adapter("three@3").facts["A"]["avoided"] == [
        "colour#1 by three@2", "shape#1 by three@2",
    ]  # fmt: skip


def test_a_mask_can_be_calibrated_for_it_beforehand(ws):
    ws.train(["colour"], with_a(ws, "task"))
    mask = ws.calibrate("shape", with_a(ws, "nullspace"))
    assert [f for f in ws.verify() if f.kind != "orphan"] == []
    assert ws.train(["shape"], with_a(ws, "nullspace"))[0].adapter.mask == mask.ref


def test_other_modules_than_the_parents_can_be_trained_beside_it(ws):
    ws.train(["colour"], with_a(ws, "task", targets=("q_proj", "v_proj")))
    config = with_a(ws, "nullspace", targets=("q_proj", "down_proj"))
    ws.train(["shape"], config, TrainOptions(start="colour@1", line="on"))
    old, new = weights(ws, "on@1").blocks
    assert {n.rsplit(".", 1)[-1] for n in old.B} == {"q_proj", "v_proj"}
    assert {n.rsplit(".", 1)[-1] for n in new.B} == {"q_proj", "down_proj"}
    start = logits(ws, weights(ws, "colour@1").updates())
    slow = dataclasses.replace(config, learning_rate=1e-12)
    ws.train(["shape"], slow, TrainOptions(start="colour@1", line="slow"))
    plain = ws.train(["shape"], with_a(ws, "task", learning_rate=1e-12),
                     TrainOptions(start="colour@1", line="same"))[0].adapter  # fmt: skip
    assert torch.allclose(logits(ws, weights(ws, "slow@1").updates()), start, atol=1e-6)
    loss = ws.adapter("slow@1").facts["first_loss"]
    assert loss == pytest.approx(plain.facts["first_loss"], rel=1e-6)


# What does not go together


def no_probes(ws, name):
    """The task again, as one without probe rows."""
    folder = ws.root / "tasks" / name
    write_rows(folder / "train.jsonl", name, 20)
    ws.add_task(name, probe_rows=0)
    assert "probe" not in ws.store.task(name).splits


@pytest.mark.parametrize(
    ("projection", "options", "sequence", "message"),
    [
        ("task", {"avoid": ("colour",)}, None, "--avoid goes with --projection nullspace"),
        ("nullspace", {"avoid": ("shape",)}, None, "which is to be trained"),
        ("nullspace", {"avoid": ("colour",)}, "line", "leave --avoid out"),
        ("nullspace", {"protect": True}, "line", "--protect"),
        ("orthogonal", {"protect": True, "start": "colour@1"}, None, "--protect"),
    ],
)
def test_options_that_do_not_go_together_are_refused(ws, projection, options, sequence, message):
    ws.train(["colour"])
    with pytest.raises(InvalidInput, match=message):
        ws.train(["shape"], with_a(ws, projection), TrainOptions(**options), sequence=sequence)
    assert ws.store.open_runs() == []
    assert [line.name for line in ws.store.lines()] == ["colour", "shape", "size"]


def test_tasks_without_probe_rows_cannot_be_avoided(ws):
    no_probes(ws, "colour")
    config = with_a(ws, "nullspace")
    with pytest.raises(InvalidInput, match="'colour' has no probe rows"):
        ws.train(["colour", "shape"], config, sequence="line")
    assert "line" not in [line.name for line in ws.store.lines()]
    ws.train(["colour", "size"], with_a(ws, "task"))
    for options in (TrainOptions(avoid=("colour",)), TrainOptions(start="colour@1", line="on")):
        with pytest.raises(InvalidInput, match="'colour' has no probe rows"):
            ws.train(["shape"], config, options)
    # By default what can be avoided is.
    ws.train(["shape"], config)
    assert ws.adapter("shape@1").facts["A"]["avoided"] == ["size#1 by size@1"]
    assert ws.store.open_runs() == []


def test_if_no_task_taught_has_probe_rows_there_is_nothing_to_avoid_by(ws):
    no_probes(ws, "colour")
    ws.train(["colour"], with_a(ws, "task"))
    with pytest.raises(InvalidInput, match="'colour' has no probe rows"):
        ws.train(["shape"], with_a(ws, "nullspace"))


def test_a_task_that_is_named_must_have_been_taught(ws):
    with pytest.raises(NotFound, match="lori train colour"):
        ws.train(["shape"], with_a(ws, "nullspace"), TrainOptions(avoid=("colour",)))
    with pytest.raises(NotFound, match="hue"):
        ws.train(["shape"], with_a(ws, "nullspace"), TrainOptions(avoid=("hue",)))


def test_too_little_room_for_the_rank_is_told_with_numbers(ws):
    ws.train(["colour", "size"], with_a(ws, "task"))
    config = with_a(ws, "nullspace", nullspace_energy=0.999999, rank=16)
    with pytest.raises(InvalidInput, match=r"leaves \d+ of 32 input directions of .*rank 16"):
        ws.train(["shape"], config)
    assert ws.store.open_runs() == []
    assert ws.store.masks("shape") == []


def test_the_command_line_takes_it(untaught, tmp_path):
    from typer.testing import CliRunner

    from lori_manager.cli.app import app

    ws = copied(untaught, tmp_path / "ws")
    ws.train(["colour", "size"])
    args = ["-C", str(ws.root), "-q", "train", "shape", "--projection", "nullspace",
            "--nullspace-energy", "0.8", "--nullspace-scale", "inputs",
            "--avoid", "colour"]  # fmt: skip
    run = CliRunner().invoke(app, args)
    assert run.exit_code == 0, run.output
    made = Workspace.open(ws.root).adapter("shape@1")
    assert made.facts["A"] | {"avoided": ["colour#1 by colour@1"], "energy": 0.8} == made.facts["A"]
    assert BASE not in [a.ref for a in ws.store.adapters()]
