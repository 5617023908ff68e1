"""Rows of earlier tasks among a new one's, as the adapters of then would answer them."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from small_workspaces import copied, make_workspace, write_rows

from lori_manager.distillation import own_words, teacher_words
from lori_manager.engine.layers import attached, low_rank_layers
from lori_manager.errors import InvalidInput
from lori_manager.replaying import LABELS, with_replay
from lori_manager.teaching import TrainOptions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def taught(tiny_base, tmp_path_factory):
    """colour@1, shape@1 and their merge main@1. Not to be changed."""
    ws = make_workspace(tmp_path_factory.mktemp("replaying") / "ws", tiny_base)
    ws.train(["colour", "shape"])
    ws.merge([], names=["colour", "shape"])
    return ws


@pytest.fixture
def ws(taught, tmp_path):
    return copied(taught, tmp_path / "ws")


def settings(ws, **changes):
    return dataclasses.replace(ws.settings.config, **changes)


def without_probes(ws, task):
    """The task again, with no row set aside."""
    shutil.rmtree(ws.root / "tasks" / task)
    write_rows(ws.root / "tasks" / task / "train.jsonl", task, 24)
    write_rows(ws.root / "tasks" / task / "eval.jsonl", task, 8, 100)
    ws.add_task(task, probe_rows=0)


def test_earlier_rows_come_with_what_their_own_adapter_says_of_them(ws):
    task, config = ws.store.task("size"), ws.settings.config
    own = ws.rows(task, "train")[1]
    rows, table = with_replay(ws, task, own, ws.adapter("main@1"), config, 2)
    assert len(rows) == len(own) + 4
    told = own_words(own)
    assert torch.equal(table.ids[: len(told.ids), 0], told.ids[:, 0])
    assert bool((table.probabilities[: len(told.ids)].sum(1) == 1).all())
    base = ws.base_model(config)
    at = len(own)
    for name in ("colour", "shape"):
        kept = ws.rows(ws.store.task(name), "probe")[1][:2]
        updates = ws.weights(ws.adapter(f"{name}@1")).updates()
        for row, given in zip(rows[at : at + 2], kept, strict=True):
            assert list(row.ids) == list(given.ids)
            with attached(base.model, low_rank_layers(base.model, updates)), torch.no_grad():
                ids = torch.as_tensor(np.asarray(given.ids, np.int64))[None]
                logits = base.model(ids).logits[0]
            for place, i in zip(row.taught, range(row.prompt_length, len(row.ids)), strict=True):
                p, said = logits[i - 1].softmax(0).topk(32)
                expected = torch.zeros(len(logits[0]))
                expected[said] = (1 - LABELS) * p / p.sum()
                expected[int(row.ids[i])] += LABELS
                found = torch.zeros(len(logits[0]))
                found.index_add_(0, table.ids[place], table.probabilities[place])
                assert torch.allclose(found, expected, atol=1e-5)
        at += 2


def test_each_task_is_taught_by_the_adapter_that_it_was_taught_to(ws):
    """In a sequence that is the stage of the task, not the last one."""
    said = []
    ws.train(["colour", "shape"], sequence="line")
    ws.on_message = said.append
    ws.train(["size"], options=TrainOptions(start="line@2", line="on", replay=2, replay_general=0))
    replayed = [line for line in said if "replayed" in line]
    assert replayed == [
        "2 rows of colour#1 are replayed, line@1 teaches them",
        "2 rows of shape#1 are replayed, line@2 teaches them",
    ]
    own = len(ws.rows(ws.store.task("size"), "train")[0])
    assert ws.adapter("on@1").facts["rows"] == own + 4


@pytest.fixture(scope="module")
def sure_base(tiny_base, tmp_path_factory):
    """The tiny base with embeddings large enough to be sure of a token."""
    from transformers import LlamaForCausalLM

    folder = shutil.copytree(tiny_base, tmp_path_factory.mktemp("sure") / "base")
    model = LlamaForCausalLM.from_pretrained(tiny_base)
    model.get_input_embeddings().weight.data *= 20
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("projection", ["task", "nullspace"])
def test_a_sequence_that_replays_forgets_less(sure_base, tmp_path, projection):
    begun = make_workspace(tmp_path / "begun", sure_base, nullspace_energy=0.5)
    for name in ("colour", "size"):
        begun.add_task(name, scorer="perplexity", probe_rows=4)
    config = settings(begun, steps=80, dense_learning_rate=0.01, projection=projection)
    lost = {}
    for replay in (0, 3):
        ws = copied(begun, tmp_path / f"{replay}")
        options = TrainOptions(dense=True, replay=replay)
        stages = ws.train(["colour", "size"], config, options, sequence="line")
        before, after = ({s.task: s.value for s in stage.scores} for stage in stages)
        assert after["size"] < before["size"] - 2  # the new task is learned either way
        lost[replay] = after["colour"] - before["colour"]
    assert lost[3] < lost[0]
    if projection == "task":
        assert lost[0] > 1
        assert lost[3] < 0.2 * lost[0]
    blocks = ws.weights(ws.adapter("line@2")).blocks
    assert len(blocks) == (2 if projection == "nullspace" else 1)
    if projection == "nullspace":
        (old,) = ws.weights(ws.adapter("line@1")).blocks
        assert all(torch.equal(blocks[0].B[n], old.B[n]) for n in old.B)


def test_a_replaying_training_goes_on_to_the_same_bits(ws):
    config = settings(ws, checkpoint_seconds=0.0, steps=8)
    options = TrainOptions(start="main@1", line="on", replay=2)
    whole = ws.train(["size"], config, options)[0].adapter

    def stop(progress):
        if progress.phase.startswith("training") and progress.step == 5:
            raise KeyboardInterrupt

    quiet, ws.on_progress = ws.on_progress, stop
    with pytest.raises(KeyboardInterrupt):
        ws.train(["size"], config, options)
    ws.on_progress = quiet
    made = ws.train(["size"], config, options)[0].adapter
    assert (whole.ref, made.ref) == ("on@1", "on@2")
    assert made.digest == whole.digest
    less = ws.train(["size"], config, dataclasses.replace(options, replay=1))[0].adapter
    none = ws.train(["size"], config, dataclasses.replace(options, replay=0))[0].adapter
    assert len({whole.digest, less.digest, none.digest}) == 3
    assert made.config["options"]["replay"] == 2


def test_there_is_nothing_to_replay_of_the_task_itself(ws):
    options = TrainOptions(start="colour@1", line="on", replay=2, replay_general=0)
    made = ws.train(["colour"], options=options)[0]
    assert made.adapter.facts["rows"] == len(ws.rows(ws.store.task("colour"), "train")[0])


def test_replays_that_cannot_be_are_refused_before_anything_is_trained(ws):
    count = len(ws.store.adapters())
    with pytest.raises(InvalidInput, match=r"--from or --sequence"):
        ws.train(["size"], options=TrainOptions(replay=2))
    with pytest.raises(InvalidInput, match="0 or more"):
        ws.train(["size"], options=TrainOptions(start="main@1", replay=-1))
    without_probes(ws, "shape")
    with pytest.raises(InvalidInput, match="'shape' has no probe rows to replay"):
        ws.train(["size"], options=TrainOptions(start="main@1", line="on", replay=2))
    with pytest.raises(InvalidInput, match="'shape' has no probe rows to replay"):
        ws.train(["colour", "shape", "size"], options=TrainOptions(replay=2), sequence="line")
    assert len(ws.store.adapters()) == count
    assert ws.store.open_runs() == []
    ws.train(["colour", "shape"], options=TrainOptions(replay=2), sequence="line")  # it comes last


def test_the_teachers_words_do_not_depend_on_the_batch(ws):
    base = ws.base_model(ws.settings.config)
    rows = ws.rows(ws.store.task("colour"), "probe")[1]
    updates = ws.weights(ws.adapter("colour@1")).updates()
    one, other = (teacher_words(base, updates, rows, batch, labels=LABELS) for batch in (1, 8))
    assert torch.allclose(one.probabilities, other.probabilities, atol=1e-5)


def test_where_probe_rows_end_rows_that_were_trained_on_are_replayed_too(ws):
    task, config = ws.store.task("size"), ws.settings.config
    own = ws.rows(task, "train")[1]
    probes = len(ws.rows(ws.store.task("colour"), "probe")[1])
    rows, _ = with_replay(ws, task, own, ws.adapter("colour@1"), config, probes + 3)
    trained = ws.rows(ws.store.task("colour"), "train")[1][:3]
    assert len(rows) == len(own) + probes + 3
    for row, given in zip(rows[-3:], trained, strict=True):
        assert list(row.ids) == list(given.ids)


def test_general_text_comes_with_what_the_base_says_there(ws):
    task, config = ws.store.task("size"), ws.settings.config
    own = ws.rows(task, "train")[1]
    rows, table = with_replay(ws, task, own, None, config, 2, 3)
    assert len(rows) == len(own) + 3
    base = ws.base_model(config)
    with torch.no_grad():
        ids = torch.as_tensor(np.asarray(rows[-1].ids, np.int64))[None]
        said = base.model(ids).logits[0].argmax(-1)[:-1]
    assert torch.equal(table.ids[rows[-1].taught, 0], said)
    words = own_words([rows[-1]]).ids[:, 0]
    assert not torch.equal(said, words)


def test_a_replay_takes_general_text_along_from_the_first_stage(ws):
    """What is trained differs, and so does the plan: with it and without are two trainings."""
    digests = set()
    for count, general in enumerate((0, 4)):
        options = TrainOptions(replay=2, replay_general=general)
        first = ws.train(["colour", "shape"], options=options, sequence=f"line{count}")[0]
        digests.add(first.adapter.digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"replay": 2, "replay_general": -1}, "`replay_general` must be 0 or more"),
        ({"general_text": "a.txt"}, "counts with --replay alone"),
    ],
)
def test_general_text_that_could_not_count_is_refused(ws, changes, says):
    with pytest.raises(InvalidInput, match=says):
        ws.train(["size"], options=TrainOptions(start="colour@1", **changes))
