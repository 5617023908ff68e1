"""Scorers against what they stand for: generation, brute force, transformers' own loss."""

import numpy as np
import pytest
import torch

from lori_manager.errors import BadData
from lori_manager.models import load_base
from lori_manager.scoring import score_rows
from lori_manager.tasks.encoding import Encoded, encode_rows
from lori_manager.tasks.rows import Row
from lori_manager.tasks.scorers import TokenStats, scorers

END = 0


pytestmark = pytest.mark.usefixtures("one_thread")


def generated(base, prompt, tokens):
    out = base.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=tokens,
        do_sample=False,
    )
    return out[0, len(prompt) :].tolist()


def stats(nll, hits=None):
    nll = np.asarray(nll, np.float32)
    return TokenStats(np.ones(len(nll), bool) if hits is None else np.asarray(hits), nll)


def test_exact_match_is_what_greedy_generation_gives(talker):
    g = torch.Generator().manual_seed(0)
    encoded, expected = [], []
    ended = 0
    for _ in range(60):
        length = int(torch.randint(1, 9, (), generator=g))
        prompt = torch.randint(1, 8, (length,), generator=g).tolist()
        said = generated(talker, prompt, 10)
        if said[-1] == END:
            ended += 1
            answers = [said, [*said[:-1][:1], END], [(said[0] + 1) % 8, *said[1:]]]
            answers += [[*said[:-1], 1, END]]
        else:
            answers = [[*said[:3], END]]
        for answer in answers:
            encoded.append(Encoded(prompt + answer, len(prompt)))
            # Generation stops at the end of text: equal means the same tokens, then the end.
            expected.append(float(generated(talker, prompt, len(answer)) == answer))
    assert ended > 8
    assert 8 < sum(expected) < len(expected) - 8
    rows = [Row("p", "c")] * len(encoded)
    outcomes, weights = score_rows(talker, rows, encoded, scorers.get("exact_match"), 16)
    assert outcomes.tolist() == expected
    assert weights is None


def test_an_answer_that_only_begins_right_or_does_not_end_is_no_match():
    scorer = scorers.get("exact_match")
    assert scorer.outcome([stats([0.1, 0.1], [True, True])]) == (1.0, 1.0)
    assert scorer.outcome([stats([0.1, 9], [True, False])]) == (0.0, 1.0)
    assert scorer.outcome([stats([9, 0.1], [False, True])]) == (0.0, 1.0)


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(tiny_base, "fp32", "cpu")


def log_likelihood(base, prompt, answer):
    with torch.no_grad():
        logits = base.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) + i - 1, t]) for i, t in enumerate(answer))


def test_choice_accuracy_is_what_brute_force_finds(base):
    g = np.random.default_rng(0)
    rows, expected = [], []
    end = base.tokenizer.eos_token_id
    for i in range(40):
        words = {"".join(chr(97 + int(c)) for c in g.integers(0, 26, n)) for n in (3, 3, 3, 3)}
        choices = sorted(words)
        begins = i % 4 == 0
        if begins:
            choices.append(choices[0] + "x")
        right = int(g.integers(len(choices)))
        rows.append(Row(f"question {i}:", f" {choices[right]}", tuple(choices)))
        prompt = list(f"question {i}:".encode())
        prompt = base.tokenizer(rows[-1].prompt, add_special_tokens=False)["input_ids"]
        answers = [
            base.tokenizer(" " + c, add_special_tokens=False)["input_ids"] + [end] * begins
            for c in choices
        ]
        likelihoods = [log_likelihood(base, prompt, a) for a in answers]
        expected.append(float(int(np.argmax(likelihoods)) == right))
    encoded = encode_rows(base.tokenizer, rows, max_length=100, context=128)
    outcomes, weights = score_rows(base, rows, encoded, scorers.get("choice_accuracy"), 7)
    assert 0 < sum(expected) < 40
    assert outcomes.tolist() == expected
    assert weights is None


def test_likelihoods_of_choices_are_summed_not_averaged_and_ties_are_wrong():
    scorer = scorers.get("choice_accuracy")
    assert scorer.outcome([stats([1, 1, 1]), stats([2.5])]) == (0.0, 1.0)
    assert scorer.outcome([stats([2]), stats([1, 1.5])]) == (1.0, 1.0)
    assert scorer.outcome([stats([2]), stats([1, 1])]) == (0.0, 1.0)
    assert scorer.outcome([stats([2]), stats([3]), stats([1])]) == (0.0, 1.0)


def test_the_end_of_text_counts_only_where_one_choice_begins_another(base):
    scorer, end = scorers.get("choice_accuracy"), base.tokenizer.eos_token_id
    for choices, ends in ((("no", "yes"), False), (("no", "yes", "not"), True)):
        row = Row("q", " yes", choices)
        (encoded,) = encode_rows(base.tokenizer, [row], max_length=50, context=128)
        sequences = scorer.sequences(base.tokenizer, row, encoded)
        assert len(sequences) == len(choices)
        assert [s.ids[-1] == end for s in sequences] == [ends] * len(choices)
        assert list(sequences[0].ids) == list(encoded.ids)[: None if ends else -1]


def test_rows_without_choices_are_refused_with_another_scorer_named(base):
    row = Row("q", " yes")
    (encoded,) = encode_rows(base.tokenizer, [row], max_length=50, context=128)
    with pytest.raises(BadData, match=r"needs `choices` in every eval row; .* exact_match"):
        scorers.get("choice_accuracy").sequences(base.tokenizer, row, encoded)


def test_perplexity_is_transformers_loss_of_every_row_and_of_the_whole_set(base):
    g = np.random.default_rng(1)
    rows = [Row("p" * int(g.integers(1, 9)), "c" * int(g.integers(1, 20))) for _ in range(12)]
    encoded = encode_rows(base.tokenizer, rows, max_length=100, context=128)
    outcomes, weights = score_rows(base, rows, encoded, scorers.get("perplexity"), 5)
    total = tokens = 0.0
    for e, outcome, weight in zip(encoded, outcomes, weights, strict=True):
        ids = torch.tensor([e.ids.tolist()])
        labels = ids.clone()
        labels[:, : e.prompt_length] = -100
        with torch.no_grad():
            loss = float(base.model(input_ids=ids, labels=labels).loss)
        assert outcome == pytest.approx(loss, rel=1e-5)
        assert weight == len(e.ids) - e.prompt_length
        total, tokens = total + loss * weight, tokens + weight
    assert np.average(outcomes, weights=weights) == pytest.approx(total / tokens, rel=1e-5)
