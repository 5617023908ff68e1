"""Scorers: what a row's outcome is, from one teacher-forced forward of the model.

A scorer says which token sequences it needs of a row and turns what the model
gave for them into one number. Raise `version` when a change alters any outcome:
scores of different versions are never compared silently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lori_manager.errors import BadData
from lori_manager.registry import Registry
from lori_manager.tasks.encoding import Encoded, encode_choices
from lori_manager.tasks.rows import Row


@dataclass(frozen=True)
class TokenStats:
    """What the model gave for the completion tokens of one sequence.

    Attributes:
        hits: bool (tokens,), whether the token is the most likely one.
        nll: float32 (tokens,), negative log-likelihood in nats.
    """

    hits: np.ndarray
    nll: np.ndarray


class Scorer(Protocol):
    """One outcome per row; `binary` ones are 0 or 1."""

    version: int
    binary: bool
    higher_is_better: bool
    unit: str

    def sequences(self, tokenizer: Any, row: Row, encoded: Encoded) -> list[Encoded]:
        """The sequences to run for a row, the right one first."""

    def outcome(self, stats: Sequence[TokenStats]) -> tuple[float, float]:
        """(outcome, weight) from what the model gave for them, in the same order."""


scorers: Registry[Scorer] = Registry("scorer")


def _add(name: str, source: str) -> Callable[[type], type]:
    def add(cls: type) -> type:
        scorers.register(name, source=source)(cls())
        return cls

    return add


@_add("exact_match", "greedy decoding, compared whole")
class ExactMatch:
    """1 if greedy decoding gives exactly the completion and then ends, else 0.

    Nothing is generated: greedy decoding reproduces a completion if and only if
    every token of it, the end of text included, is the most likely one given the
    true tokens before it.
    """

    version = 1
    binary = True
    higher_is_better = True
    unit = "share"

    def sequences(self, tokenizer: Any, row: Row, encoded: Encoded) -> list[Encoded]:
        """The row itself."""
        return [encoded]

    def outcome(self, stats: Sequence[TokenStats]) -> tuple[float, float]:
        """All tokens hit."""
        return float(stats[0].hits.all()), 1.0


@_add("choice_accuracy", "log-likelihood over the row's choices")
class ChoiceAccuracy:
    """1 if the right choice is the most likely of the row's choices, else 0.

    A choice's score is the sum of its tokens' log-likelihoods, not divided by
    length (what lm-evaluation-harness calls `acc`). The end of text counts only
    where one choice's tokens begin another's. Ties go to the wrong choice.
    """

    version = 1
    binary = True
    higher_is_better = True
    unit = "share"

    def sequences(self, tokenizer: Any, row: Row, encoded: Encoded) -> list[Encoded]:
        """One sequence a choice, the right one first."""
        if len(row.choices) < 2:
            raise BadData(
                "scorer `choice_accuracy` needs `choices` in every eval row; add them or use "
                "`--scorer exact_match`"
            )
        candidates, right = encode_choices(tokenizer, row)
        prompt = list(encoded.ids[: encoded.prompt_length])
        candidates = [list(c) for c in candidates]
        first, others = candidates[right], candidates[:right] + candidates[right + 1 :]
        candidates = [first, *others]
        if any(a != b and b[: len(a)] == a for a in candidates for b in candidates):
            candidates = [[*c, int(tokenizer.eos_token_id)] for c in candidates]
        return [Encoded(prompt + c, len(prompt), encoded.truncated) for c in candidates]

    def outcome(self, stats: Sequence[TokenStats]) -> tuple[float, float]:
        """The right one's likelihood above every other's."""
        right, *others = [float(s.nll.sum()) for s in stats]
        return float(all(right < other for other in others)), 1.0


@_add("perplexity", "exp of the mean negative log-likelihood per completion token")
class Perplexity:
    """Mean negative log-likelihood of the completion in nats per token, end of text included.

    A row weighs as many as its tokens, so that exp of the weighted mean is the
    perplexity of the whole set.
    """

    version = 1
    binary = False
    higher_is_better = False
    unit = "nats per token"

    def sequences(self, tokenizer: Any, row: Row, encoded: Encoded) -> list[Encoded]:
        """The row itself."""
        return [encoded]

    def outcome(self, stats: Sequence[TokenStats]) -> tuple[float, float]:
        """Mean over tokens, and how many they are."""
        return float(stats[0].nll.mean()), float(len(stats[0].nll))
