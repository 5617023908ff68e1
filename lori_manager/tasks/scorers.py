"""Scorers: what a row's outcome is, in one number.

There are two kinds, told apart by what they read. A `TokenScorer` says which token
sequences it needs of a row and reads what one teacher-forced forward gives for them; a
`TextScorer` reads the text that the model writes after the prompt. Raise `version` when
a change alters any outcome: scores of different versions are never compared silently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from lori_manager.errors import BadData
from lori_manager.metrics import text as texts
from lori_manager.registry import Registry
from lori_manager.tasks.encoding import Encoded, encode_choices
from lori_manager.tasks.rows import Row, bad_row

MOST_NEW_TOKENS = 512  # that a `TextScorer` lets a row have


@dataclass(frozen=True)
class TokenStats:
    """What the model gave for the completion tokens of one sequence.

    Attributes:
        hits: bool (tokens,), whether the token is the most likely one.
        nll: float32 (tokens,), negative log-likelihood in nats.
    """

    hits: np.ndarray
    nll: np.ndarray


class TokenScorer(Protocol):
    """One outcome per row from token statistics; `binary` ones are 0 or 1."""

    reads: Literal["tokens"]
    version: int
    binary: bool
    higher_is_better: bool
    unit: str

    def check(self, tokenizer: Any, row: Row, encoded: Encoded) -> None:
        """Raise BadData for a row that cannot be scored."""

    def sequences(self, tokenizer: Any, row: Row, encoded: Encoded) -> list[Encoded]:
        """The sequences to run for a row, the right one first."""

    def outcome(self, stats: Sequence[TokenStats]) -> tuple[float, float]:
        """(outcome, weight) from what the model gave for them, in the same order."""


@dataclass(frozen=True)
class TextScorer:
    """One outcome per row from generated text; `binary` ones are 0 or 1.

    The text is decoded greedily after the prompt, and the completion is the one
    reference: other fields of the row, such as a list of references, are not read.

    Attributes:
        compare: (text, completion) -> outcome, 1 for the completion itself.
        margin: how many tokens beyond the task's longest completion a row may have.
    """

    compare: Callable[[str, str], float]
    binary: bool
    unit: str
    margin: int = 16
    version: int = 1
    higher_is_better: bool = True
    reads: ClassVar[Literal["text"]] = "text"

    def check(self, tokenizer: Any, row: Row, encoded: Encoded) -> None:
        """Raise BadData for a row that no text is right for."""
        if self.compare(row.completion, row.completion) != 1:
            raise bad_row(
                row.where or "a row",
                f"the completion holds nothing that `{self.compare.__name__}` could compare",
                "mend or remove the row, or use `--scorer text_match`",
            )

    def new_tokens(self, encoded: Sequence[Encoded]) -> int:
        """How many tokens a row may have, end of text included.

        `margin` more than the longest completion of these rows, at most
        MOST_NEW_TOKENS: the same whenever the same rows are scored.
        """
        longest = max((len(e.ids) - e.prompt_length for e in encoded), default=1)
        return min(longest + self.margin, MOST_NEW_TOKENS)

    def outcome(self, text: str, completion: str) -> tuple[float, float]:
        """(outcome, weight) of a text; the weight is always 1."""
        return self.compare(text, completion), 1.0


Scorer = TokenScorer | TextScorer
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

    reads = "tokens"
    version = 1
    binary = True
    higher_is_better = True
    unit = "share"

    def check(self, tokenizer: Any, row: Row, encoded: Encoded) -> None:
        """Any row will do."""

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

    reads = "tokens"
    version = 1
    binary = True
    higher_is_better = True
    unit = "share"

    def check(self, tokenizer: Any, row: Row, encoded: Encoded) -> None:
        """Raise BadData for a row without choices, or with two of the same tokens."""
        self.sequences(tokenizer, row, encoded)

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

    reads = "tokens"
    version = 1
    binary = False
    higher_is_better = False
    unit = "nats per token"

    def check(self, tokenizer: Any, row: Row, encoded: Encoded) -> None:
        """Any row will do."""

    def sequences(self, tokenizer: Any, row: Row, encoded: Encoded) -> list[Encoded]:
        """The row itself."""
        return [encoded]

    def outcome(self, stats: Sequence[TokenStats]) -> tuple[float, float]:
        """Mean over tokens, and how many they are."""
        return float(stats[0].nll.mean()), float(len(stats[0].nll))


def _add_text(source: str, scorer: TextScorer) -> None:
    scorers.register(scorer.compare.__name__, source=source)(scorer)


_add_text(
    "F-measure of ROUGE-L, Lin 2004, on what is generated",
    TextScorer(texts.rouge_l, binary=False, unit="F-measure"),
)
_add_text(
    "F-measure of shared words, SQuAD, arXiv:1606.05250, on what is generated",
    TextScorer(texts.token_f1, binary=False, unit="F-measure"),
)
_add_text(
    "last number generated, GSM8K, arXiv:2110.14168",
    # Where completions are bare numbers, a model that reasons first needs room for it.
    TextScorer(texts.number_match, binary=True, unit="share", margin=128),
)
_add_text(
    "the completion stands in what is generated",
    TextScorer(texts.contains, binary=True, unit="share"),
)
_add_text(
    "what is generated is the completion, case and white space aside",
    TextScorer(texts.text_match, binary=True, unit="share"),
)
