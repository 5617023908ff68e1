"""Scorers at work in a workspace: what is refused before a model is loaded, what begins anew."""

import json

import numpy as np
import pytest
from small_workspaces import copied, make_workspace, write_rows

from lori_manager.errors import BadData, InvalidInput, NotFound
from lori_manager.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")
OWN = "def words(text, row):\n    return len(text) + len(row.completion)\n"


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    ws = make_workspace(tmp_path_factory.mktemp("scorers") / "ws", tiny_base)
    ws.train(["colour"])
    return ws


@pytest.fixture
def workspace(trained, tmp_path):
    ws = copied(trained, tmp_path / "ws")
    with (ws.root / "lori.toml").open("a") as file:
        file.write('[scorers]\nmine = "own.py:words"\n')
    (ws.root / "own.py").write_text(OWN)
    write_rows(ws.root / "said.jsonl", "colour", 4, 50)
    rows = [
        {
            "prompt": f"p{i}",
            "completion": "x",
            "tests": "import os\nassert not os.environ.get('HOME')",
        }
        for i in range(3)
    ]
    code = "".join(json.dumps(row) + "\n" for row in rows)
    (ws.root / "code.jsonl").write_text(code)
    return ws


def no_model(ws, monkeypatch):
    monkeypatch.setattr(type(ws), "base_model", lambda *_: pytest.fail("a model was loaded"))


def outcomes(ws, ref, task):
    (score,) = ws.score([ref], [task])
    return ws.store.outcomes(score)[0]


def test_a_function_of_the_users_scores_rows(workspace):
    added = workspace.add_task("own", eval=str(workspace.root / "said.jsonl"), scorer="mine")
    assert added.task.scorer == "mine"
    found = outcomes(workspace, "colour@1", "own")
    assert found.shape == (4,)
    assert np.all(found >= len(" red"))
    assert outcomes(workspace, "base", "own").shape == (4,)


def test_changed_code_begins_a_revision_and_shares_no_score(workspace, monkeypatch):
    workspace.add_task("own", eval=str(workspace.root / "said.jsonl"), scorer="mine")
    before = outcomes(workspace, "colour@1", "own")
    again = Workspace.open(workspace.root)
    with monkeypatch.context() as m:
        no_model(again, m)
        assert np.array_equal(outcomes(again, "colour@1", "own"), before)
    (workspace.root / "own.py").write_text(OWN.replace("len(text)", "1000 + len(text)"))
    changed = Workspace.open(workspace.root)
    changed._model = workspace._model
    told = []
    changed.on_message = told.append
    assert np.array_equal(outcomes(changed, "colour@1", "own"), before + 1000)
    assert any("`mine` is not what it was when own#1 was added: own#2 begins" in t for t in told)
    task = changed.store.task("own")
    assert task.revision == 2
    assert task.splits == changed.store.task("own", 1).splits
    (workspace.root / "own.py").write_text(OWN)
    back = Workspace.open(workspace.root)
    back._model = workspace._model
    assert np.array_equal(outcomes(back, "colour@1", "own"), before)
    assert back.store.task("own").revision == 3


def test_an_edit_while_scores_are_made_changes_none_of_them(workspace):
    workspace.add_task("own", eval=str(workspace.root / "said.jsonl"), scorer="mine")
    version = workspace.store.task("own").scorer_version
    expected = outcomes(workspace, "colour@1", "own")
    (workspace.root / "own.py").write_text("def words(text, row): return -1.0\n")
    assert np.array_equal(outcomes(workspace, "colour@1", "own"), expected)
    (score,) = workspace.score(["base"], ["own"])
    assert score.scorer_version == version
    assert score.value > 0


def test_a_broken_function_is_told_before_a_model_is_loaded(workspace, monkeypatch):
    (workspace.root / "own.py").write_text("import nothing_of_that_name\n")
    workspace.add_task("own", eval=str(workspace.root / "said.jsonl"), scorer="mine")
    no_model(workspace, monkeypatch)
    with pytest.raises(BadData, match=r"own.py, line 1\) cannot be loaded"):
        workspace.score(["base"], ["own"])


def test_a_function_that_says_no_number_stores_nothing(workspace):
    (workspace.root / "own.py").write_text("def words(text, row): return float('nan')\n")
    workspace.add_task("own", eval=str(workspace.root / "said.jsonl"), scorer="mine")
    with pytest.raises(BadData, match="`mine` said nan"):
        workspace.score(["base"], ["own"])
    assert workspace.store.scores(task="own") == []


def test_no_program_runs_unless_it_is_asked_for(workspace, monkeypatch):
    workspace.add_task("code", eval=str(workspace.root / "code.jsonl"), scorer="pass_at_1")
    config = workspace.settings.config
    with monkeypatch.context() as m:
        no_model(workspace, m)
        with pytest.raises(InvalidInput, match=r"--run-code.*run_code = true"):
            workspace.score(["base"], ["code"])
    told = []
    workspace.on_message = told.append
    (score,) = workspace.score(["base"], ["code"], config.replace(run_code=True))
    assert score.rows == 3
    assert score.scorer == "pass_at_1"
    assert any(t.startswith("programs run confined by ") for t in told)
    with monkeypatch.context() as m:  # what is scored needs no permission
        no_model(workspace, m)
        assert workspace.score(["base"], ["code"]) == [score]


def test_training_is_refused_before_it_begins_where_its_scores_would_be(workspace, monkeypatch):
    write_rows(workspace.root / "train.jsonl", "colour", 8, 900)
    workspace.add_task(
        "code",
        train=str(workspace.root / "train.jsonl"),
        eval=str(workspace.root / "code.jsonl"),
        scorer="pass_at_1",
    )
    workspace.train(["shape"])
    no_model(workspace, monkeypatch)
    with pytest.raises(InvalidInput, match="--run-code"):
        workspace.train(["code"])
    monkeypatch.undo()
    trained = workspace.train(["code"], workspace.settings.config.replace(run_code=True))
    assert trained[0].scores[0].scorer == "pass_at_1"
    no_model(workspace, monkeypatch)
    with pytest.raises(InvalidInput, match="--run-code"):
        workspace.merge(["code@1", "shape@1"])
    # The permission changes nothing of a result, so it is no part of a plan.
    monkeypatch.undo()
    assert workspace.merge(
        ["code@1", "shape@1"], method="concat",
        config=workspace.settings.config.replace(run_code=True),
    ).adapter.ref == "main@1"  # fmt: skip


def test_a_library_is_missed_before_a_model_is_loaded(workspace, monkeypatch):
    workspace.add_task("said", eval=str(workspace.root / "said.jsonl"), scorer="bleu")
    monkeypatch.setattr("lori_manager.extras.find_spec", lambda _: None)
    no_model(workspace, monkeypatch)
    with pytest.raises(InvalidInput, match=r'pip install "lori-manager\[scorers\]"'):
        workspace.score(["base"], ["said"])


@pytest.mark.parametrize("scorer", ["rouge_l", "bleu", "chrf", "refusal", "over_refusal"])
def test_every_scorer_of_text_stores_an_outcome_a_row(workspace, scorer):
    workspace.add_task("said", eval=str(workspace.root / "said.jsonl"), scorer=scorer)
    (score,) = workspace.score(["base"], ["said"])
    assert score.rows == 4
    assert 0 <= score.value <= 1
    assert score.facts["higher_is_better"] is (scorer != "over_refusal")


def test_an_unknown_scorer_is_told_with_all_there_are(workspace):
    with pytest.raises(NotFound, match=r"no scorer is called 'ours'; .*pass_at_1, mine"):
        workspace.add_task("own", eval=str(workspace.root / "said.jsonl"), scorer="ours")
