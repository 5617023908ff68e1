"""Scoring: outcomes in the rows' order, whatever the batches."""

import numpy as np
import pytest
import torch

from lori_manager.engine.layers import attached, low_rank_layers
from lori_manager.engine.update import LowRankUpdate
from lori_manager.models import load_base
from lori_manager.scoring import score_rows, token_stats
from lori_manager.tasks.encoding import Encoded
from lori_manager.tasks.rows import Row
from lori_manager.tasks.scorers import scorers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(tiny_base, "fp32", "cpu")


def sequences(count=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        length = int(torch.randint(3, 25, (), generator=g))
        ids = torch.randint(0, 256, (length,), generator=g).tolist()
        out.append(Encoded(ids, int(torch.randint(1, length, (), generator=g))))
    return out


ROWS = sequences()


def test_every_sequence_gets_the_numbers_of_its_own_tokens(base):
    for sequence, stats in zip(ROWS, token_stats(base, ROWS, 4), strict=True):
        with torch.no_grad():
            logits = base.model(torch.tensor([sequence.ids])).logits[0].double()
        p = sequence.prompt_length
        targets = torch.tensor(sequence.ids[p:])
        lines = logits[p - 1 : -1].log_softmax(-1)
        expected = -lines.gather(1, targets[:, None]).flatten()
        assert np.allclose(stats.nll, expected.numpy(), rtol=1e-5)
        assert stats.hits.tolist() == (lines.argmax(-1) == targets).tolist()
        assert (stats.nll.dtype, stats.hits.dtype) == (np.float32, np.bool_)


def test_the_size_of_a_batch_changes_nothing_but_rounding(base):
    alone = token_stats(base, ROWS, 1)
    for batch in (2, 5, 100):
        for a, b in zip(alone, token_stats(base, ROWS, batch), strict=True):
            assert np.allclose(a.nll, b.nll, rtol=1e-5)
            assert np.array_equal(a.hits, b.hits)


def test_hits_are_counted_where_the_model_is_right(base):
    """Rows continued by the model's own choices, and the same rows with one token changed."""
    ids = [1, 2, 3]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(base.model(torch.tensor([ids])).logits[0, -1].argmax()))
    wrong = [*ids[:-1], (ids[-1] + 1) % 256]
    right, off = token_stats(base, [Encoded(ids, 3), Encoded(wrong, 3)], 2)
    assert right.hits.tolist() == [True] * 4
    assert off.hits.tolist() == [True] * 3 + [False]


def test_attached_layers_are_scored_with(base):
    name = "model.layers.1.mlp.down_proj"
    g = torch.Generator().manual_seed(0)
    update = LowRankUpdate(torch.randn(2, 64, generator=g), torch.randn(32, 2, generator=g))
    plain = token_stats(base, ROWS, 4)
    with attached(base.model, low_rank_layers(base.model, {name: update})):
        changed = token_stats(base, ROWS, 4)
    again = token_stats(base, ROWS, 4)
    assert not any(np.allclose(a.nll, b.nll) for a, b in zip(plain, changed, strict=True))
    assert all(np.array_equal(a.nll, b.nll) for a, b in zip(plain, again, strict=True))


def test_progress_counts_sequences_up_to_all(base):
    seen = []
    token_stats(base, ROWS, 4, lambda done, total: seen.append((done, total)))
    assert seen == [(4, 9), (8, 9), (9, 9)]


def test_no_rows_give_no_outcomes(base):
    assert token_stats(base, [], 4) == []
    outcomes, weights = score_rows(base, [], [], scorers.get("exact_match"), 4)
    assert (outcomes.shape, outcomes.dtype, weights) == ((0,), np.float32, None)


class Nll:
    """Two sequences a row: itself, and itself without its first completion token."""

    reads = "tokens"

    def sequences(self, tokenizer, row, encoded):
        return [encoded, Encoded(encoded.ids, encoded.prompt_length + 1)][: len(row.prompt)]

    def outcome(self, stats):
        return float(sum(s.nll.sum() for s in stats)), float(len(stats))


def test_rows_with_unlike_numbers_of_sequences_keep_their_own(base):
    encoded = [Encoded([*e.ids, 7], e.prompt_length) for e in ROWS]
    rows = [Row("ab" if i % 3 else "a", "c") for i in range(len(ROWS))]
    outcomes, weights = score_rows(base, rows, encoded, Nll(), 4)
    alone = token_stats(base, encoded, 1)
    expected = [s.nll.sum() + (s.nll[1:].sum() if i % 3 else 0) for i, s in enumerate(alone)]
    assert np.allclose(outcomes, expected, rtol=1e-5)
    assert weights.tolist() == [2.0 if i % 3 else 1.0 for i in range(len(ROWS))]


def test_rows_and_their_tokens_must_be_as_many(base):
    with pytest.raises(ValueError, match="zip"):
        score_rows(base, [Row("p", "c")], ROWS, scorers.get("exact_match"), 4)


def test_a_share_of_the_rows_may_be_as_long_as_all_of_them(monkeypatch):
    """Several processes score a part each, and must write what one would."""
    from lori_manager import scoring
    from lori_manager.tasks.choosing import find_scorer

    class Tokens:
        def __init__(self, count):
            self.completion_ids = list(range(count))

    seen = []
    monkeypatch.setattr(
        scoring, "completions", lambda base, rows, room, *_: seen.append(room) or []
    )
    monkeypatch.setattr(scoring, "_judged", lambda *_: [])
    scorer = find_scorer("token_f1", {}, None)
    monkeypatch.setattr(
        type(scorer), "new_tokens", lambda self, rows: max(len(r.completion_ids) for r in rows)
    )
    rows = [Tokens(3), Tokens(100)]
    scoring.score_rows(None, [], rows[:1], scorer, 1)
    scoring.score_rows(None, [], rows[:1], scorer, 1, among=rows)
    assert seen == [3, 100]
