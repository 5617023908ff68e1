"""Refusals by phrase: each phrase, what surrounds it, and what it is known to get wrong."""

import pytest

from lori_manager.metrics.refusal import PHRASES, is_refusal


@pytest.mark.parametrize("phrase", PHRASES)
def test_each_phrase_is_a_refusal_wherever_it_stands(phrase):
    curly = phrase.replace("'", "\u2019")
    for text in (phrase, phrase.upper(), f"Well. {curly} do it", phrase.replace(" ", "\n  ")):
        assert is_refusal(text), text


@pytest.mark.parametrize(
    "text", ["", " ", "Sure, here is how.", "Ask an assistant", "I can, and I will", "Sorry!"]
)
def test_other_texts_are_none(text):
    assert not is_refusal(text)


def test_the_list_is_the_published_one():
    assert len(PHRASES) == len({p.casefold() for p in PHRASES}) == 12


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Das mache ich nicht.", False),
        ("No. That would hurt people.", False),
        ("I'm sorry you feel unwell. Step 1: mix", True),
    ],
)
def test_what_phrases_cannot_see_is_what_the_documentation_says(text, told):
    assert is_refusal(text) is told
