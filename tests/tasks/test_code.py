"""pass@1: which program is run, with which tests, and what rows are refused."""

import pytest

from lori_manager.errors import BadData
from lori_manager.tasks.code import checks_of, program_of
from lori_manager.tasks.rows import Row, parse_row, rows_from_jsonl, rows_to_jsonl
from lori_manager.tasks.scorers import scorers

PASS = scorers.get("pass_at_1")
# In the manner of HumanEval's rows; the problem is ours.
PROMPT = 'import math\n\n\ndef double(x: int) -> int:\n    """Twice x: double(2) is 4."""\n'
CHECK = """METADATA = {}


def check(candidate):
    assert candidate(2) == 4
    assert candidate(-1) == -2
"""
HUMAN = Row(PROMPT, "    return 2 * x\n", (), {"tests": CHECK, "entry_point": "double"})
# In the manner of MBPP's.
ASSERTS = ["assert double(2) == 4", "assert double(0) == 0"]
MBPP = Row(
    "Write a function double that doubles.", "def double(x): return x + x", (), {"tests": ASSERTS}
)


def judged(text, row):
    outcome, weight = PASS.outcome(text, row.completion, row)
    assert weight == 1.0
    return outcome


@pytest.mark.parametrize("row", [HUMAN, MBPP], ids=["humaneval", "mbpp"])
def test_a_rows_own_completion_passes_and_a_wrong_one_does_not(row):
    assert judged(row.completion, row) == 1.0
    assert judged(row.completion.replace("x + x", "x").replace("2 * x", "x"), row) == 0.0
    assert judged("", row) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "    return 2 * x\n\n\ndef other():\n    return (",
        "    return 2 * x\n\nprint(double(3) +",
        "    return 2 * x\n# That is\nall (",
        "Sure:\n```python\ndef double(x):\n    return 2 * x\n```\nIt doubles x.",
        "```\ndef double(x):\n    return 2 * x\n```",
        "```py\n    return 2 * x\n```",
        "def double(x):\n    return helper(x)\n\n\ndef helper(x):\n    return 2 * x\n",
        "```python\ndef double(x):\n    return 2 * x",
    ],
)
def test_what_a_model_writes_around_its_program_is_left_out(text):
    assert judged(text, HUMAN) == 1.0


def test_the_prompt_is_put_before_what_goes_on_from_it_and_only_then():
    assert program_of("    return 2 * x", HUMAN) == PROMPT + "    return 2 * x\n"
    assert program_of("def double(x): return 0", HUMAN) == "def double(x): return 0"
    assert program_of("x = 1", MBPP) == "x = 1"
    unnamed = Row(PROMPT, "x", (), {"tests": CHECK})
    assert program_of("    return 1", unnamed) == "    return 1"


def test_tests_are_taken_whole_and_check_is_called():
    assert checks_of(HUMAN) == CHECK + "\n\ncheck(double)\n"
    assert checks_of(MBPP) == "\n".join(ASSERTS) + "\n"


def test_rows_with_tests_come_back_from_the_store_as_they_were():
    for row in (HUMAN, MBPP):
        (back,) = rows_from_jsonl(rows_to_jsonl([row]))
        assert back == row
        assert checks_of(back) == checks_of(row)
        told = {"prompt": row.prompt, "completion": row.completion, **row.extra}
        assert parse_row(told, "line 1") == row


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({}, "needs `tests`.* found null"),
        ({"tests": []}, "needs `tests`.* found a list of 0"),
        ({"tests": [1]}, "needs `tests`"),
        ({"tests": ""}, "every program would pass"),
        ({"tests": "assert f(:"}, "no Python"),
        ({"tests": CHECK}, "every program would pass; .*entry_point"),
        ({"tests": "import math\nx = 1\n'text'"}, "every program would pass"),
        ({"tests": CHECK, "entry_point": "a b"}, "`entry_point` must be a name"),
        ({"tests": CHECK, "entry_point": 3}, "`entry_point` must be a name"),
    ],
)
def test_rows_that_cannot_be_judged_are_refused_by_place(extra, problem):
    row = Row("p", "c", (), extra, "eval.jsonl, line 7")
    with pytest.raises(BadData, match=f"^eval.jsonl, line 7: .*{problem}"):
        PASS.check(None, row, None)
    PASS.check(None, HUMAN, None)


def test_the_program_cannot_swallow_or_skip_its_tests():
    for text in ('"""', "if False:\n", "import sys; sys.exit(0)", "raise SystemExit(0)",
                 "def check(f): pass\ndef double(x): return 0",
                 "import os; os._exit(0)", "def double(x): raise SystemExit"):  # fmt: skip
        assert judged(text, MBPP) == 0.0, text
        assert judged(text, HUMAN) == 0.0, text
