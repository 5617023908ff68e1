"""What every registered scorer must do, read from the registry."""

import copy
import math

import numpy as np
import pytest

from lori_manager.errors import InvalidInput
from lori_manager.tasks.encoding import Encoded
from lori_manager.tasks.rows import Row
from lori_manager.tasks.scorers import Comparison, TokenStats, scorers

ROW = Row("ab", " yes", ("yes", "no", "perhaps"), {"answer": "yes"})
COMPLETIONS = (" yes, 12", "The answer is $1,234.50.", "a\n 7 b 7", "7")
TEXTS = ("", " ", "yes", "no 12", "\N{SNOWMAN} 7", "The answer: 1234.5", "7 7 7", *COMPLETIONS)


class Letters:
    """A tokenizer whose tokens are the letters' code points."""

    eos_token_id = 0
    pad_token_id = 0
    eos_token = "\0"

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


TOKENIZER = Letters()
ENCODED = Encoded([97, 98, *map(ord, " yes"), 0], 2)


def reading(kind):
    return [entry for entry in scorers if entry.item.reads == kind]


@pytest.fixture(params=list(scorers), ids=lambda entry: entry.name)
def entry(request):
    return request.param


@pytest.fixture(params=reading("tokens"), ids=lambda entry: entry.name)
def token_entry(request):
    return request.param


@pytest.fixture(params=reading("text"), ids=lambda entry: entry.name)
def text_entry(request):
    return request.param


@pytest.fixture(params=reading("labels"), ids=lambda entry: entry.name)
def label_entry(request):
    return request.param


@pytest.fixture(
    params=[e for e in reading("text") if isinstance(e.item, Comparison)], ids=lambda e: e.name
)
def comparison(request):
    return request.param


def stats(count, seed=0):
    g = np.random.default_rng(seed)
    return [
        TokenStats(g.random(n) < 0.5, g.exponential(size=n).astype(np.float32))
        for n in g.integers(1, 6, count)
    ]


def test_a_scorer_says_what_it_is_and_where_it_comes_from(entry):
    scorer = entry.item
    assert entry.source
    assert (type(scorer).__doc__ or "").strip()
    assert isinstance(scorer.version, int)
    assert scorer.version >= 1
    assert isinstance(scorer.binary, bool)
    assert isinstance(scorer.higher_is_better, bool)
    assert scorer.unit
    assert scorer.reads in ("tokens", "text", "labels")


def test_a_row_that_can_be_scored_passes_and_is_not_changed(entry):
    row = Row("ab", " 1 yes", ("1 yes", "no"), {"tests": "assert True"})
    encoded = Encoded([97, 98, *map(ord, " 1 yes"), 0], 2)
    before = copy.deepcopy((row, list(encoded.ids)))
    entry.item.check(TOKENIZER, row, encoded)
    assert (row, list(encoded.ids)) == before


def test_every_sequence_continues_the_rows_prompt_and_the_right_one_is_first(token_entry):
    sequences = token_entry.item.sequences(TOKENIZER, ROW, ENCODED)
    assert sequences
    assert len({tuple(s.ids) for s in sequences}) == len(sequences)
    for sequence in sequences:
        assert sequence.prompt_length == ENCODED.prompt_length
        assert list(sequence.ids[:2]) == [97, 98]
        assert len(sequence.ids) > sequence.prompt_length
    right = list(sequences[0].ids[2:])
    assert right == list(ENCODED.ids[2 : 2 + len(right)])


def test_an_outcome_is_a_finite_number_with_a_positive_weight(token_entry):
    count = len(token_entry.item.sequences(TOKENIZER, ROW, ENCODED))
    for seed in range(20):
        outcome, weight = token_entry.item.outcome(stats(count, seed))
        assert isinstance(outcome, float)
        assert math.isfinite(outcome)
        assert weight > 0
        if token_entry.item.binary:
            assert outcome in (0.0, 1.0)
            assert weight == 1.0


def test_certainty_of_the_right_answer_is_the_best_outcome(token_entry):
    count = len(token_entry.item.sequences(TOKENIZER, ROW, ENCODED))
    sure = TokenStats(np.ones(3, bool), np.zeros(3, np.float32))
    unsure = TokenStats(np.zeros(3, bool), np.full(3, 9.0, np.float32))
    best = token_entry.item.outcome([sure] + [unsure] * (count - 1))[0]
    worst = token_entry.item.outcome([unsure] + [sure] * (count - 1))[0]
    assert best != worst
    assert (best > worst) == token_entry.item.higher_is_better


def test_what_a_scorer_is_given_is_not_changed(token_entry):
    row, encoded = copy.deepcopy((ROW, ENCODED))
    sequences = token_entry.item.sequences(TOKENIZER, row, encoded)
    given = stats(len(sequences))
    before = copy.deepcopy(given)
    token_entry.item.outcome(given)
    assert row == ROW
    assert (list(encoded.ids), encoded.prompt_length) == (list(ENCODED.ids), 2)
    for a, b in zip(given, before, strict=True):
        assert np.array_equal(a.hits, b.hits)
        assert np.array_equal(a.nll, b.nll)


def test_a_texts_outcome_is_a_number_from_0_to_1_of_weight_1(text_entry):
    row = Row("ab", " yes", (), {"tests": "assert True"})
    for completion in COMPLETIONS:
        for text in TEXTS:
            outcome, weight = text_entry.item.outcome(text, completion, row)
            assert isinstance(outcome, float)
            assert 0.0 <= outcome <= 1.0
            assert weight == 1.0
            if text_entry.item.binary:
                assert outcome in (0.0, 1.0)


def test_the_completion_itself_is_the_best_text_and_nothing_at_all_the_worst(comparison):
    for completion in COMPLETIONS:
        best = comparison.item.outcome(completion, completion, ROW)[0]
        around = comparison.item.outcome(f" {completion}\n", completion, ROW)[0]
        worst = comparison.item.outcome("", completion, ROW)[0]
        assert best == around == 1.0
        assert worst == 0.0
        assert comparison.item.higher_is_better


def test_a_text_scorer_leaves_room_for_the_longest_completion(text_entry):
    rows = [ENCODED, Encoded([97, *range(98, 118), 0], 1)]
    assert text_entry.item.new_tokens(rows) >= 21
    assert text_entry.item.new_tokens(rows[:1]) <= text_entry.item.new_tokens(rows)


def test_a_comparison_has_more_room_for_longer_completions(comparison):
    rows = [ENCODED, Encoded([97, *range(98, 118), 0], 1)]
    assert comparison.item.new_tokens(rows[:1]) < comparison.item.new_tokens(rows)


def test_a_comparison_says_how_it_compares_and_is_named_after_it(comparison):
    compare = comparison.item.compare
    assert compare.__name__ == comparison.name
    assert (compare.__doc__ or "").strip()


def test_a_labels_outcome_is_finite_and_best_where_the_right_one_is_certain(label_entry):
    scorer = label_entry.item
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(size=3).astype(np.float32) * 50
        before = logits.copy()
        outcomes = [scorer.outcome(logits, right) for right in range(3)]
        assert np.array_equal(logits, before)
        assert all(math.isfinite(outcome) and weight == 1.0 for outcome, weight in outcomes)
        order = [outcome for outcome, _ in sorted(outcomes, reverse=scorer.higher_is_better)]
        assert outcomes[int(logits.argmax())][0] == order[0] != order[-1]


def test_labels_that_are_alike_are_answered_no_better_than_without_a_head(label_entry):
    nothing = label_entry.item.unanswered(4)
    alike = label_entry.item.outcome(np.zeros(4, np.float32), 1)[0]
    assert alike == pytest.approx(nothing)


def test_a_label_that_the_head_does_not_know_is_wrong_and_has_no_likelihood():
    logits = np.zeros(3, np.float32)
    assert scorers.get("label_accuracy").outcome(logits, None) == (0.0, 1.0)
    with pytest.raises(InvalidInput, match="knows not all"):
        scorers.get("label_nll").outcome(logits, None)


def test_what_runs_a_models_programs_is_off_unless_asked_for(entry):
    if entry.name == "pass_at_1":
        with pytest.raises(InvalidInput, match="--run-code"):
            entry.item.ready(run_code=False)
        assert "seccomp" in entry.item.ready(run_code=True)
    else:
        assert entry.item.ready(run_code=False) == ""
