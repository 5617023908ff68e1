"""The gate, promotions and rollbacks, on outcomes that were stored, not run."""

import json

import numpy as np
import pytest
from small_workspaces import make_workspace, write_rows

from lori_manager.config import Gate, GateRule, load_settings
from lori_manager.errors import BadData, Conflict, GateRefused, InvalidInput, NotFound
from lori_manager.records import NewAdapter
from lori_manager.workspace import Workspace

ROWS = 400


@pytest.fixture
def ws(tiny_base, tmp_path):
    """One task of many rows, and one that is only evaluated; nothing is trained or scored."""
    found = make_workspace(tmp_path / "ws", tiny_base)
    for task in ("colour", "shape"):
        write_rows(found.root / "tasks" / task / "eval.jsonl", task, ROWS, 1000)
        found.add_task(task, probe_rows=4)
    return found


def version(ws, scores, line="main", task="colour"):
    """The line's next version, with right answers on the first so many rows of each task."""
    made = ws.store.add_adapter(
        NewAdapter(
            line=line, origin="trained", task=task, task_revision=ws.store.task(task).revision,
            mask=None, parents=(), method="lori-d", rank=4, projection=None,
            base=ws.store.base().fingerprint,
        ),
        f"{line} {scores} {len(ws.store.adapters())}".encode(),
    )  # fmt: skip
    for name, right in scores.items():
        outcomes = np.zeros(ws.store.task(name).splits["eval"].rows)
        outcomes[np.asarray(right) if not isinstance(right, int) else slice(right)] = 1
        file = ws.root / "outcomes.jsonl"
        rows = ({"row": i, "value": float(x)} for i, x in enumerate(outcomes))
        file.write_text("\n".join(json.dumps(row) for row in rows))
        ws.add_outcomes(made.ref, name, file, "tests")
    return made


def told(ws, text):
    path = ws.root / "lori.toml"
    path.write_text(path.read_text().replace("[defaults]", f"{text}\n[defaults]"))
    return Workspace.open(ws.root)


def test_an_equal_version_is_safe_and_passes(ws):
    version(ws, {"colour": 360})
    version(ws, {"colour": 360})
    found = ws.gate("main@2", "main@1")
    (one,) = found.tasks
    assert found.passed
    assert (one.judged.verdict, one.before, one.after) == ("safe", 0.9, 0.9)
    assert one.reuse == 2
    assert found.refusals == found.warnings == ()


def test_a_drop_is_refused_with_its_size(ws):
    version(ws, {"colour": 360})
    version(ws, {"colour": 320})
    found = ws.gate("main@2", "main@1")
    assert not found.passed
    assert found.tasks[0].judged.verdict == "regressed"
    assert "colour#2: regressed by 0.1" in found.refusals[0]


def test_what_the_rows_cannot_tell_warns_or_refuses_as_the_settings_say(ws):
    version(ws, {"colour": 360})
    rng = np.random.default_rng(0)
    version(ws, {"colour": rng.permutation(ROWS)[:360]})
    found = ws.gate("main@2", "main@1")
    assert found.tasks[0].judged.verdict == "undecided"
    assert found.passed
    assert "rows would decide it" in found.warnings[0]
    strict = told(ws, '[gate]\nundecided = "refuse"').gate("main@2", "main@1")
    assert not strict.passed
    assert "undecided" in strict.refusals[0]


def test_a_wide_margin_makes_a_drop_safe_for_that_task_alone(ws):
    version(ws, {"colour": 360, "shape": 360})
    version(ws, {"colour": 330, "shape": 330})
    found = told(ws, "[gate.tasks.shape]\nmargin = 0.15").gate("main@2", "main@1")
    verdicts = {one.task: one.judged.verdict for one in found.tasks}
    assert verdicts == {"colour": "regressed", "shape": "safe"}


def test_a_score_below_the_minimum_is_refused_also_with_nothing_to_compare(ws):
    version(ws, {"colour": 300})
    found = told(ws, "[gate]\nminimum = 0.8").gate("main@1")
    assert found.refusals == ("colour#2: its score 0.75 misses the minimum 0.8",)
    assert found.tasks[0].judged is None


def test_rows_that_must_stay_right_are_found_by_text_index_and_key(ws):
    version(ws, {"colour": 399})
    rows = [json.loads(x) for x in (ws.root / "tasks/colour/eval.jsonl").read_text().splitlines()]
    keys = ws.store.eval_keys(ws.store.task("colour"))
    lines = [{"row": 0}, {"row": keys[1].hex()}, rows[2], rows[399]]
    (ws.root / "stay.jsonl").write_text("\n".join(json.dumps(x) for x in lines))
    strict = told(ws, '[gate.tasks.colour]\nmust_stay = "stay.jsonl"')
    found = strict.gate("main@1")
    assert [(row.row, row.outcome) for row in found.tasks[0].broken] == [(399, 0.0)]
    assert found.refusals == ("colour#2: 1 of 4 rows that must stay right are not: 399",)
    (ws.root / "stay.jsonl").write_text('{"prompt": "never seen", "completion": " x"}')
    with pytest.raises(BadData, match=r"stay.jsonl, line 1: expected .*add the example"):
        strict.gate("main@1")
    (ws.root / "stay.jsonl").unlink()
    with pytest.raises(NotFound, match="must_stay"):
        strict.gate("main@1")


def test_a_task_that_was_not_scored_refuses(ws):
    version(ws, {"colour": 360})
    version(ws, {})
    found = ws.gate("main@2", "main@1")
    assert found.refusals == ("colour#2: it was not scored: run `lori score`",)


def test_scores_of_another_origin_or_precision_are_not_compared(ws):
    version(ws, {"colour": 360})
    version(ws, {})
    file = ws.root / "outcomes.jsonl"
    ws.add_outcomes("main@2", "colour", file, "elsewhere")
    found = ws.gate("main@2", "main@1")
    assert found.tasks[0].judged is None
    assert found.refusals == (
        "colour#2: main@1 has no score to compare with, measured in the same way: run "
        "`lori score main@1 main@2`",
    )


def test_a_promotion_moves_the_alias_and_a_refused_one_does_not(ws):
    ws = told(ws, "[gate]\nmargin = 0.02")
    version(ws, {"colour": 360})
    version(ws, {"colour": 320})
    moved, found = ws.promote("main@1")
    assert (moved.ref, moved.version, found.against) == ("main@production", 1, None)
    with pytest.raises(GateRefused, match="main@2 may not become production: colour#2: regressed"):
        ws.promote("main@2")
    assert ws.store.line("main").aliases == {"production": 1}
    with pytest.raises(InvalidInput, match="--force needs --reason"):
        ws.promote("main@2", force=True, reason=" ")
    moved, _ = ws.promote("main@2", force=True, reason="the old one leaks")
    assert moved.version == 2
    first, second = ws.store.journal("main")
    assert (first.action, first.forced, first.verdict["passed"]) == ("promoted", False, True)
    assert (second.from_version, second.to_version, second.forced) == (1, 2, True)
    assert second.reason == "the old one leaks"
    assert second.verdict["tasks"][0]["judged"]["verdict"] == "regressed"


def test_rolling_back_goes_one_further_back_each_time(ws):
    for _ in range(3):
        version(ws, {"colour": 360})
    for number in (1, 2, 3):
        ws.promote(f"main@{number}")
    assert ws.rollback("production").version == 2
    assert ws.rollback("main@production", "worse still").version == 1
    with pytest.raises(Conflict, match="nothing to roll back to"):
        ws.rollback("production")
    ws.promote("main@3")
    assert ws.rollback("production").version == 1
    moves = [(e.action, e.from_version, e.to_version) for e in ws.store.journal("main")]
    assert moves[3:5] == [("rolled back", 3, 2), ("rolled back", 2, 1)]
    with pytest.raises(NotFound, match="no alias"):
        ws.rollback("staging")


def test_an_alias_that_somebody_moved_meanwhile_stays(ws):
    for _ in range(3):
        version(ws, {"colour": 360})
    ws.promote("main@1")
    with pytest.raises(Conflict, match="means main@1 by now"):
        ws.store.set_alias("main", "production", 2, expected=None)
    with pytest.raises(Conflict, match="means main@1 by now"):
        ws.store.set_alias("main", "production", 2, expected=3)
    assert ws.store.set_alias("main", "production", 2, expected=1).version == 2


def test_tasks_that_are_only_evaluated_are_judged_always(ws, tmp_path):
    file = write_rows(tmp_path / "general.jsonl", "size", 40, 7)
    ws.add_task("general", eval=str(file))
    version(ws, {"colour": 360, "general": 40})
    version(ws, {"colour": 360, "general": 20})
    found = ws.gate("main@2", "main@1")
    assert {one.task: one.judged.verdict for one in found.tasks} == {
        "colour": "safe", "general": "regressed",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[gate]\nmargin = -1", "`margin` of a gate must be at least 0"),
        ("[gate]\nconfidence = 1", "`confidence` of a gate must be above 0.5"),
        ('[gate]\nundecided = "maybe"', "`undecided` must be one of warn, refuse"),
        ("[gate]\nmargins = 1", "unknown key 'margins' in \\[gate\\]"),
        ('[gate]\nmust_stay = "a"', "unknown key 'must_stay' in \\[gate\\]"),
        ("[gate.tasks.a]\nminimum = true", "`minimum` of a gate must be a number"),
        ("[gate.tasks]\na = 1", "must hold a table a task"),
        ("gate = 3", "must be tables"),
    ],
)
def test_settings_that_no_gate_can_use_are_refused(tmp_path, text, says):
    (tmp_path / "lori.toml").write_text(text)
    with pytest.raises(InvalidInput, match=says):
        load_settings(tmp_path / "lori.toml")


def test_a_tasks_own_rule_wins_over_that_of_all():
    gate = Gate.from_json({"margin": 1, "tasks": {"a": {"minimum": 0.5}}})
    assert gate.rule("a") == GateRule(1.0, 0.95, 0.5, None)
    assert gate.rule("b") == GateRule(1.0)


def test_the_document_fits_the_schema_that_is_shipped(ws):
    from importlib.resources import files

    import jsonschema

    schema = json.loads((files("lori_manager") / "schemas" / "gate.json").read_text("utf-8"))
    version(ws, {"colour": 360})
    version(ws, {"colour": 320})
    (ws.root / "stay.jsonl").write_text('{"row": 350}')
    ws = told(ws, '[gate.tasks.colour]\nmust_stay = "stay.jsonl"\nminimum = 0.85')
    for found in (ws.gate("main@2", "main@1"), ws.gate("main@1")):
        document = json.loads(json.dumps(found.to_json(), allow_nan=False))
        jsonschema.validate(document, schema)
    assert document["tasks"][0]["judged"] is None
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document | {"more": 1}, schema)


def test_a_promotion_does_not_pass_over_another_that_came_meanwhile(ws, monkeypatch):
    from lori_manager import gating

    for _ in range(3):
        version(ws, {"colour": 360})
    ws.promote("main@1")
    judged = gating.gate

    def slow(*args, **options):
        found = judged(*args, **options)
        ws.store.set_alias("main", "production", 3)
        return found

    monkeypatch.setattr(gating, "gate", slow)
    with pytest.raises(Conflict, match="means main@3 by now"):
        ws.promote("main@2")
    assert ws.store.line("main").aliases == {"production": 3}
