"""A task scored by what the model writes: added, trained, scored, audited, never run twice."""

import json
import math

import numpy as np
import pytest
from small_workspaces import DEFAULTS, copied, write_rows
from typer.testing import CliRunner

from lori_manager.cli.app import app
from lori_manager.engine.layers import attached, low_rank_layers
from lori_manager.errors import BadData, NotFound
from lori_manager.metrics.text import rouge_l
from lori_manager.tasks.scorers import scorers
from lori_manager.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")
# Enough for the tiny base to learn to write something like the completion.
SETTINGS = {"steps": 80, "rank": 16, "alpha": 32.0, "learning_rate": 0.05, "sparsity": 0.5}


@pytest.fixture(scope="module")
def told(begun, tmp_path_factory):
    """The task `tale`, scored by ROUGE-L, and tale@1, trained for it. Not to be changed."""
    folder = copied(begun, tmp_path_factory.mktemp("told") / "ws").root
    lines = [f"{key} = {json.dumps(value)}" for key, value in (DEFAULTS | SETTINGS).items()]
    (folder / "lori.toml").write_text("[defaults]\n" + "\n".join(lines))
    (folder / "tasks" / "tale").mkdir(parents=True)
    for split, count, first in (("train", 24, 0), ("eval", 8, 100)):
        rows = [
            {"prompt": f"{'so ' * (i % 4)}tale {first + i}:", "completion": " aa bb aa bb"}
            for i in range(count)
        ]
        file = folder / "tasks" / "tale" / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["-C", str(folder), "add-task", "tale", "--scorer", "rouge_l", "--probe-rows", "4"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "scored by rouge_l" in result.output
    workspace = Workspace.open(folder)
    workspace._model = begun._model
    workspace.train(["tale"])
    return workspace


@pytest.fixture
def ws(told, tmp_path):
    return copied(told, tmp_path / "ws")


def by_hand(ws, ref):
    """Each eval row's ROUGE-L: the most likely token, one after the other, alone."""
    import torch

    base = ws.base_model(ws.settings.config)
    layers = low_rank_layers(base.model, ws.weights(ws.adapter(ref)).updates())
    rows, encoded = ws.rows(ws.store.task("tale"), "eval")
    out = []
    with attached(base.model, layers), torch.no_grad():
        for row, e in zip(rows, encoded, strict=True):
            ids = [int(i) for i in e.ids[: e.prompt_length]]
            for _ in range(len(e.ids) - e.prompt_length + scorers.get("rouge_l").margin):
                ids.append(int(base.model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == base.tokenizer.eos_token_id:
                    break
            said = base.tokenizer.decode(ids[e.prompt_length :], skip_special_tokens=True)
            out.append(rouge_l(said, row.completion))
    return out


def test_what_is_stored_is_the_score_of_what_the_adapter_writes(ws):
    (score,) = ws.score(["tale@1"], ["tale"])
    (before,) = ws.score(["base"], ["tale"])
    outcomes, weights = ws.store.outcomes(score)
    assert weights is None
    assert np.allclose(outcomes, by_hand(ws, "tale@1"), atol=1e-6)
    assert score.value == pytest.approx(float(np.mean(outcomes)))
    assert (score.scorer, score.rows) == ("rouge_l", 8)
    assert score.facts == {"higher_is_better": True, "unit": "F-measure"}
    assert before.value < 0.1 < 0.2 < score.value < 1


def test_what_was_generated_once_is_never_generated_again(ws, monkeypatch):
    refs = ["base", "tale@1"]
    first = ws.score(refs, ["tale"])

    def fails(*_, **__):
        raise AssertionError("generated")

    monkeypatch.setattr("lori_manager.generation.generate", fails)
    assert ws.score(refs, ["tale"]) == first
    with pytest.raises(AssertionError, match="generated"):
        ws.score(["shape@1"], ["tale"])


def test_progress_is_told_for_every_batch_of_rows(ws):
    seen = []
    ws.on_progress = seen.append
    ws.score(["shape@1"], ["tale"])
    assert [(p.step, p.steps) for p in seen] == [(8, 8)]
    assert "shape@1 on tale" in seen[0].phase


def test_the_audit_compares_outcomes_that_are_not_right_or_wrong(ws):
    ws.score(["base", "tale@1"], ["tale"])
    (task,) = [t for t in ws.audit().tasks if t.task == "tale"]
    entry = next(e for e in task.entries if e.subject == "tale@1")
    assert task.scorer == "rouge_l"
    assert entry.rows == 8
    assert math.isfinite(entry.value)


def test_another_scorer_of_the_same_rows_is_a_new_revision(ws):
    assert ws.add_task("tale", scorer="rouge_l", probe_rows=4).task.ref == "tale#1"
    assert ws.add_task("tale", scorer="text_match", probe_rows=4).task.ref == "tale#2"
    outcomes = ws.store.outcomes(ws.score(["tale@1"], ["tale"])[0])[0]
    exact = ws.add_task("tale", scorer="exact_match", probe_rows=4)
    assert exact.task.ref == "tale#3"
    assert np.array_equal(ws.store.outcomes(ws.score(["tale@1"], ["tale"])[0])[0], outcomes)


def test_rows_that_the_scorer_cannot_read_and_unknown_scorers_store_nothing(ws):
    before = ws.store.tasks()
    write_rows(ws.root / "tasks" / "wordy" / "eval.jsonl", "colour", 4)
    with pytest.raises(BadData, match=r"eval.jsonl.*nothing that `number_match` could compare"):
        ws.add_task("wordy", scorer="number_match")
    with pytest.raises(
        NotFound, match=r"exact_match.*rouge_l, bleu, chrf, token_f1, number_match, contains"
    ):
        ws.add_task("wordy", scorer="meteor")
    assert ws.store.tasks() == before


def test_scorers_names_complete_on_the_command_line():
    from lori_manager.cli import complete

    assert complete.scorers("") == scorers.names()
    assert complete.scorers("rou") == ["rouge_l"]
