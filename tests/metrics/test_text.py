"""Comparisons of texts against values worked by hand and against slow, plain versions."""

import random
from decimal import Decimal
from functools import cache

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from lori_manager.metrics import text

COMPARISONS = (
    text.rouge_l, text.bleu, text.chrf, text.token_f1, text.number_match, text.contains,
    text.text_match,
)  # fmt: skip
ONE_SIDED = (text.contains, text.bleu, text.chrf)
# Composed and decomposed, as they are in files of different systems.
CAFE, CAFE_APART = "Caf\N{LATIN SMALL LETTER E WITH ACUTE}", "Cafe\N{COMBINING ACUTE ACCENT}"


@pytest.mark.parametrize("compare", COMPARISONS)
def test_a_text_with_a_word_and_a_number_is_wholly_like_itself(compare):
    assert compare("Answer: 42 apples", "Answer: 42 apples") == 1.0


@pytest.mark.parametrize("compare", COMPARISONS)
def test_an_empty_text_is_like_no_reference(compare):
    for nothing in ("", " \n\t"):
        assert compare(nothing, "Answer: 42 apples") == 0.0


@pytest.mark.parametrize("compare", COMPARISONS)
def test_every_outcome_lies_between_0_and_1(compare):
    g = random.Random(0)
    words = ["the", "A", "42", "-3.5", "é", "日本", "?", "don't", "$1,000", "İ", "\u200d"]
    for _ in range(300):
        a, b = (" ".join(g.choices(words, k=g.randint(0, 6))) for _ in range(2))
        assert 0.0 <= compare(a, b) <= 1.0
        if compare not in ONE_SIDED:
            assert compare(a, b) == compare(b, a)


@pytest.mark.parametrize(
    ("said", "reference", "expected"),
    [
        # Lin 2004's S1 to S3: LCS of 3, 2 and of 4 words.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("the gunman police killed", "police killed the gunman", 2 / 4),
        ("a b c", "a b c d e f", 2 * 1 * 0.5 / 1.5),
        ("x a y b z", "a b", 2 * 1 * 0.4 / 1.4),
        ("b a", "a b", 1 / 2),
        ("a a a", "a", 1 / 2),
        ("Don't, stop!", "don t STOP", 1.0),
        ("one_two", "one two", 1.0),
        ("running", "run", 0.0),
        ("dog", "cat", 0.0),
        ("Straße", "stra e", 1.0),  # other letters than a-z part words
        ("日本 語", "日本", 0.0),
        ("?!", "?!", 0.0),
        ("word", "...", 0.0),
    ],
)
def test_rouge_l_by_hand(said, reference, expected):
    assert text.rouge_l(said, reference) == pytest.approx(expected)


def test_rouge_l_is_what_the_table_of_the_recursion_gives():
    g = random.Random(1)
    for _ in range(200):
        a, b = (g.choices("abcd", k=g.randint(1, 12)) for _ in range(2))

        @cache
        def common(i, j, a=a, b=b):
            if i == len(a) or j == len(b):
                return 0
            if a[i] == b[j]:
                return 1 + common(i + 1, j + 1)
            return max(common(i + 1, j), common(i, j + 1))

        expected = 2 * common(0, 0) / (len(a) + len(b))
        assert text.rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected)


def sentences(seed, count):
    g = random.Random(seed)
    words = ["the", "A", "cat", "sat,", "on", "42", "mats.", "Don't", "été", "(yes)", "x-y"]
    for _ in range(count):
        yield tuple(" ".join(g.choices(words, k=g.randint(1, 12))) for _ in range(2))


def test_what_the_libraries_say_is_what_is_stored():
    library = RougeScorer(["rougeL"], use_stemmer=False)
    sentence_bleu = sacrebleu.BLEU(effective_order=True)
    for said, reference in sentences(2, 200):
        expected = library.score(target=reference, prediction=said)["rougeL"].fmeasure
        assert text.rouge_l(said, reference) == expected
        expected = min(sentence_bleu.sentence_score(said, [reference]).score / 100, 1.0)
        assert text.bleu(said, reference) == expected
        expected = min(sacrebleu.CHRF().sentence_score(said, [reference]).score / 100, 1.0)
        assert text.chrf(said, reference) == expected


def test_bleu_by_hand():
    """No word missing: geometric mean of 5/6, 3/5, 2/4 and 1/3 by clipped counts."""
    said, reference = "the cat sat on the mat", "the cat sat on a mat"
    assert text.bleu(said, reference) == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    # Shorter than the reference: exp(1 - 4/2), and orders that are not there do not count.
    assert text.bleu("the cat", "the cat sat down") == pytest.approx(2.718281828459045**-1)


def test_the_mean_of_sentence_bleu_is_not_corpus_bleu():
    said, references = zip(*sentences(3, 50), strict=True)
    mean = sum(map(text.bleu, said, references)) / len(said)
    corpus = sacrebleu.corpus_bleu(said, [references]).score / 100
    assert abs(mean - corpus) > 0.005


@pytest.mark.parametrize(
    ("said", "reference", "expected"),
    [
        ("The cat!", "a cat", 1.0),
        ("cat cat dog", "cat dog dog", 2 * 2 / 6),
        ("in the year 1066", "1066", 2 * (1 / 3) * 1 / (4 / 3)),
        ("dog cat", "cat dog", 1.0),
        ("don't", "dont", 1.0),
        ("theatre", "the atre", 0.0),
        ("no", "yes", 0.0),
        ("the", "A", 1.0),
        ("the", "cat", 0.0),
        ("cat", "the", 0.0),
        ("1,000", "1000", 1.0),
        ("日本", "日本", 1.0),
    ],
)
def test_token_f1_by_hand(said, reference, expected):
    assert text.token_f1(said, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("said", "last"),
    [
        ("So 6 * 7 = 42.", "42"), ("#### 1,234,567", "1234567"), ("$1,234.50.", "1234.50"),
        ("-$5", "-5"), ("$-5", "-5"), ("\N{MINUS SIGN}7", "-7"), ("10-3", "3"), ("5 - 3", "3"),
        ("(-5)", "-5"), (".5", ".5"), ("-.5", "-.5"), ("3.14.15", "15"), ("1,2,3", "3"),
        ("12,3456", "3456"), (r"\boxed{42}", "42"), ("**42**", "42"), ("50%", "50"),
        ("42, I think", "42"), ("the 3rd", "3"), ("first 7, then 8 apples", "8"),
        ("\N{ARABIC-INDIC DIGIT FOUR}\N{ARABIC-INDIC DIGIT TWO}", "42"), ("9" * 400, "9" * 400),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(said, last):
    assert text.last_number(said) == Decimal(last)


@pytest.mark.parametrize("said", ["", "ten", "-", "$", ".", ",", "x - y", "½"])
def test_a_text_without_digits_has_no_number(said):
    assert text.last_number(said) is None
    assert text.number_match(said, "10") == 0.0
    assert text.number_match("10", said) == 0.0
    assert text.number_match(said, said) == 0.0


def test_numbers_are_equal_by_value_and_only_the_last_one_counts():
    assert text.number_match("it is 42.0 dollars", "#### 42") == 1.0
    assert text.number_match("1000", "reasoning: 3 * 4\n#### $1,000") == 1.0
    assert text.number_match("42 or 43", "42") == 0.0
    assert text.number_match("-42", "42") == 0.0
    assert text.number_match("9" * 400 + "1", "9" * 400 + "2") == 0.0


@pytest.mark.parametrize(
    ("said", "reference", "expected"),
    [
        ("The answer is Paris.", " Paris", 1), ("paris", "PARIS", 1), ("Parisian", "Paris", 0),
        ("I know", "no", 0), ("no, not that", "no", 1), ("17", "7", 0), ("a.b", "a*b", 0),
        ("New\n York", "new york", 1), ("York New", "new york", 0), ("I like C++!", "C++", 1),
        ("x", " ", 0), ("", " ", 0),
        (f"in the {CAFE_APART}, there", CAFE, 1), ("STRASSE", "straße", 1),
    ],
)  # fmt: skip
def test_contains_by_hand(said, reference, expected):
    assert text.contains(said, reference) == expected


@pytest.mark.parametrize(
    ("said", "reference", "expected"),
    [
        ("  New\u00a0York\n", " new york", 1), ("NewYork", "New York", 0), ("Paris.", "Paris", 0),
        (CAFE_APART, CAFE, 1), (CAFE, "cafe", 0), ("STRASSE", "straße", 1), ("yes yes", "yes", 0),
        ("", " ", 1),
    ],
)  # fmt: skip
def test_text_match_by_hand(said, reference, expected):
    assert text.text_match(said, reference) == expected
