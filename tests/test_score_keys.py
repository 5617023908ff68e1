"""What a score is known by: whatever changes an outcome must be part of it, and nothing else."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from small_workspaces import make_workspace, write_rows

from lori_manager import Workspace, context, models
from lori_manager.config import Config


@pytest.fixture(scope="module")
def scored(tiny_base, tmp_path_factory):
    """A workspace on a base of its own whose base is scored; precision is "auto"."""
    folder = tmp_path_factory.mktemp("scored")
    base = shutil.copytree(tiny_base, folder / "base")
    workspace = make_workspace(folder / "ws", base, precision="auto")
    workspace.score(["base"])
    workspace.close()
    return folder


@pytest.fixture
def ws(scored, tmp_path):
    """A copy of the workspace, with a base of its own to change."""
    shutil.copytree(scored / "base", tmp_path / "base")
    shutil.copytree(scored / "ws", tmp_path / "ws")
    with Workspace.open(tmp_path / "ws") as workspace:
        workspace.move_base(str(tmp_path / "base"))
        yield workspace


def known(ws, **settings):
    """Whether the base's score on a task is found, in a process that has just begun."""
    with Workspace.open(ws.root) as again:
        config = again.settings.config.replace(**settings)
        task = again.store.task("colour")
        keys = [(task, task.scorer, task.scorer_version)]
        return again.store.find_scores(
            again.store.base().fingerprint, keys,
            precision=again.score_precision(config), encoding=again.encoding,
        ) != [None]  # fmt: skip


def edit(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(values))


def test_a_score_is_known_in_another_process(ws):
    assert known(ws)


def test_another_precision_or_another_number_of_bits_is_another_score(ws):
    assert known(ws, precision="fp32") != known(ws, precision="bf16")
    assert not known(ws, base_bits=4)


def test_longer_rows_are_scored_anew(ws):
    toml = ws.root / "lori.toml"
    before = toml.read_text()
    toml.write_text(before.replace("max_length = 64", "max_length = 65"))
    assert not known(ws)
    toml.write_text(before)
    assert known(ws)


@pytest.mark.parametrize(
    ("file", "change", "same"),
    [
        ("config.json", {"rope_theta": 77.0}, False),
        ("config.json", {"max_position_embeddings": 64}, False),
        ("config.json", {"transformers_version": "0.0", "dtype": "float16"}, True),
        ("generation_config.json", {"eos_token_id": 7}, False),
        ("tokenizer_config.json", {"add_bos_token": True}, False),
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}, True),
        ("tokenizer.json", {"added_tokens": []}, False),
    ],
)
def test_what_makes_other_tokens_or_another_model_of_the_weights_is_another_score(
    ws, file, change, same
):
    edit(ws.root.parent / "base" / file, **change)
    assert known(ws) == same


def test_other_rows_and_another_version_of_the_scorer_are_other_scores(ws, monkeypatch):
    from lori_manager.tasks.scorers import scorers

    (before,) = ws.score(["base"], ["colour"])
    monkeypatch.setattr(type(scorers.get("exact_match")), "version", "a-digest-of-its-source")
    (after,) = ws.score(["base"], ["colour"])
    assert (before.scorer_version, after.scorer_version) == ("1", "a-digest-of-its-source")
    assert before.id != after.id
    write_rows(ws.root / "tasks" / "colour" / "eval.jsonl", "colour", 9, 300)
    ws.add_task("colour", probe_rows=4)
    assert (before.task_revision, after.task_revision) == (1, 2)  # another scorer, another task
    assert ws.score(["base"], ["colour"])[0].task_revision == 3


def test_how_fast_it_is_scored_is_no_part_of_what_is_known(ws):
    for setting in ({"score_batch": 1}, {"packing": "off"}, {"kernels": "off"}):
        assert known(ws, **setting)


def test_damaged_outcomes_are_measured_anew(ws):
    before = ws.score(["base"])
    outcomes = [values for values, _ in ws.store.outcomes_of(before)]
    with ws.store._db.write() as c:
        c.exec_driver_sql("UPDATE score_pages SET bodies = zeroblob(length(bodies))")
    assert not known(ws)
    assert ws.score(["base"]) == before
    for values, (again, _) in zip(outcomes, ws.store.outcomes_of(before), strict=True):
        np.testing.assert_array_equal(values, again)


def test_the_second_evaluation_loads_no_model_and_no_torch(ws):
    script = (
        "import sys\n"
        "from lori_manager.cli.app import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = ('torch', 'transformers', 'peft', 'alembic', 'numpy')\n"
        "print([m for m in heavy if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "-C", str(ws.root), "score", "base"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "colour" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_auto_means_is_asked_again_on_another_machine(ws, monkeypatch):
    config = Config(precision="auto")
    asked = []

    def resolve(precision):
        asked.append(precision)
        return "bf16" if precision == "auto" else precision

    monkeypatch.setattr(models, "resolve_precision", resolve)
    here = ws.score_precision(config)
    assert "auto" not in asked  # it is remembered from the first scoring
    monkeypatch.setattr(models, "machine_stamp", lambda: ["elsewhere"])
    assert (ws.score_precision(config), asked.count("auto")) == ("bf16", 1)
    assert (ws.score_precision(config), asked.count("auto")) == ("bf16", 1)
    for broken in ("", "[]", '{"machine": ["elsewhere"], "precision": "fp64"}'):
        (ws.store.root / context.MACHINE).write_text(broken)
        ws.score_precision(config)
    assert asked.count("auto") == 4
    monkeypatch.undo()
    assert ws.score_precision(config) == here
