"""`lori promote`, `rollback`, `journal` and `audit --gate`, as typed."""

import json


def test_a_first_promotion_passes_and_is_journalled(trained):
    shown = trained("promote", "colour@1", "--reason", "first").stdout
    assert "nothing held the alias before" in shown
    assert "colour@production means colour@1" in shown
    (entry,) = trained.json("journal")
    assert (entry["action"], entry["to_version"], entry["reason"]) == ("promoted", 1, "first")
    assert entry["verdict"]["format"] == "lori-gate"
    assert "promoted" in trained("journal", "colour").stdout


def test_what_is_refused_exits_with_12_and_says_why(trained):
    (trained.folder / "lori.toml").open("a").write("\n[gate]\nminimum = 1.01\n")
    result = trained("promote", "colour@1", code=12)
    assert "misses the minimum 1.01" in result.stdout
    assert "may not become production" in result.stderr
    assert trained.json("alias") == []
    result = trained("audit", "colour@1", "--gate", "--against", "base", code=12)
    assert "misses the minimum 1.01" in result.stdout
    assert "misses the minimum 1.01" in result.stderr
    trained("promote", "colour@1", "--force", "--reason", "a test")
    (entry,) = trained.json("journal")
    assert entry["forced"] is True
    assert entry["verdict"]["passed"] is False


def test_the_gate_in_ci_takes_the_lines_that_have_the_alias(trained):
    assert "no line has the alias" in trained.refuses("audit", "--gate", code=4)
    trained("promote", "colour@1")
    (found,) = json.loads(trained("audit", "--gate", "--json").stdout)
    assert (found["candidate"], found["against"], found["passed"]) == ("colour@1", "colour@1", True)
    assert "--gate goes with" in trained.refuses("audit", "--gate", "--task", "colour", code=2)


def test_there_is_nothing_to_roll_back_to_at_first(trained):
    assert "no alias" in trained.refuses("rollback", "production", code=4)
    trained("promote", "colour@1")
    assert "nothing to roll back to" in trained.refuses("rollback", "production", code=10)
