"""Rows: the rules, the canonical form and its inverse, the place of a choice."""

import contextlib
import hashlib
import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lori_manager.errors import BadData
from lori_manager.tasks.rows import (
    KNOWN,
    Row,
    candidate_completions,
    canonical_json,
    decode_object,
    parse_row,
    rows_from_jsonl,
    rows_to_jsonl,
)

WHERE = "train.jsonl, line 7"
quick = settings(max_examples=60, deadline=None, database=None)

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
completions = texts.filter(lambda t: t.strip())
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
extras = st.dictionaries(texts.filter(lambda t: t not in KNOWN), values, max_size=3)
rows = st.builds(Row, texts, completions, st.just(()), extras) | st.builds(
    lambda prompt, choice, extra: Row(prompt, f" {choice}", (choice, choice + "x"), extra),
    texts,
    completions.map(str.strip).filter(bool),
    extras.map(lambda extra: {k: v for k, v in extra.items() if k != "answer"}),
)


def refusal(obj, render_chat=None):
    with pytest.raises(BadData) as e:
        parse_row(obj, WHERE, render_chat)
    message = str(e.value)
    assert message.startswith(f"{WHERE}: ")
    assert message.isprintable(), "one line that any terminal can show"
    assert len(message) < 400
    return message


@quick
@given(st.lists(rows, max_size=4))
def test_rows_come_back_from_their_canonical_lines_exactly(some):
    data = rows_to_jsonl(some)
    again = rows_from_jsonl(data)
    assert again == some
    assert rows_to_jsonl(again) == data
    assert data.count(b"\n") == len(some)
    assert [r.key for r in again] == [r.key for r in some]


@quick
@given(rows)
def test_a_row_parsed_from_its_canonical_line_is_that_row(row):
    line = canonical_json(row).decode()
    assert parse_row(decode_object(line, WHERE), WHERE) == row


def test_key_is_a_hash_of_sorted_utf8_json_without_spaces():
    row = Row("Größe?", " 3", ("3", "4"), {"b": [1, {"d": 1, "c": None}], "answer": "3"})
    line = (
        '{"answer":"3","b":[1,{"c":null,"d":1}],"choices":["3","4"],'
        '"completion":" 3","prompt":"Größe?"}'
    )
    assert canonical_json(row) == line.encode()
    assert row.key == hashlib.sha256(line.encode()).digest()[:16]


def test_key_depends_on_content_and_not_on_the_order_of_fields_or_the_place():
    a = parse_row({"prompt": "p", "completion": "c", "x": 1, "y": 2}, "a.jsonl, line 1")
    b = parse_row({"y": 2, "x": 1, "completion": "c", "prompt": "p"}, "b.jsonl, line 9")
    assert a == b
    assert a.key == b.key
    assert (a.where, b.where) == ("a.jsonl, line 1", "b.jsonl, line 9")
    for other in ({"x": 2}, {"x": 1.0}, {"z": None}, {"completion": "c "}, {"prompt": "p "}):
        changed = {"prompt": "p", "completion": "c", "x": 1, "y": 2, **other}
        assert parse_row(changed, WHERE).key != a.key


def test_extra_must_not_hide_a_field_of_the_row():
    with pytest.raises(ValueError, match="prompt"):
        Row("p", "c", (), {"prompt": "q"})


def test_other_fields_are_kept_and_the_prompt_may_be_empty():
    obj = {"prompt": "", "completion": "c", "tests": ["assert f(1) == 2"], "task_id": 3, "n": None}
    row = parse_row(obj, WHERE)
    assert row == Row("", "c", (), {"tests": ["assert f(1) == 2"], "task_id": 3, "n": None})


def test_null_fields_count_as_absent():
    obj = {"prompt": "p", "completion": "c", "messages": None, "choices": None}
    assert parse_row(obj, WHERE) == Row("p", "c")


@pytest.mark.parametrize(
    ("obj", "said"),
    [
        ({}, "expected `prompt` and `completion`, or `messages`, found nothing"),
        ({"text": "x"}, "found the fields 'text'"),
        ({"prompt": "p", "completion": "c", "messages": []}, "found both kinds of fields"),
        ({"prompt": "p"}, "`completion` must be text that is more than white space"),
        ({"prompt": "p", "completion": ""}, "found ''"),
        ({"prompt": "p", "completion": " \n\t"}, "found ' \\\\n\\\\t'"),
        ({"prompt": "p", "completion": 3}, "found a number"),
        ({"prompt": "p", "completion": ["c"]}, "found a list of 1"),
        ({"completion": "c"}, "`prompt` must be text, found null"),
        ({"prompt": {"a": 1}, "completion": "c"}, "`prompt` must be text, found an object with 1"),
    ],
)
def test_a_row_without_usable_text_is_refused(obj, said):
    assert said.replace("\\\\", "\\") in refusal(obj)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"prompt": "a\0b"}, "`prompt` holds a NUL character"),
        ({"prompt": "a\ud83d"}, "`prompt` holds half of a character, '\\ud83d'"),
        ({"x": {"y": [0, "\udc00"]}}, "`x.y[1]` holds half of a character"),
        ({"x\ud800": 1}, "half of a character"),
        ({"x": [float("nan")]}, "`x[0]` is nan, which is no JSON number"),
        ({"x": float("-inf")}, "`x` is -inf"),
        ({"x": b"raw"}, "`x` is a bytes, which JSON does not have"),
        ({"x": {3: 1}}, "`x` has a field name that is a number"),
    ],
)
def test_what_json_or_a_tokenizer_cannot_carry_is_refused_by_path(extra, said):
    assert said in refusal({"prompt": "p", "completion": "c", **extra})


def test_nesting_has_a_limit_that_is_told():
    deep = "x"
    for _ in range(62):
        deep = [deep]
    obj = {"prompt": "p", "completion": "c", "x": deep}
    row = parse_row(obj, WHERE)
    assert rows_from_jsonl(rows_to_jsonl([row])) == [row]
    assert "deeper than 64 levels" in refusal({**obj, "x": [[[deep]]]})


def test_long_findings_are_shortened():
    message = refusal({"prompt": "p", "completion": "c" * 10**6, "choices": ["y", "z"]})
    assert "'cccccccccccccccccc...cccccccccccccccccc'" in message
    assert len(refusal({"prompt": "p", "k" * 10**6: "\0", "completion": "c"})) < 300
    assert len(refusal({f"field {i}": 1 for i in range(10**4)})) < 300


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1', "not JSON: Expecting ',' delimiter at character 8"),
        ("", "near nothing"),
        ("[1, 2]", "expected a JSON object, found a list of 2"),
        ('"text"', "expected a JSON object, found 'text'"),
        ("null", "expected a JSON object, found null"),
        ('{"a": 1, "b": 2, "a": 3}', "the field 'a' comes twice"),
        ('{"x": {"\\ud800": 1, "\\ud800": 2}}', "comes twice"),
        ("[" * 100_000, "nested too deep"),
        ('{"a": ' * 100_000, "nested too deep"),
        ('{"a": ' + "9" * 5000 + "}", "not usable JSON"),
        ('{"a": "x\x1by"}', "Invalid control character"),
    ],
)
def test_text_that_is_not_one_json_object_is_refused(text, said):
    with pytest.raises(BadData) as e:
        decode_object(text, WHERE)
    assert said in str(e.value)
    assert str(e.value).startswith(f"{WHERE}: ")
    assert str(e.value).isprintable()
    assert len(str(e.value)) < 300


@pytest.mark.parametrize(
    ("choices", "extra", "said"),
    [
        ("yes", {}, "a list of at least two texts, found 'yes'"),
        (["yes"], {}, "found a list of 1"),
        ([], {}, "found a list of 0"),
        (["yes", 3], {}, "each of `choices` must be non-empty text, found a number"),
        (["yes", " "], {}, "each of `choices` must be non-empty text, found ' '"),
        (["yes", "no", " yes"], {}, "`choices` must differ, found 'yes' twice"),
        (["no", "maybe"], {}, "none of the 2 `choices` is the completion ' yes'"),
        (["no", "maybe"], {"answer": "no"}, "nor an `answer` inside it ('no')"),
        (["yes", "no"], {"answer": "no"}, "the completion is 'yes' but `answer` is 'no'"),
    ],
)
def test_choices_that_cannot_be_scored_are_refused(choices, extra, said):
    obj = {"prompt": "p", "completion": " yes", "choices": choices, **extra}
    assert said in refusal(obj)


@pytest.mark.parametrize(
    ("completion", "choices", "answer", "candidates", "right"),
    [
        (" yes", ["no", "yes"], None, [" no", " yes"], 1),
        ("\n yes \n", ["yes ", " no"], None, ["\n yes \n", "\n no \n"], 0),
        ("yes", ["no", "yes"], "yes", ["no", "yes"], 1),
        (" 2", ["1", "2"], 2, [" 1", " 2"], 1),
        (
            "the correct answer is answer4",
            ["answer1", "answer4"],
            "answer4",
            ["the correct answer is answer1", "the correct answer is answer4"],
            1,
        ),
        ("an answer: a.", ["a", "b"], "a", ["an answer: a.", "an answer: b."], 0),
        ("(a) is a", ["a", "b"], "a", ["(a) is a", "(a) is b"], 0),
        ("Grade:C+", ["C+", "C"], "C+", ["Grade:C+", "Grade:C"], 0),
        ("回答は猫です", ["犬", "猫"], "猫", ["回答は犬です", "回答は猫です"], 1),
    ],
)
def test_a_choice_takes_the_place_of_the_answer(completion, choices, answer, candidates, right):
    obj = {"prompt": "p", "completion": completion, "choices": choices, "answer": answer}
    assert candidate_completions(parse_row(obj, WHERE)) == (candidates, right)


@quick
@given(
    st.text(string.printable, max_size=10),
    st.lists(st.text("ab .\n", min_size=1), min_size=2, max_size=4, unique_by=str.strip),
    st.data(),
)
def test_the_right_candidate_is_always_the_completion(head, choices, data):
    answer = data.draw(st.sampled_from(choices))
    tail = data.draw(st.sampled_from(["", " ", ".", " b"]))
    obj = {"prompt": "", "completion": head + answer + tail, "choices": choices, "answer": answer}
    try:
        row = parse_row(obj, WHERE)
    except BadData:
        return
    candidates, right = candidate_completions(row)
    assert candidates[right] == row.completion
    assert len(set(candidates)) == len(candidates) == len(row.choices)


def test_a_row_without_choices_has_no_candidates():
    with pytest.raises(ValueError, match="no choices"):
        candidate_completions(Row("p", "c"))


USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "hello"}


def join(messages):
    return "|".join(m["content"] for m in messages[:-1]) + ">", messages[-1]["content"]


def test_messages_become_prompt_and_completion_and_are_not_kept():
    row = parse_row({"messages": [USER, REPLY, USER, REPLY], "id": 3}, WHERE, join)
    assert row == Row("hi|hello|hi>", "hello", (), {"id": 3})


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hi", "`messages` must be a list of at least two, found 'hi'"),
        ([REPLY], "found a list of 1"),
        ([USER, "hi"], "`messages[1]` must be an object, found 'hi'"),
        ([USER, {"role": "assistant"}], "`messages[1].content` must be text, found null"),
        ([{"content": "hi"}, REPLY], "`messages[0].role` must be text, found null"),
        ([USER, {**REPLY, "content": [{"text": "hello"}]}], "found a list of 1"),
        ([USER, REPLY, USER], "the last of `messages` must be the assistant's, found 'user'"),
        ([USER, {**REPLY, "content": " "}], "the assistant's last message is empty"),
        ([USER, {**REPLY, "content": "\0"}], "`messages[1].content` holds a NUL character"),
    ],
)
def test_messages_that_teach_nothing_are_refused(messages, said):
    assert said in refusal({"messages": messages}, join)


def test_what_a_chat_template_refuses_is_told_with_the_line():
    def refuse(messages):
        raise BadData("roles must\nalternate")

    assert "roles must\\nalternate" in refusal({"messages": [USER, REPLY]}, refuse)
    assert "there is none" in refusal({"messages": [USER, REPLY]}, None)
    assert "more than white space" in refusal({"messages": [USER, REPLY]}, lambda m: ("p", " "))
    assert "half of a character" in refusal({"messages": [USER, REPLY]}, lambda m: ("\ud800", "c"))


@quick
@given(st.binary(max_size=80) | rows.map(canonical_json))
def test_stored_bytes_that_are_not_rows_are_bad_data(data):
    for cut in (data, data + b"\n", data[: len(data) // 2]):
        with contextlib.suppress(BadData):
            rows_to_jsonl(rows_from_jsonl(cut))


@pytest.mark.parametrize(
    "data",
    [b'{"completion":"c","prompt":"p"}', b'{"completion":"c"}\n', b'{"completion":1,"prompt":2}\n',
     b'{"choices":"ab","completion":"c","prompt":"p"}\n', b"\n", b"\xff\n",
     b'{"completion":"c","messages":[],"prompt":"p"}\n'],
)  # fmt: skip
def test_a_damaged_snapshot_is_refused(data):
    with pytest.raises(BadData, match="stored row"):
        rows_from_jsonl(data)


def test_rows_stored_under_laxer_rules_stay_readable():
    line = json.dumps({"prompt": "p", "completion": " ", "choices": ["x"]})
    assert rows_from_jsonl(line.encode() + b"\n") == [Row("p", " ", ("x",))]
