"""A user's function as a scorer: loaded when used, versioned by its source, told when it fails."""

import pytest

from lori_manager.config import ScorerEntry, load_settings
from lori_manager.errors import BadData, InvalidInput, NotFound
from lori_manager.tasks.choosing import find_scorer
from lori_manager.tasks.encoding import Encoded
from lori_manager.tasks.own import own_scorer
from lori_manager.tasks.rows import Row

ROW = Row("p", "please", (), {"tone": "kind"}, "eval.jsonl, line 3")
POLITE = "def polite(text, row):\n    return float(row.completion in text)\n"


def scorer(folder, source=POLITE, **told):
    (folder / "own.py").write_text(source)
    return own_scorer("mine", ScorerEntry("own.py", "polite", **told), folder)


def test_the_function_is_given_the_text_and_the_row(tmp_path):
    mine = scorer(tmp_path)
    assert mine.outcome("yes please", "decoded", ROW) == (1.0, 1.0)
    assert mine.outcome("yes", "decoded", ROW) == (0.0, 1.0)
    other = "def polite(text, row):\n    return len(text) if row.extra['tone'] == 'kind' else -1\n"
    assert scorer(tmp_path, other).outcome("abc", "", ROW) == (3.0, 1.0)


def test_nothing_of_the_file_is_run_before_something_is_scored(tmp_path):
    mine = scorer(tmp_path, f"open({str(tmp_path / 'ran')!r}, 'w')\n{POLITE}")
    assert mine.version
    mine.check(None, ROW, None)
    assert mine.new_tokens([Encoded([1, 2, 3], 1)]) == 130
    assert not (tmp_path / "ran").exists()
    assert mine.ready(run_code=False) == "scorer `mine` is own.py:polite"
    assert (tmp_path / "ran").exists()


def test_the_version_is_the_sources_and_the_settings(tmp_path):
    first = scorer(tmp_path).version
    assert scorer(tmp_path).version == first
    others = {
        scorer(tmp_path, POLITE + "\n").version,
        scorer(tmp_path, POLITE, higher_is_better=False).version,
        scorer(tmp_path, POLITE, new_tokens=5).version,
        scorer(tmp_path, POLITE, unit="smiles").version,
    }
    assert len(others | {first}) == 5
    assert len(first) == 16


def test_what_was_read_is_what_runs_whatever_becomes_of_the_file(tmp_path):
    mine = scorer(tmp_path)
    (tmp_path / "own.py").write_text("def polite(text, row): return 7.0\n")
    assert mine.outcome("please", "", ROW) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("said", "shown"),
    [("None", "None .NoneType"), ("'1'", "'1' .str"), ("float('nan')", "nan .float"),
     ("float('inf')", "inf"), ("[1]", r"\[1\] .list"), ("1j", "1j .complex")],
)  # fmt: skip
def test_what_is_no_finite_number_is_told_with_the_row(tmp_path, said, shown):
    mine = scorer(tmp_path, f"def polite(text, row):\n    return {said}\n")
    with pytest.raises(BadData, match=rf"`mine` said {shown}.* of eval.jsonl, line 3; .*own.py"):
        mine.outcome("x", "", ROW)


@pytest.mark.parametrize("said", ["True", "3", "__import__('numpy').float32(0.5)",
                                  "__import__('fractions').Fraction(1, 2)"])  # fmt: skip
def test_any_real_number_will_do(tmp_path, said):
    mine = scorer(tmp_path, f"def polite(text, row):\n    return {said}\n")
    outcome, _ = mine.outcome("x", "", ROW)
    assert type(outcome) is float


def test_what_it_raises_is_told_by_line_of_the_file(tmp_path):
    mine = scorer(tmp_path, "def polite(text, row):\n    x = 1\n    return row.extra['none']\n")
    with pytest.raises(BadData, match=r"own.py, line 3\) raised KeyError on eval.jsonl, line 3"):
        mine.outcome("x", "", ROW)


@pytest.mark.parametrize(
    ("source", "problem", "error"),
    [
        ("def polite(:", r"line 1\) cannot be loaded: SyntaxError", BadData),
        (
            "\nimport nothing_of_that_name",
            r"line 2\) cannot be loaded: ModuleNotFoundError",
            BadData,
        ),
        ("x = 1 / 0", r"line 1\) cannot be loaded: ZeroDivisionError", BadData),
        ("def rude(text, row): return 0.0", "defines no function 'polite'", NotFound),
        ("polite = 3", "defines no function 'polite'", NotFound),
    ],
)
def test_a_file_without_the_function_is_told_before_a_model_is_loaded(
    tmp_path, source, problem, error
):
    with pytest.raises(error, match=problem):
        scorer(tmp_path, source).ready(run_code=False)


def test_names_are_looked_up_among_loris_and_the_workspaces(tmp_path):
    (tmp_path / "own.py").write_text(POLITE)
    own = {"mine": ScorerEntry("own.py", "polite"), "bleu": ScorerEntry("own.py", "polite")}
    assert find_scorer("mine", own, tmp_path).path == tmp_path / "own.py"
    assert find_scorer("rouge_l", own, tmp_path).unit == "F-measure"
    with pytest.raises(InvalidInput, match="names 'bleu', which is lori's own"):
        find_scorer("bleu", own, tmp_path)
    with pytest.raises(
        NotFound, match=r"no scorer is called 'yours'; .*rouge_l.*, mine.*\[scorers\]"
    ):
        find_scorer("yours", {"mine": own["mine"]}, tmp_path)
    (tmp_path / "own.py").unlink()
    with pytest.raises(InvalidInput, match=r"`mine`: cannot read .*own.py: No such file"):
        find_scorer("mine", own, tmp_path)


def test_lori_toml_names_functions_or_tables(tmp_path):
    path = tmp_path / "lori.toml"
    path.write_text(
        '[scorers]\nmine = "a/b.py:f"\n'
        'rude = { function = "c.py:g", higher_is_better = false, unit = "x", new_tokens = 9 }\n'
    )
    assert load_settings(path).scorers == {
        "mine": ScorerEntry("a/b.py", "f"),
        "rude": ScorerEntry("c.py", "g", False, "x", 9),
    }


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('mine = "b.py"', 'expected a function as "FILE.py:FUNCTION", got .b.py.'),
        ('mine = "b.txt:f"', "expected a function"),
        ('mine = "b.py:"', "expected a function"),
        ('mine = "b.py:a.b"', "expected a function"),
        ("mine = 3", 'expected "FILE.py:FUNCTION" or a table of function, higher_is_better'),
        ('mine = { function = "b.py:f", colour = 1 }', "or a table of"),
        ('mine = { function = "b.py:f", new_tokens = true }', "`new_tokens` must be a whole"),
        ('mine = { function = "b.py:f", new_tokens = 0 }', "`new_tokens` must be at least 1"),
        ('mine = { function = "b.py:f", higher_is_better = 1 }', "must be true or false"),
        ('"a b" = "b.py:f"', "is not usable"),
    ],
)
def test_other_entries_are_refused_with_their_name(tmp_path, line, problem):
    path = tmp_path / "lori.toml"
    path.write_text(f"[scorers]\n{line}\n")
    with pytest.raises(InvalidInput, match=rf"lori.toml: \[scorers\] .*{problem}"):
        load_settings(path)
