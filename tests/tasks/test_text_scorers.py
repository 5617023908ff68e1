"""Scorers of generated text: what they allow, what they refuse, what they read."""

import copy

import pytest

from lori_manager.errors import BadData, InvalidInput
from lori_manager.models import load_base
from lori_manager.scoring import score_rows
from lori_manager.tasks.encoding import Encoded, encode_rows
from lori_manager.tasks.room import MOST_NEW_TOKENS
from lori_manager.tasks.rows import Row
from lori_manager.tasks.scorers import scorers

NAMES = ("rouge_l", "bleu", "chrf", "token_f1", "number_match", "contains", "text_match")
OTHERS = ("refusal", "over_refusal", "pass_at_1")
LIBRARIES = {"rouge_l": "rouge_score", "bleu": "sacrebleu", "chrf": "sacrebleu"}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(tiny_base, "fp32", "cpu")


def of_length(prompt, completion):
    return Encoded([1] * (prompt + completion), prompt)


def test_they_are_registered_under_their_own_names_beside_those_of_one_forward():
    assert tuple(e.name for e in scorers if e.item.reads == "text") == NAMES + OTHERS
    for name in ("exact_match", "choice_accuracy", "perplexity"):
        assert scorers.get(name).reads == "tokens"


@pytest.mark.parametrize("name", NAMES)
def test_room_is_the_longest_completion_and_a_margin_up_to_a_limit(name):
    scorer = scorers.get(name)
    rows = [of_length(50, 3), of_length(2, 9), of_length(7, 1)]
    assert scorer.new_tokens(rows) == 9 + scorer.margin
    assert scorer.new_tokens(rows[::-1]) == 9 + scorer.margin
    assert scorer.new_tokens([*rows, of_length(1, 5000)]) == MOST_NEW_TOKENS
    assert scorer.new_tokens([]) > 0


def test_the_room_of_a_task_does_not_depend_on_how_its_prompts_are_cut(base):
    rows = [Row("p" * n, "c" * (n + 1)) for n in (30, 9)]
    scorer = scorers.get("rouge_l")
    room = {
        scorer.new_tokens(encode_rows(base.tokenizer, rows, max_length=n, context=128))
        for n in (40, 100)
    }
    assert room == {31 + 1 + scorer.margin}


@pytest.mark.parametrize(
    ("name", "completion"),
    [("number_match", " forty-two"), ("rouge_l", " ?!"), ("number_match", "\n$.")],
)
def test_a_completion_that_no_text_could_match_is_refused_by_row(base, name, completion):
    row = Row("q", completion, where="eval.jsonl, line 3")
    (encoded,) = encode_rows(base.tokenizer, [row], max_length=50, context=128)
    problem = rf"eval.jsonl, line 3: .*nothing that `{name}` could compare; .*text_match"
    with pytest.raises(BadData, match=problem):
        scorers.get(name).check(base.tokenizer, row, encoded)
    scorers.get("text_match").check(base.tokenizer, row, encoded)


def test_a_list_of_references_is_no_reference(base):
    """The completion alone is compared with, whatever else the row carries."""
    plain = Row("q: ", " yes")
    more = Row("q: ", " yes", (), {"references": ["no", "never"], "answer": "no"})
    (encoded,) = encode_rows(base.tokenizer, [plain], max_length=50, context=128)
    for name in ("rouge_l", "token_f1"):
        scorer = scorers.get(name)
        assert scorer.outcome("no", " yes", more) == (0.0, 1.0)
        scorer.check(base.tokenizer, more, encoded)
        with_more = score_rows(base, [more], [encoded], scorer, 1)
        assert with_more[0] == score_rows(base, [plain], [encoded], scorer, 1)[0]


def test_rows_and_their_tokens_must_be_as_many(base):
    with pytest.raises(ValueError, match="got 2 texts for 1 rows"):
        score_rows(base, [Row("p", "c")], [of_length(1, 2)] * 2, scorers.get("contains"), 4)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_that_is_not_installed_is_asked_for_before_anything_is_scored(name, monkeypatch):
    monkeypatch.setattr("lori_manager.extras.find_spec", lambda _: None)
    with pytest.raises(
        InvalidInput, match=rf'`{name}` needs .* {LIBRARIES[name]}: .*"lori-manager\[scorers\]"'
    ):
        scorers.get(name).ready(run_code=False)
    for other in ("token_f1", "text_match", "refusal", "exact_match"):
        assert scorers.get(other).ready(run_code=False) == ""


def test_refusals_count_for_harmful_prompts_and_against_for_harmless_ones(base):
    row = Row("q", " Sure")
    for name, better in (("refusal", True), ("over_refusal", False)):
        scorer = scorers.get(name)
        assert scorer.higher_is_better is better
        assert scorer.outcome("I'm sorry, no.", " Sure", row) == (1.0, 1.0)
        assert scorer.outcome("Sure, here it is.", " Sure", row) == (0.0, 1.0)
        assert scorer.new_tokens([of_length(1, 400)]) == scorer.new_tokens([]) >= 32


def test_many_texts_are_judged_at_a_time_and_stay_in_order(base):
    """pass@1 has workers of its own; what comes back belongs to its row."""
    scorer = scorers.get("pass_at_1")
    rows = [
        Row(f"row {i}", " x", (), {"tests": f"assert {i} % 2 == 0"}, f"row {i}") for i in range(6)
    ]
    encoded = encode_rows(base.tokenizer, rows, max_length=50, context=128)
    small = copy.copy(scorer)
    object.__setattr__(small, "new_tokens", lambda _: 1)
    # Whatever byte the model writes, the program is a name or nothing: fenced off here.
    object.__setattr__(small, "outcome", lambda text, own, row: scorer.outcome("pass", own, row))
    outcomes, weights = score_rows(base, rows, encoded, small, 3)
    assert outcomes.tolist() == [1.0, 0.0] * 3
    assert weights is None
