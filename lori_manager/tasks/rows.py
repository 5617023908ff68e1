"""Rows: what a task is made of, their canonical form, and the hash that names them.

A row is a prompt and the completion to learn or to be scored against. Its canonical
form is one line of JSON, UTF-8, keys sorted, no spaces; its `key` is a hash of that
line, so it depends on nothing but the row.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

from lori_manager.errors import BadData

KNOWN = frozenset({"prompt", "completion", "choices", "messages"})
DEEPEST = 64  # nesting of a field's lists and objects; the JSON codec itself fails near 1000
# The messages of one conversation -> (prompt, completion); BadData where it cannot.
RenderChat = Callable[[Sequence[Mapping[str, Any]]], tuple[str, str]]

_encode = json.JSONEncoder(
    ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False
).encode


@dataclass(frozen=True)
class Row:
    """One example of a task.

    Attributes:
        prompt: may be empty.
        completion: what should follow it, white space included.
        choices: the possible answers; empty where the task is not multiple choice.
        extra: every other field of the source (answer, references, ...). Two of them decide
            how a row is scored: `tests` with `entry_point`, see `tasks.code`, and `lm_eval`,
            which `harness.freezing` writes: the document and what is asked about it.
        where: where it was read, for messages; no part of the row's identity.
    """

    prompt: str
    completion: str
    choices: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        if not KNOWN.isdisjoint(self.extra):
            raise ValueError(f"`extra` must not hold {sorted(KNOWN & set(self.extra))}")

    @cached_property
    def key(self) -> bytes:
        """The first 16 bytes of the SHA-256 of the row's canonical JSON."""
        return hashlib.sha256(canonical_json(self)).digest()[:16]


def canonical_json(row: Row) -> bytes:
    """The row as one line of JSON without its newline: sorted keys, UTF-8, no spaces."""
    fields = {"prompt": row.prompt, "completion": row.completion, **row.extra}
    if row.choices:
        fields["choices"] = row.choices
    return _encode(fields).encode()


def rows_to_jsonl(rows: Iterable[Row]) -> bytes:
    """The rows' canonical JSON, each line ended by one LF."""
    return b"".join(canonical_json(row) + b"\n" for row in rows)


def rows_from_jsonl(data: bytes) -> list[Row]:
    """The inverse of `rows_to_jsonl`.

    Checks the shape only, not the rules of `parse_row`: what an earlier version has
    stored must stay readable when the rules change.
    Raises:
        BadData: not the output of `rows_to_jsonl`.
    """
    rows = []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        where = f"stored row {number}"
        try:
            obj = decode_object(line.decode(), where)
        except UnicodeDecodeError as e:
            raise bad_row(where, "not UTF-8", "restore the file") from e
        prompt, completion = obj.pop("prompt", None), obj.pop("completion", None)
        choices = obj.pop("choices", [])
        texts = [prompt, completion, *choices] if isinstance(choices, list) else [None]
        if not all(isinstance(text, str) for text in texts) or "messages" in obj:
            raise bad_row(where, "not a stored row", "restore the file")
        rows.append(Row(prompt, completion, tuple(choices), obj, where))
    if data and not data.endswith(b"\n"):
        raise bad_row("stored rows", "the last line is cut short", "restore the file")
    return rows


def decode_object(text: str, where: str) -> dict[str, Any]:
    """Decode one JSON object.

    Raises:
        BadData: not JSON, not an object, a key twice, or nested too deep.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as e:
        found = shorten(text[max(0, e.pos - 20) : e.pos + 20]) if text.strip() else "nothing"
        problem = f"not JSON: {e.msg} at character {e.pos + 1}, near {found}"
        raise bad_row(where, problem, "mend the line") from e
    except _TwiceError as e:
        raise bad_row(where, f"the field {shorten(e.args[0])} comes twice", "keep one") from e
    except RecursionError as e:
        raise bad_row(where, "nested too deep", f"at most {DEEPEST} levels are kept") from e
    except ValueError as e:  # an integer of thousands of digits
        raise bad_row(where, f"not usable JSON: {e}", "mend the line") from e
    if not isinstance(value, dict):
        raise bad_row(where, f"expected a JSON object, found {shown(value)}", _FORMS)
    return value


def row_kind(obj: Mapping[str, Any]) -> str | None:
    """`"messages"` or `"prompt/completion"`; None where it has both or neither.

    A field that is null counts as absent, as it is in a Parquet column.
    """
    chat = obj.get("messages") is not None
    text = obj.get("prompt") is not None or obj.get("completion") is not None
    if chat == text:
        return None
    return "messages" if chat else "prompt/completion"


def parse_row(obj: Mapping[str, Any], where: str, render_chat: RenderChat | None = None) -> Row:
    """Turn one decoded JSON object into a checked row.

    Args:
        obj: with `prompt` and `completion`, or `messages` (role and content each, the
            last one the assistant's); `choices` if any; other fields go to `extra`.
            Not modified.
        where: file and line, for messages.
        render_chat: what makes prompt and completion of messages.
    Raises:
        BadData: with `where`, what was expected, what was found and what to do.
    """
    fault = _fault(obj, 0)
    if fault:
        path, problem = fault
        raise bad_row(where, f"`{path.lstrip('.')}` {problem}", "remove or replace it")
    kind = row_kind(obj)
    if kind == "messages":
        prompt, completion = _render(obj["messages"], where, render_chat)
    elif kind is None:
        both = obj.get("messages") is not None
        found = "both kinds of fields" if both else f"the fields {shorten(', '.join(obj), 60)}"
        raise bad_row(where, f"expected {_ONE_KIND}, found {found if obj else 'nothing'}", _FORMS)
    else:
        prompt, completion = obj.get("prompt"), obj.get("completion")
    if not isinstance(prompt, str):
        raise bad_row(where, f"`prompt` must be text, found {shown(prompt)}", "add or mend it")
    if not isinstance(completion, str) or not completion.strip():
        found = "no text" if completion is None else shown(completion)
        raise bad_row(
            where,
            f"`completion` must be text that is more than white space, found {found}",
            "add it or remove the row",
        )
    extra = {name: value for name, value in obj.items() if name not in KNOWN}
    choices = _choices(obj.get("choices"), completion, extra.get("answer"), where)
    return Row(prompt, completion, choices, extra, where)


def candidate_completions(row: Row) -> tuple[list[str], int]:
    """The completion as each choice would make it, and the index of the right one.

    Where the completion is one of the choices, white space around it aside, each
    candidate is a choice in that white space. Otherwise each choice stands in for the
    last occurrence of `answer` in the completion, whole words first: "the correct
    answer is answer4". The right candidate is always the completion itself.
    Raises:
        ValueError: a row without choices, or one that `parse_row` would have refused.
    """
    span = _answer_span(row.completion, _stripped(row.choices), row.extra.get("answer"))
    if span is None:
        raise ValueError("the row has no choices, or none of them is its answer")
    start, stop, right = span
    head, tail = row.completion[:start], row.completion[stop:]
    return [head + choice + tail for choice in _stripped(row.choices)], right


def bad_row(where: str, problem: str, advice: str) -> BadData:
    """A BadData of one printable line."""
    return BadData(one_line(f"{where}: {problem}; {advice}"))


def one_line(text: str) -> str:
    """The text with all that is not printable as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, limit: int = 40) -> str:
    """The text in quotes, its middle left out where it is long."""
    if len(text) > limit:
        half = (limit - 3) // 2
        text = text[:half] + "..." + text[-half:]
    return one_line(repr(text))


def shown(value: object) -> str:
    """A decoded JSON value as a message names it, whatever its size."""
    if isinstance(value, str):
        return shorten(value)
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with {len(value)} fields"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return "a number"
    return f"a {type(value).__name__}"


_ONE_KIND = "`prompt` and `completion`, or `messages`"
_FORMS = 'write {"prompt": ..., "completion": ...} or {"messages": [...]}'


class _TwiceError(Exception):
    """A key that comes twice in one JSON object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    obj = dict(pairs)
    if len(obj) != len(pairs):
        raise _TwiceError(_twice([name for name, _ in pairs]))
    return obj


def _twice(names: Sequence[str]) -> str:
    """The first that comes more than once."""
    return next(name for name, count in Counter(names).items() if count > 1)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _fault(value: object, depth: int) -> tuple[str, str] | None:
    """(path, problem) of what JSON, UTF-8 or a tokenizer cannot carry; None if all is well."""
    if isinstance(value, str):
        if "\0" in value:
            return "", "holds a NUL character"
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as e:
                return "", f"holds half of a character, {value[e.start]!r}"
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else ("", f"is {value}, which is no JSON number")
    if value is None or isinstance(value, (bool, int)):
        return None
    if depth >= DEEPEST:
        return "", f"is nested deeper than {DEEPEST} levels"
    if isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(name, str):
                return "", f"has a field name that is {shown(name)}, not text"
            inner = _fault(name, depth) or _fault(item, depth + 1)
            if inner:
                return f".{shorten(name)[1:-1]}{inner[0]}", inner[1]
        return None
    if isinstance(value, list):
        for i, item in enumerate(value):
            inner = _fault(item, depth + 1)
            if inner:
                return f"[{i}]{inner[0]}", inner[1]
        return None
    return "", f"is a {type(value).__name__}, which JSON does not have"


def _render(
    messages: object, where: str, render_chat: RenderChat | None
) -> tuple[object, object]:  # checked by the caller like a row's own fields
    def refuse(problem: str) -> NoReturn:
        advice = 'write [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]'
        raise bad_row(where, problem, advice)

    if not isinstance(messages, list) or len(messages) < 2:
        refuse(f"`messages` must be a list of at least two, found {shown(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            refuse(f"`messages[{i}]` must be an object, found {shown(message)}")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                refuse(f"`messages[{i}].{name}` must be text, found {shown(message.get(name))}")
    last = messages[-1]
    if last["role"] != "assistant":
        refuse(f"the last of `messages` must be the assistant's, found {shown(last['role'])}")
    if not last["content"].strip():
        refuse("the assistant's last message is empty")
    if render_chat is None:
        advice = "give the rows as `prompt` and `completion`"
        raise bad_row(where, "`messages` need a model's chat template, and there is none", advice)
    try:
        prompt, completion = render_chat(messages)
    except BadData as e:
        raise BadData(one_line(f"{where}: {e}")) from e
    for text in (prompt, completion):
        if isinstance(text, str) and (fault := _fault(text, 0)):
            advice = "mend the chat template"
            raise bad_row(where, f"the rendered conversation {fault[1]}", advice)
    return prompt, completion


def _choices(choices: object, completion: str, answer: object, where: str) -> tuple[str, ...]:
    if choices is None:
        return ()
    advice = "mend `choices` or leave them out"
    if not isinstance(choices, list) or len(choices) < 2:
        raise bad_row(
            where, f"`choices` must be a list of at least two texts, found {shown(choices)}", advice
        )
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise bad_row(
                where, f"each of `choices` must be non-empty text, found {shown(choice)}", advice
            )
    plain = _stripped(choices)
    if len(set(plain)) != len(plain):
        raise bad_row(where, f"`choices` must differ, found {shorten(_twice(plain))} twice", advice)
    span = _answer_span(completion, plain, answer)
    if span is None:
        problem = f"none of the {len(plain)} `choices` is the completion {shorten(completion)}"
        if answer is not None:
            problem += f", nor an `answer` inside it ({shown(answer)})"
        raise bad_row(where, problem, "mend one, or name the right choice in `answer`")
    if isinstance(answer, str) and answer.strip() in plain and plain[span[2]] != answer.strip():
        problem = f"the completion is {shorten(plain[span[2]])} but `answer` is {shorten(answer)}"
        raise bad_row(where, problem, "mend one of them")
    return tuple(choices)


def _stripped(choices: Sequence[str]) -> list[str]:
    return [choice.strip() for choice in choices]


def _answer_span(completion: str, plain: list[str], answer: object) -> tuple[int, int, int] | None:
    """(start, stop) of the answer in the completion and its index among the choices."""
    text = completion.strip()
    if text in plain:
        start = completion.index(text)
        return start, start + len(text), plain.index(text)
    if not isinstance(answer, str) or answer.strip() not in plain:
        return None
    text = answer.strip()
    whole = [m.start() for m in re.finditer(rf"(?<!\w){re.escape(text)}(?!\w)", completion)]
    start = whole[-1] if whole else completion.rfind(text)
    return (start, start + len(text), plain.index(text)) if start >= 0 else None
