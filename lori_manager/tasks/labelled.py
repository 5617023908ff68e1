"""Rows that carry a label: read, checked, and brought into the form that an encoder takes.

A row of text is `{"text": ..., "label": ...}`, with `text_pair` where the label is of two texts.
It is kept as any other row is: the text is its prompt, the label its completion.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from lori_manager.errors import BadData
from lori_manager.tasks.rows import Row, bad_row, parse_row, shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAIR = "text_pair"  # the field with the second text of a row that has two
_FORM = 'write {"text": ..., "label": ...}, and `text_pair` for a second text'
_CHUNK = 4096  # texts a call: a fast tokenizer's results hold far more than the ids


@dataclass(frozen=True, eq=False)
class LabelledText:
    """One row as a text encoder sees it.

    Attributes:
        ids: (length,) int32, with the tokens that the tokenizer puts around a text.
        label: its place among the task's labels.
        segments: (length,) int32, which of two texts a token is of; None where the model
            is not told.
        truncated: how many tokens were left out; 0 where the row fits.
    """

    ids: NDArray[np.int32]
    label: int
    segments: NDArray[np.int32] | None = None
    truncated: int = 0

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.ids)

    @property
    def read_from(self) -> slice:
        """The places that the label is read from: the first token."""
        return slice(0, 1)


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """One row as an image encoder sees it.

    Attributes:
        digest: of the stored image.
        label: its place among the task's labels.
        read: gives the image's bytes.
        length: one, as a row of text has its tokens.
        truncated: nothing is.
        read_from: the first place, of the class token.
    """

    digest: str
    label: int
    read: Callable[[], bytes] = field(repr=False)
    length: ClassVar[int] = 1
    truncated: ClassVar[int] = 0
    read_from: ClassVar[slice] = slice(0, 1)


Labelled = LabelledText | LabelledImage


def parse_labelled(obj: Mapping[str, Any], where: str) -> Row:
    """Turn one decoded JSON object with `text` and `label` into a checked row.

    Args:
        obj: other fields go to `extra`; a label may be text, a whole number, or true or false,
            which become the text that JSON has for them. Not modified.
        where: file and line, for messages.
    Raises:
        BadData: with `where`, what was expected, what was found and what to do.
    """
    told = {name: value for name, value in obj.items() if value is not None}
    text, label = told.pop("text", None), told.pop("label", None)
    if not isinstance(text, str) or not text.strip():
        problem = f"`text` must be text that is more than white space, found {shown(text)}"
        raise bad_row(where, problem, _FORM)
    label = label_of(label, where)
    pair = told.get(PAIR)
    if pair is not None and not isinstance(pair, str):
        raise bad_row(where, f"`{PAIR}` must be text, found {shown(pair)}", _FORM)
    clash = {"prompt", "completion", "messages", "choices"} & told.keys()
    if clash:
        problem = f"the field `{min(clash)}` beside `text` and `label`"
        raise bad_row(where, problem, "a row of an encoder's task has no such field: leave it out")
    return parse_row({**told, "prompt": text, "completion": label}, where)


def label_of(value: object, where: str) -> str:
    """A decoded JSON value as a label; BadData for what is none."""
    if isinstance(value, int):  # and true or false, which are whole numbers to Python
        value = json.dumps(value)
    if isinstance(value, str) and value and value == value.strip() and value.isprintable():
        return value
    problem = f"`label` must be a printable word or a whole number, found {shown(value)}"
    raise bad_row(where, problem, "mend it")


def asked_of(row: Row) -> str:
    """What a row asks, without the answer: its text, or both of them."""
    return "\0".join([row.prompt, *([row.extra[PAIR]] if PAIR in row.extra else [])])


def labels_of(splits: Mapping[str, Sequence[Row]]) -> tuple[str, ...]:
    """The labels of a task, sorted: those learned, or of a task that is only scored all of them.

    Raises:
        BadData: fewer than two, or an eval row of a label that no training row has.
    """
    learned = [row for name, rows in splits.items() if name != "eval" for row in rows]
    labels = tuple(sorted({row.completion for row in learned or splits["eval"]}))
    known = set(labels)
    for number, row in enumerate(splits["eval"], 1):
        if row.completion not in known:
            shortened = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
            raise bad_row(
                row.where or f"eval row {number}",
                f"no training row has the label {shown(row.completion)}",
                f"labels are: {shortened}; add rows to learn it from, or take this one out",
            )
    if len(labels) < 2:
        raise BadData(f"every row has the label {labels[0]!r}: expected two labels or more")
    return labels


def labelled_images(
    rows: Sequence[Row], labels: Sequence[str], get: Callable[[str], bytes]
) -> list[LabelledImage]:
    """Rows of images with labels, see `image_intake`, as an encoder takes them.

    Args:
        labels: of the task; a row's is one of them.
        get: digest -> the stored bytes.
    """
    places = {label: i for i, label in enumerate(labels)}
    found = []
    for row in rows:
        digest = str(row.extra["image"])
        found.append(LabelledImage(digest, places[row.completion], partial(get, digest)))
    return found


def encode_labelled(
    tokenizer: Any,
    rows: Sequence[Row],
    labels: Sequence[str],
    *,
    max_length: int,
    context: int | None,
) -> list[LabelledText]:
    """Tokenise rows as the encoder was pre-trained to read them: whole, with its own tokens.

    What is too long loses its end; of two texts, the longer one does.

    Args:
        labels: of the task; a row's is one of them.
        max_length: tokens a row.
        context: the model's longest input, None where it has no limit.
    """
    import numpy as np

    places = {label: i for i, label in enumerate(labels)}
    limit = max_length if context is None else min(max_length, context)
    segmented = "token_type_ids" in tokenizer.model_input_names
    numbered: list[tuple[int, LabelledText]] = []
    for paired in (False, True):
        chosen = [i for i, row in enumerate(rows) if (PAIR in row.extra) == paired]
        for start in range(0, len(chosen), _CHUNK):
            part = chosen[start : start + _CHUNK]
            texts = [[rows[i].prompt for i in part]]
            if paired:
                texts.append([rows[i].extra[PAIR] for i in part])
            told: dict[str, Any] = {"return_attention_mask": False, "verbose": False}
            whole = tokenizer(*texts, return_token_type_ids=False, **told)["input_ids"]
            cut = tokenizer(
                *texts, return_token_type_ids=segmented, truncation=True, max_length=limit, **told
            )
            for n, i in enumerate(part):
                ids = np.array(cut["input_ids"][n], np.int32)
                segments = np.array(cut["token_type_ids"][n], np.int32) if segmented else None
                lost = len(whole[n]) - len(ids)
                label = places[rows[i].completion]
                numbered.append((i, LabelledText(ids, label, segments, lost)))
    return [one for _, one in sorted(numbered, key=lambda pair: pair[0])]
