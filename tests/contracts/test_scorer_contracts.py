"""What every registered scorer must do, read from the registry."""

import copy
import math

import numpy as np
import pytest

from lori_manager.tasks.encoding import Encoded
from lori_manager.tasks.rows import Row
from lori_manager.tasks.scorers import TokenStats, scorers

ROW = Row("ab", " yes", ("yes", "no", "perhaps"), {"answer": "yes"})


class Letters:
    """A tokenizer whose tokens are the letters' code points."""

    eos_token_id = 0
    pad_token_id = 0
    eos_token = "\0"

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


TOKENIZER = Letters()
ENCODED = Encoded([97, 98, *map(ord, " yes"), 0], 2)


@pytest.fixture(params=list(scorers), ids=lambda entry: entry.name)
def entry(request):
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


def test_every_sequence_continues_the_rows_prompt_and_the_right_one_is_first(entry):
    sequences = entry.item.sequences(TOKENIZER, ROW, ENCODED)
    assert sequences
    assert len({tuple(s.ids) for s in sequences}) == len(sequences)
    for sequence in sequences:
        assert sequence.prompt_length == ENCODED.prompt_length
        assert list(sequence.ids[:2]) == [97, 98]
        assert len(sequence.ids) > sequence.prompt_length
    right = list(sequences[0].ids[2:])
    assert right == list(ENCODED.ids[2 : 2 + len(right)])


def test_an_outcome_is_a_finite_number_with_a_positive_weight(entry):
    count = len(entry.item.sequences(TOKENIZER, ROW, ENCODED))
    for seed in range(20):
        outcome, weight = entry.item.outcome(stats(count, seed))
        assert isinstance(outcome, float)
        assert math.isfinite(outcome)
        assert weight > 0
        if entry.item.binary:
            assert outcome in (0.0, 1.0)
            assert weight == 1.0


def test_certainty_of_the_right_answer_is_the_best_outcome(entry):
    count = len(entry.item.sequences(TOKENIZER, ROW, ENCODED))
    sure = TokenStats(np.ones(3, bool), np.zeros(3, np.float32))
    unsure = TokenStats(np.zeros(3, bool), np.full(3, 9.0, np.float32))
    best = entry.item.outcome([sure] + [unsure] * (count - 1))[0]
    worst = entry.item.outcome([unsure] + [sure] * (count - 1))[0]
    assert best != worst
    assert (best > worst) == entry.item.higher_is_better


def test_what_a_scorer_is_given_is_not_changed(entry):
    row, encoded = copy.deepcopy((ROW, ENCODED))
    sequences = entry.item.sequences(TOKENIZER, row, encoded)
    given = stats(len(sequences))
    before = copy.deepcopy(given)
    entry.item.outcome(given)
    assert row == ROW
    assert (list(encoded.ids), encoded.prompt_length) == (list(ENCODED.ids), 2)
    for a, b in zip(given, before, strict=True):
        assert np.array_equal(a.hits, b.hits)
        assert np.array_equal(a.nll, b.nll)
