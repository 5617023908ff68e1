"""A text against a reference: ROUGE-L, SQuAD's F1, the last number, containing, equality.

Every comparison takes (text, reference), gives a number from 0 (nothing alike) to 1, and
knows one reference. Words are runs of letters and digits: where a script puts no spaces
between words, a whole run counts as one.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

_WORD = re.compile(r"[^\W_]+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_CURRENCY = str.maketrans({"$": None, "\N{MINUS SIGN}": "-"})
# A minus after a letter or digit joins or subtracts; commas count where they group by three.
_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)")


def rouge_l(text: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words; 0 where either has no words.

    With LCS the number of words of the longest common subsequence: P = LCS / words of
    the text, R = LCS / words of the reference, F = 2 P R / (P + R). Words are lower-cased
    and not stemmed.
    Source: Lin 2004, ROUGE, aclanthology.org/W04-1013, section 3, with beta = 1; on ASCII
    the same as the `rouge_score` package. Differs there: letters and digits of all
    scripts make words, not only a-z and 0-9.

    >>> rouge_l("police kill the gunman", "police killed the gunman")
    0.75
    >>> rouge_l("the gunman kill police", "police killed the gunman")
    0.5
    """
    said, expected = _words(text), _words(reference)
    return _f_measure(_common_subsequence(said, expected), len(said), len(expected))


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


def _words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits."""
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())


def _squad_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _f_measure(common: int, said: int, expected: int) -> float:
    """2 P R / (P + R) of P = common / said and R = common / expected; 0 for nothing common."""
    return 2 * common / (said + expected) if common else 0.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    One row of the usual table is the bits of an integer, a 0 where the length grows:
    Hyyrö, Bit-parallel LCS-length computation revisited, 2004.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    every = (1 << len(a)) - 1
    row = every
    for word in b:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & every
    return len(a) - row.bit_count()
