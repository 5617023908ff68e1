"""Rows to token ids, with the tokenizer that is passed in; no torch, no transformers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lori_manager.errors import BadData, InvalidInput
from lori_manager.sandbox.forked import Forked, Refused
from lori_manager.tasks.rows import RenderChat, Row, bad_row, candidate_completions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lori_manager.tasks.labelled import LabelledText

Tokenizer = Any  # a transformers tokenizer, fast or slow
_CHUNK = 4096  # texts a call: a fast tokenizer's results hold far more than the ids


@dataclass(frozen=True, eq=False)
class Encoded:
    """One row as a model sees it.

    Attributes:
        ids: (length,) int32 from `encode_rows`, any sequence elsewhere: prompt,
            completion, end of text.
        prompt_length: how many of `ids` are prompt, at least 1 from `encode_rows`; the
            loss and the score are taken over the rest.
        truncated: how many tokens the prompt lost at its beginning; 0 where it fits.
        taught: where a teacher's words for each token of the completion stand in its
            table, in place of the tokens themselves; see `SoftTargets`.
    """

    ids: Sequence[int] | NDArray[np.int32]
    prompt_length: int
    truncated: int = 0
    taught: NDArray[np.int64] | None = None

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.ids)

    @property
    def read_from(self) -> slice:
        """The places whose next token belongs to the completion; the last one of a prompt alone."""
        return slice(max(self.prompt_length, 1) - 1, max(len(self.ids) - 1, self.prompt_length))


def encode_rows(
    tokenizer: Tokenizer, rows: Sequence[Row], *, max_length: int, context: int | None
) -> list[Encoded]:
    """Tokenise prompts and completions apart and join them, end of text last.

    A begin-of-text token comes first where the tokenizer puts one before plain text by
    itself and the prompt does not bring it. A prompt without tokens becomes that token
    (or the end-of-text token, where there is none), since a model predicts only what
    follows something. A row that is too long loses the beginning of its prompt, never
    the begin-of-text token nor any of its completion.

    Args:
        max_length: tokens a row.
        context: the model's longest input, None where it has no limit.
    Raises:
        BadData: a completion that leaves no room for one token of prompt.
        InvalidInput: a tokenizer without an end-of-text token.
    """
    import numpy as np

    eos = _end_of_text(tokenizer)
    bos = begin_of_text(tokenizer)
    limit = max_length if context is None else min(max_length, context)
    prompts = _token_ids(tokenizer, (row.prompt for row in rows))
    completions = _token_ids(tokenizer, (row.completion for row in rows))
    encoded = []
    for i, row in enumerate(rows):
        where = row.where or f"row {i + 1}"
        prompt, answer = prompts[row.prompt], completions[row.completion]
        if not answer:
            problem = "the tokenizer finds no token in the completion"
            raise bad_row(where, problem, "mend or remove the row")
        if answer[-1] != eos:
            answer = [*answer, eos]
        prompt = _begun(tokenizer, prompt, bos, eos)
        room = limit - len(answer)
        if room < 1:
            name = "the model's context" if limit == context else "`max_length`"
            raise bad_row(
                where,
                f"the completion has {len(answer)} tokens with end of text, and {name} of "
                f"{limit} must hold them and one token of prompt",
                "shorten it" if limit == context else "shorten it or raise `max_length`",
            )
        prompt, cut = _shortened(prompt, room, bos)
        ids = np.array(prompt + answer, np.int32)
        encoded.append(Encoded(ids, len(prompt), cut))
    return encoded


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str], *, room: int | None = None
) -> list[Encoded]:
    """Prompts alone, with the tokens that `encode_rows` gives them.

    Args:
        room: tokens a prompt; what is too long loses its beginning. None: no limit.
    """
    import numpy as np

    eos = _end_of_text(tokenizer)
    bos = begin_of_text(tokenizer)
    tokens = _token_ids(tokenizer, prompts)
    encoded = []
    for text in prompts:
        ids, cut = _begun(tokenizer, tokens[text], bos, eos), 0
        if room is not None:
            ids, cut = _shortened(ids, room, bos)
        encoded.append(Encoded(np.array(ids, np.int32), len(ids), cut))
    return encoded


def encode_choices(tokenizer: Tokenizer, row: Row) -> tuple[list[list[int]], int]:
    """The token ids of each candidate completion, and the index of the right one.

    Ids as they follow the prompt, without end of text: with it, the right one is what
    `encode_rows` puts after the prompt. See `candidate_completions` for what varies.
    Raises:
        BadData: a row without choices, or choices that are the same to the tokenizer.
    """
    where = row.where or "a row"
    if not row.choices:
        raise bad_row(where, "it has no `choices` to choose from", "add them or use another scorer")
    texts, right = candidate_completions(row)
    ids = _token_ids(tokenizer, texts)
    candidates = [list(ids[text]) for text in texts]
    if len({tuple(candidate) for candidate in candidates}) != len(candidates):
        problem = "the tokenizer makes the same tokens of two `choices`"
        raise bad_row(where, problem, "mend the choices")
    return candidates, right


def lengths_summary(encoded: Sequence[Encoded | LabelledText]) -> dict[str, int]:
    """How long rows are, in tokens.

    `tokens` is the sum after truncation; `median`, `p95` (the nearest rank) and
    `longest` are before it; `truncated` counts rows. All 0 for no rows.
    """
    lengths = sorted(len(item.ids) + item.truncated for item in encoded)
    count = len(lengths)
    return {
        "rows": count,
        "tokens": sum(len(item.ids) for item in encoded),
        "median": statistics.median_high(lengths) if lengths else 0,
        "p95": lengths[-(-95 * count // 100) - 1] if lengths else 0,
        "longest": lengths[-1] if lengths else 0,
        "truncated": sum(item.truncated > 0 for item in encoded),
    }


def chat_renderer(tokenizer: Tokenizer) -> RenderChat:
    """A function from messages to (prompt, completion) by the tokenizer's chat template.

    The prompt ends where the template would have the assistant begin. The completion is
    the last message as the template writes it, without the end-of-turn token where that
    is the end-of-text token, which `encode_rows` adds; another end-of-turn token stays.
    What white space the template adds after the turn is left out.
    The function raises BadData where there is no template, where it fails, and where it
    writes a finished conversation differently from one that waits for its answer.

    A template is a program of the model's author. transformers runs it in Jinja's sandbox, which
    lets it call and change nothing but does not end it: so it runs in a fork, within `Bounds`.
    """

    def written(turns: list[dict[str, Any]]) -> tuple[str, str]:
        prompt = tokenizer.apply_chat_template(
            turns[:-1], tokenize=False, add_generation_prompt=True
        )
        return prompt, tokenizer.apply_chat_template(turns, tokenize=False)

    forked = Forked(written)

    def render(messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
        if not getattr(tokenizer, "chat_template", None):
            raise BadData(
                "the base's tokenizer has no chat template to write `messages` with; give the "
                "rows as `prompt` and `completion`, or use an instruction-tuned base"
            )
        turns = [dict(message) for message in messages]
        try:
            prompt, full = forked(turns)
        except Refused as e:
            raise BadData(f"the chat template refuses the messages: {str(e)[:160]}") from e
        if not isinstance(prompt, str) or not isinstance(full, str):
            raise BadData("the chat template writes no text: use another base")
        if not full.startswith(prompt):
            raise BadData(
                "the chat template writes the finished conversation differently from its "
                "beginning, so prompt and completion cannot be told apart; give the rows as "
                "`prompt` and `completion`"
            )
        completion = full[len(prompt) :]
        # The content may name the end-of-turn token or end in white space of its own.
        content = turns[-1]["content"]
        end = completion.rfind(content) + len(content) if content in completion else 0
        written, after = completion[:end], completion[end:]
        stop = tokenizer.eos_token
        after = after[: after.index(stop)] if stop and stop in after else after.rstrip()
        return prompt, written + after

    return render


def _token_ids(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, list[int]]:
    """Text -> ids, each text tokenised once, nothing added."""
    unique = list(dict.fromkeys(texts))
    out: dict[str, list[int]] = {}
    for start in range(0, len(unique), _CHUNK):
        chunk = unique[start : start + _CHUNK]
        ids = tokenizer(
            chunk, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        out.update(zip(chunk, ids, strict=True))
    return out


def _begun(tokenizer: Tokenizer, prompt: list[int], bos: int | None, eos: int) -> list[int]:
    """The prompt with its begin-of-text token, and never empty."""
    if bos is not None and prompt[:1] != [bos]:
        return [bos, *prompt]
    return prompt or [_stand_in(tokenizer, eos)]


def _shortened(prompt: list[int], room: int, bos: int | None) -> tuple[list[int], int]:
    """The prompt without what is too much at its beginning, and how many tokens that is."""
    cut = max(0, len(prompt) - room)
    if cut:
        head = prompt[:1] if bos is not None else []
        prompt = head + prompt[cut + len(head) :]
    return prompt, cut


def _end_of_text(tokenizer: Tokenizer) -> int:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InvalidInput(
            "the base's tokenizer has no end-of-text token, which every completion must end "
            "with; set `eos_token` in its tokenizer_config.json"
        )
    return int(eos)


def begin_of_text(tokenizer: Tokenizer) -> int | None:
    """The token that the tokenizer itself puts before plain text, if it does."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"][:1]
    return int(bos) if list(first) == [bos] and list(plain) != [bos] else None


def _stand_in(tokenizer: Tokenizer, eos: int) -> int:
    bos = tokenizer.bos_token_id
    return eos if bos is None else int(bos)
