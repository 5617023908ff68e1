"""A text against a reference: ROUGE-L, BLEU, chrF, SQuAD's F1, the last number, and the like.

Every comparison takes (text, reference), gives a number from 0 (nothing alike) to 1, and
knows one reference.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from decimal import Decimal
from functools import cache
from typing import Any

from lori_manager.extras import load_extra

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_CURRENCY = str.maketrans({"$": None, "\N{MINUS SIGN}": "-"})
# A minus after a letter or digit joins or subtracts; commas count where they group by three.
_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)")


def rouge_l(text: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words, by the `rouge_score` package.

    P and R are the subsequence's share of the text's and of the reference's words, and
    F = 2 P R / (P + R); 0 where either has no words. Words are runs of a-z and 0-9 in lower
    case and are not stemmed: other letters part words, so that texts of other scripts have
    none.
    Raises:
        InvalidInput: the extra `scorers` is not installed.
    Source: Lin 2004, ROUGE, aclanthology.org/W04-1013, section 3, with beta = 1.

    >>> rouge_l("police kill the gunman", "police killed the gunman")
    0.75
    """
    return float(_rouge().score(reference, text)["rougeL"].fmeasure)


@cache
def _rouge() -> Any:
    module = load_extra("rouge_score.rouge_scorer", "scorers", "`rouge_l`")
    return module.RougeScorer(["rougeL"])


def bleu(text: str, reference: str) -> float:
    """BLEU of the one sentence as a share of 1, by sacreBLEU with its defaults.

    Up to four words in a row, tokenizer 13a, exponential smoothing, and no order longer than
    the text ("effective order"), so that a short text that is right has 1. A mean over rows
    is the mean of sentence BLEU. Corpus BLEU, which papers print, adds the counts of all rows
    up before it divides, and is neither that mean nor any row's number.
    Raises:
        InvalidInput: the extra `scorers` is not installed.
    Source: Papineni et al. 2002, aclanthology.org/P02-1040; Post 2018, arXiv:1804.08771.

    >>> round(bleu("the cat sat on the mat", "the cat sat on a mat"), 4)
    0.5373
    """
    metric = load_extra("sacrebleu", "scorers", "`bleu`")
    return min(float(metric.sentence_bleu(text, [reference]).score) / 100, 1.0)


def chrf(text: str, reference: str) -> float:
    """chrF2 of the one sentence as a share of 1, by sacreBLEU with its defaults.

    F-measure (beta 2) of up to six characters in a row, white space aside; of any script.
    Raises:
        InvalidInput: the extra `scorers` is not installed.
    Source: Popovic 2015, aclanthology.org/W15-3049; Post 2018, arXiv:1804.08771.

    >>> round(chrf("the cat sat on the mat", "the cat sat on a mat"), 4)
    0.7208
    """
    metric = load_extra("sacrebleu", "scorers", "`chrf`")
    return min(float(metric.sentence_chrf(text, [reference]).score) / 100, 1.0)


def token_f1(text: str, reference: str) -> float:
    """F-measure of the words that text and reference share, each counted as often as in both.

    Lower case, ASCII punctuation deleted, then the articles a, an and the, then split at
    white space. Where either has no words left: 1 if both have none, else 0.
    Source: SQuAD's evaluation script (1.1; the rule for no words is 2.0's),
    arXiv:1606.05250.

    >>> token_f1("The Norman dynasty.", "the Normans' dynasty of Normandy")
    0.3333333333333333
    """
    said, expected = _squad_words(text), _squad_words(reference)
    if not said or not expected:
        return float(said == expected)
    return _f_measure((Counter(said) & Counter(expected)).total(), len(said), len(expected))


def number_match(text: str, reference: str) -> float:
    """1 if the last number in the text equals the last one in the reference, else 0.

    By value: 42, 42. and 42.0 are equal. No number in either is 0.
    Source: GSM8K, arXiv:2110.14168, whose answers end in `#### 42`; taking the last number
    instead of what follows a mark is lm-evaluation-harness's `flexible-extract`.

    >>> number_match("He pays 3 * $400 = $1,200.", "#### 1200")
    1.0
    """
    said = last_number(text)
    return float(said is not None and said == last_number(reference))


def last_number(text: str) -> Decimal | None:
    """The last number written in digits, None where there is none.

    Commas between groups of three, dollar signs and a dot at the end are no part of it.
    A fraction or an exponent is read as the numbers that it is written with.

    >>> last_number("between -3 and $1,234.50."), last_number("ten")
    (Decimal('1234.50'), None)
    """
    found = _NUMBER.findall(text.translate(_NO_CURRENCY))
    return Decimal(found[-1].replace(",", "")) if found else None


def contains(text: str, reference: str) -> float:
    """1 if the reference stands in the text as whole words, else 0.

    Case and white space aside; the reference's own punctuation counts. A reference of
    white space alone stands in nothing.

    >>> contains("It is New  York, I know.", "new york"), contains("I know", "no")
    (1.0, 0.0)
    """
    wanted = _plain(reference)
    inside = re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", _plain(text))
    return float(bool(wanted) and inside is not None)


def text_match(text: str, reference: str) -> float:
    """1 if both are the same text, case and the amount of white space aside, else 0.

    >>> text_match("New  York\\n", " new york"), text_match("New York.", "New York")
    (1.0, 0.0)
    """
    return float(_plain(text) == _plain(reference))


def _plain(text: str) -> str:
    """Composed characters, case folded, runs of white space one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _squad_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _f_measure(common: int, said: int, expected: int) -> float:
    """2 P R / (P + R) of P = common / said and R = common / expected; 0 for nothing common."""
    return 2 * common / (said + expected) if common else 0.0
