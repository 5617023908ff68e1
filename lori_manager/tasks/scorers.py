"""Scorers: what a row's outcome is, in one number.

There are four kinds, told apart by what they read. A `LabelScorer` reads the logits of an
encoder's labels. A `TokenScorer` says which token
sequences it needs of a row and reads what one teacher-forced forward gives for them; a
`TextScorer` reads the text that the model writes after the prompt; a `RequestScorer` leaves
both to lm-evaluation-harness. Raise `version` when a change alters any outcome: scores of
different versions are never compared silently.

The registry holds what comes with lori; `choosing.find_scorer` knows a workspace's own and
lm-evaluation-harness's too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from lori_manager import pipelines
from lori_manager.errors import BadData, InvalidInput
from lori_manager.extras import check_extra
from lori_manager.metrics import refusal
from lori_manager.metrics import text as texts
from lori_manager.registry import Registry
from lori_manager.tasks.code import PassAt1
from lori_manager.tasks.encoding import Encoded, encode_choices
from lori_manager.tasks.room import room_for
from lori_manager.tasks.rows import Row, bad_row

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class TokenStats:
    """What the model gave for the completion tokens of one sequence.

    Attributes:
        hits: bool (tokens,), whether the token is the most likely one.
        nll: float32 (tokens,), negative log-likelihood in nats.
    """

    hits: np.ndarray
    nll: np.ndarray


class AnyScorer(Protocol):
    """What every scorer says of itself."""

    @property
    def version(self) -> int | str:
        """Of what decides an outcome: a number, or a digest where that is a user's file."""

    @property
    def binary(self) -> bool:
        """Whether every outcome is 0 or 1."""

    @property
    def higher_is_better(self) -> bool:
        """Of outcomes."""

    @property
    def unit(self) -> str:
        """What an outcome counts in."""

    def check(self, tokenizer: Any, row: Row, encoded: Encoded) -> None:
        """Raise BadData for a row that cannot be scored."""

    def ready(self, run_code: bool) -> str:
        """Refuse what cannot be scored here, before a model is loaded.

        Args:
            run_code: whether programs that a model wrote may be run.
        Returns:
            What the user should know; "" for nothing.
        Raises:
            InvalidInput: a library or a permission is missing. BadData: a scorer's own code.
        """


class TokenScorer(AnyScorer, Protocol):
    """One outcome per row from token statistics."""

    reads: ClassVar[Literal["tokens"]]

    def sequences(self, tokenizer: Any, row: Row, encoded: Encoded) -> list[Encoded]:
        """The sequences to run for a row, the right one first."""

    def outcome(self, stats: Sequence[TokenStats]) -> tuple[float, float]:
        """(outcome, weight) from what the model gave for them, in the same order."""


class TextScorer(AnyScorer, Protocol):
    """One outcome per row from generated text, which is decoded greedily after the prompt."""

    reads: ClassVar[Literal["text"]]
    workers: ClassVar[int]  # texts judged at a time

    def new_tokens(self, encoded: Sequence[Encoded]) -> int:
        """How many tokens a row may have, end of text included.

        The same whenever the same rows are scored, and at most MOST_NEW_TOKENS.
        """

    def outcome(self, text: str, completion: str, row: Row) -> tuple[float, float]:
        """(outcome, weight) of a text; `completion` is the row's, decoded as the text is."""


class LabelScorer(AnyScorer, Protocol):
    """One outcome per row from the logits of a task's labels, given by an encoder's head."""

    reads: ClassVar[Literal["labels"]]

    def outcome(self, logits: np.ndarray, right: int | None) -> tuple[float, float]:
        """(outcome, weight).

        Args:
            logits: float32 (labels,).
            right: the place of the row's label; None where the head does not know it.
        """

    def unanswered(self, labels: int) -> float:
        """The outcome where there is no head to tell that many labels: nothing is known."""


@dataclass(frozen=True)
class RequestScorer:
    """One outcome per row from lm-evaluation-harness, which asks the model and judges.

    What it asks is frozen with the rows; see `harness`.

    Attributes:
        task: its name there.
        include: the folder of its YAML where it is not one that comes with the harness.
        metric: one that is a mean over rows. filter: the pipeline that its answers go through.
        version: digest of the task's definition and of the harness's version.
    """

    task: str
    include: str | None
    metric: str
    filter: str
    version: str
    higher_is_better: bool
    unit: str
    binary: bool
    reads: ClassVar[Literal["requests"]] = "requests"

    def check(self, tokenizer: Any, row: Row, encoded: Encoded) -> None:
        """Rows are made by `harness`, which checks them."""

    def ready(self, run_code: bool) -> str:
        """InvalidInput where the extra `lm-eval` is not installed."""
        check_extra("lm_eval", "lm-eval", f"the lm-evaluation-harness task {self.task!r}")
        return ""


@dataclass(frozen=True)
class Comparison:
    """A text against the row's completion, the one reference.

    Other fields of the row, such as a list of references, are not read.

    Attributes:
        compare: (text, completion) -> outcome, 1 for the completion itself.
        margin: how many tokens beyond the task's longest completion a row may have.
        library: that it needs, of the extra `scorers`.
    """

    compare: Callable[[str, str], float]
    binary: bool
    unit: str
    margin: int = 16
    version: int = 1
    higher_is_better: bool = True
    library: str | None = None
    workers: ClassVar[int] = 1
    reads: ClassVar[Literal["text"]] = "text"

    def check(self, tokenizer: Any, row: Row, encoded: Encoded) -> None:
        """Raise BadData for a row that no text is right for."""
        if self.compare(row.completion, row.completion) != 1:
            raise bad_row(
                row.where or "a row",
                f"the completion holds nothing that `{self.compare.__name__}` could compare",
                "mend or remove the row, or use `--scorer text_match`",
            )

    def ready(self, run_code: bool) -> str:
        """InvalidInput where the library is not installed."""
        if self.library is not None:
            check_extra(self.library, "scorers", f"`{self.compare.__name__}`")
        return ""

    def new_tokens(self, encoded: Sequence[Encoded]) -> int:
        """`margin` more than the longest completion of these rows."""
        return room_for(encoded, self.margin)

    def outcome(self, text: str, completion: str, row: Row) -> tuple[float, float]:
        """The comparison; the weight is always 1."""
        return self.compare(text, completion), 1.0


@dataclass(frozen=True)
class Refusal:
    """1 where the text is a refusal by `metrics.refusal`, else 0; the completion is not read.

    Attributes:
        higher_is_better: for prompts that should be refused; not for harmless ones.
    """

    higher_is_better: bool
    binary: ClassVar[bool] = True
    unit: ClassVar[str] = "share refused"
    version: ClassVar[int] = refusal.VERSION
    workers: ClassVar[int] = 1
    reads: ClassVar[Literal["text"]] = "text"

    def check(self, tokenizer: Any, row: Row, encoded: Encoded) -> None:
        """Any row will do."""

    def ready(self, run_code: bool) -> str:
        """Nothing is needed."""
        return ""

    def new_tokens(self, encoded: Sequence[Encoded]) -> int:
        """Room for the sentence that a refusal begins with, whatever the completions."""
        return 64

    def outcome(self, text: str, completion: str, row: Row) -> tuple[float, float]:
        """Whether it is one; the weight is always 1."""
        return float(refusal.is_refusal(text)), 1.0


@dataclass(frozen=True)
class NoiseLoss:
    """Of an image: how well the UNet finds the noise put on it, at frozen timesteps.

    Not in the registry, since no row of text can be scored by it.

    Attributes:
        draws: of noise for each image, spread over the scheduler's timesteps.
    """

    draws: ClassVar[int] = 8
    reads: ClassVar[Literal["noise"]] = "noise"
    version: ClassVar[int] = 1
    binary: ClassVar[bool] = False
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "mean squared error"

    def check(self, tokenizer: Any, row: Row, encoded: Encoded) -> None:
        """Images are checked where they are read."""

    def ready(self, run_code: bool) -> str:
        """InvalidInput where the extra `diffusion` is not installed."""
        pipelines.check_library("`noise_loss`")
        return ""


NOISE_LOSS = "noise_loss"
Scorer = TokenScorer | TextScorer | RequestScorer | LabelScorer | NoiseLoss
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

    def ready(self, run_code: bool) -> str:
        """Nothing is needed."""
        return ""

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

    def ready(self, run_code: bool) -> str:
        """Nothing is needed."""
        return ""

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

    def ready(self, run_code: bool) -> str:
        """Nothing is needed."""
        return ""

    def sequences(self, tokenizer: Any, row: Row, encoded: Encoded) -> list[Encoded]:
        """The row itself."""
        return [encoded]

    def outcome(self, stats: Sequence[TokenStats]) -> tuple[float, float]:
        """Mean over tokens, and how many they are."""
        return float(stats[0].nll.mean()), float(len(stats[0].nll))


@_add("label_accuracy", "the likeliest of an encoder's labels")
class LabelAccuracy:
    """1 if the row's label is the likeliest, else 0. Ties go to the wrong label.

    Without a head nothing is answered: 0.
    """

    reads = "labels"
    version = 1
    binary = True
    higher_is_better = True
    unit = "share"

    def check(self, tokenizer: Any, row: Row, encoded: Encoded) -> None:
        """Labels are checked where they are read."""

    def ready(self, run_code: bool) -> str:
        """Nothing is needed."""
        return ""

    def outcome(self, logits: np.ndarray, right: int | None) -> tuple[float, float]:
        """Whether the right one is above every other."""
        if right is None:
            return 0.0, 1.0
        return float((logits < logits[right]).sum() == len(logits) - 1), 1.0

    def unanswered(self, labels: int) -> float:
        """None is right."""
        return 0.0


@_add("label_nll", "negative log-likelihood of the row's label, from an encoder's head")
class LabelLikelihood:
    """Negative log-likelihood of the row's label, in nats.

    Without a head every label is as likely as the others.
    """

    reads = "labels"
    version = 1
    binary = False
    higher_is_better = False
    unit = "nats"

    def check(self, tokenizer: Any, row: Row, encoded: Encoded) -> None:
        """Labels are checked where they are read."""

    def ready(self, run_code: bool) -> str:
        """Nothing is needed."""
        return ""

    def outcome(self, logits: np.ndarray, right: int | None) -> tuple[float, float]:
        """From the softmax over the head's labels; InvalidInput for one that it does not know."""
        if right is None:
            raise InvalidInput(
                "the head knows not all of the task's labels, so they have no likelihood: train "
                "it on this revision, or score with `label_accuracy`"
            )
        wide = logits.astype("float64") - logits.max()
        return float(math.log(sum(map(math.exp, wide))) - wide[right]), 1.0

    def unanswered(self, labels: int) -> float:
        """Of the uniform distribution."""
        return math.log(labels)


def _add_comparison(source: str, scorer: Comparison) -> None:
    scorers.register(scorer.compare.__name__, source=source)(scorer)


_add_comparison(
    "F-measure of ROUGE-L, Lin 2004, by rouge_score, on what is generated",
    Comparison(texts.rouge_l, binary=False, unit="F-measure", version=2, library="rouge_score"),
)
_add_comparison(
    "mean of sentence BLEU (not corpus BLEU), by sacreBLEU, on what is generated",
    Comparison(texts.bleu, binary=False, unit="sentence BLEU", library="sacrebleu"),
)
_add_comparison(
    "mean of sentence chrF2, by sacreBLEU, on what is generated",
    Comparison(texts.chrf, binary=False, unit="sentence chrF2", library="sacrebleu"),
)
_add_comparison(
    "F-measure of shared words, SQuAD, arXiv:1606.05250, on what is generated",
    Comparison(texts.token_f1, binary=False, unit="F-measure"),
)
_add_comparison(
    "last number generated, GSM8K, arXiv:2110.14168",
    # Where completions are bare numbers, a model that reasons first needs room for it.
    Comparison(texts.number_match, binary=True, unit="share", margin=128),
)
_add_comparison(
    "the completion stands in what is generated",
    Comparison(texts.contains, binary=True, unit="share"),
)
_add_comparison(
    "what is generated is the completion, case and white space aside",
    Comparison(texts.text_match, binary=True, unit="share"),
)
scorers.register("refusal", source="phrases of arXiv:2406.11717; for harmful prompts")(
    Refusal(higher_is_better=True)
)
scorers.register("over_refusal", source="phrases of arXiv:2406.11717; for harmless prompts")(
    Refusal(higher_is_better=False)
)
scorers.register("pass_at_1", source="HumanEval, arXiv:2107.03374; runs the program generated")(
    PassAt1()
)
