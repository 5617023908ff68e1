"""Names and references: what is allowed, what it means, and one line for the rest."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lori_manager.errors import InvalidInput
from lori_manager.refs import AdapterRef, check_name, is_number, parse_adapter_ref, parse_mask_ref


@pytest.mark.parametrize("name", ["a", "7b", "safety", "a.b", "A_b-c.1", "x" * 64, "based", "1e5"])
def test_usable_names_are_returned_as_they_are(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "a/b", "..", "a..b", ".a", "-a", "_a", "a@b", "a#1", "a%1", "it's", 'a"', "a b", "a\n",
     "ä", "3", "007", "x" * 65, "x" * 300, "a\x00b", "²"],
)  # fmt: skip
def test_a_name_that_could_be_misread_is_refused_in_one_short_line(name):
    with pytest.raises(InvalidInput, match=r"^line .* is not usable: expected 1 to 64") as e:
        check_name(name, "line")
    assert len(str(e.value)) < 250
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["base", "latest", "BASE", "Latest"])
def test_reserved_words_are_no_names(name):
    with pytest.raises(InvalidInput, match=f"alias '{name}' is reserved"):
        check_name(name, "alias")


@pytest.mark.parametrize(
    ("text", "line", "selector", "version"),
    [
        ("safety@3", "safety", "3", 3),
        ("safety@007", "safety", "007", 7),
        ("safety@latest", "safety", "latest", None),
        ("safety", "safety", "latest", None),
        ("a.b-c@champion", "a.b-c", "champion", None),
        ("a@1e5", "a", "1e5", None),
    ],
)
def test_references_mean_a_line_and_a_version_or_alias(text, line, selector, version):
    ref = parse_adapter_ref(text)
    assert ref == AdapterRef(line, selector)
    assert ref.version == version
    assert str(ref) == f"{line}@{selector}"


def test_base_is_no_adapter():
    assert parse_adapter_ref("base") is None


@pytest.mark.parametrize(
    "text",
    ["", "@", "a@", "@3", "a@b@c", "a@0", "a@-1", "a@../b", "base@1", "latest@1", "a@base", "a@²",
     "a@٣", "a@" + "9" * 19, "a@" + "9" * 5000, "a%1", "a@ 1"],
)  # fmt: skip
def test_what_is_no_reference_is_an_invalid_input(text):
    with pytest.raises(InvalidInput):
        parse_adapter_ref(text)


@given(st.text(max_size=12) | st.from_regex(r"\A[a-z@%#0-9.²-]{1,9}\Z"))
def test_any_text_is_a_reference_or_an_invalid_input(text):
    for parse in (parse_adapter_ref, parse_mask_ref):
        with contextlib.suppress(InvalidInput):
            parse(text)


def test_a_mask_is_a_task_and_a_version():
    assert parse_mask_ref("safety%2") == ("safety", 2)


@pytest.mark.parametrize(
    "text",
    ["safety", "safety%", "%1", "safety%0", "safety%x", "safety%1%2", "s%²", "s%" + "9" * 19],
)
def test_what_is_no_mask_is_an_invalid_input(text):
    with pytest.raises(InvalidInput):
        parse_mask_ref(text)


def test_numbers_are_ascii_digits_that_a_database_holds():
    assert is_number("0")
    assert is_number("9" * 18)
    assert not any(is_number(t) for t in ["", "-1", "+1", "1.0", "²", "٣", "1\n", "9" * 19])
