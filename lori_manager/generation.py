"""What the model writes after a prompt: greedy decoding in batches, with a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from lori_manager.errors import BadData
from lori_manager.models import BaseModel
from lori_manager.tasks.batches import length_batches
from lori_manager.tasks.encoding import Encoded

Prompt = Sequence[int] | NDArray[np.int32]


def generate(
    base: BaseModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch: int,
    on_batch: Callable[[int, int], None] | None = None,
    *,
    min_new_tokens: int = 0,
    cache: bool = True,
) -> list[list[int]]:
    """Token ids that greedy decoding puts after each prompt, the end of text left out.

    Decoding is transformers' own, of the model as it now is, adapter layers included.
    None of the model's generation settings applies but its end-of-text ids. Prompts go in
    batches of like length, the longest first, padded on the left; the batch size changes
    the result by rounding only.

    Args:
        base: the model; not changed.
        prompts: token ids, at least one each; order is kept in the result.
        max_new_tokens: where to stop what has not ended, at least 1.
        batch: prompts at a time. Each keeps keys and values of all its tokens in memory.
        on_batch: called with (prompts done, prompts in all).
        min_new_tokens: the end of text may not come before; for measurements.
        cache: keep keys and values instead of computing them again; for measurements.
    Raises:
        BadData: a prompt that with `max_new_tokens` is longer than the model's context.
        ValueError: an empty prompt, or `max_new_tokens` below 1.
    """
    _check_lengths(prompts, max_new_tokens, base.context)
    pad = int(base.tokenizer.pad_token_id or 0)
    ends = end_ids(base)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=cache,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )
    out: list[list[int]] = [[] for _ in prompts]
    done = 0
    with _only(config, base), torch.inference_mode():
        for numbers in length_batches([len(p) for p in prompts], batch):
            ids, mask = (
                torch.from_numpy(a).to(base.device)
                for a in _pad_left([prompts[i] for i in numbers], pad)
            )
            found = base.model.generate(ids, attention_mask=mask, generation_config=config)
            for i, tokens in zip(numbers, found[:, ids.shape[1] :].tolist(), strict=True):
                stop = next((n for n, token in enumerate(tokens) if token in ends), None)
                out[i] = tokens[:stop]
            done += len(numbers)
            if on_batch:
                on_batch(done, len(prompts))
    return out


def completions(
    base: BaseModel,
    rows: Sequence[Encoded],
    max_new_tokens: int,
    batch: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[tuple[str, str]]:
    """(what the model writes after a row's prompt, the row's completion), both as text.

    Both are decoded alike, special tokens left out. At most half of the model's context is
    given to new tokens; a prompt that does not fit beside them loses its beginning, but
    never a begin-of-text token.

    Args:
        base, batch, on_batch: as for `generate`.
        rows: encoded rows; order is kept in the result.
        max_new_tokens: for each row.
    """
    prompts, max_new_tokens = within_context(
        base, [row.ids[: row.prompt_length] for row in rows], max_new_tokens
    )
    said = generate(base, prompts, max_new_tokens, batch, on_batch)
    own = [row.ids[row.prompt_length :] for row in rows]
    return [(text_of(base, a), text_of(base, b)) for a, b in zip(said, own, strict=True)]


def within_context(
    base: BaseModel, prompts: Sequence[Prompt], max_new_tokens: int
) -> tuple[list[Prompt], int]:
    """Prompts cut at their beginning, and how many new tokens fit behind each.

    New tokens get at most half of the model's context; a begin-of-text token is never cut.
    """
    if base.context is None:
        return list(prompts), max_new_tokens
    max_new_tokens = min(max_new_tokens, base.context // 2)
    begin = getattr(base.tokenizer, "bos_token_id", None)
    return [_cut(p, base.context - max_new_tokens, begin) for p in prompts], max_new_tokens


def end_ids(base: BaseModel) -> set[int]:
    """The tokens that end a text: the tokenizer's, and all that the model's settings name."""
    found: set[int] = set()
    for source in (base.tokenizer, base.model.config, base.model.generation_config):
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, list | tuple) else () if ids is None else (ids,))
    return found


def _check_lengths(prompts: Sequence[Prompt], new: int, context: int | None) -> None:
    if new < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, got {new}")
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise ValueError(f"prompt {number} is empty: expected at least one token")
        if context is not None and len(prompt) + new > context:
            raise BadData(
                f"prompt {number} has {len(prompt)} tokens, and the model's context of {context} "
                f"must also hold {new} new ones: shorten the prompt or `max_new_tokens`"
            )


def _pad_left(prompts: Sequence[Prompt], pad: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """ids and attention mask, (prompts, longest): the last column holds each one's last token."""
    longest = max(len(p) for p in prompts)
    ids = np.full((len(prompts), longest), pad, np.int64)
    mask = np.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = prompt
        mask[i, longest - len(prompt) :] = 1
    return ids, mask


def _cut(prompt: Prompt, room: int, begin: int | None) -> Prompt:
    """The prompt without what is too much at its beginning, begin-of-text aside."""
    over = len(prompt) - room
    if over <= 0:
        return prompt
    if prompt[0] != begin:
        return prompt[over:]
    return [int(prompt[0]), *(int(i) for i in prompt[over + 1 :])]


def text_of(base: BaseModel, ids: Prompt) -> str:
    """The tokens as text, special ones left out."""
    text: str = base.tokenizer.decode(
        [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


@contextmanager
def _only(config: GenerationConfig, base: BaseModel) -> Iterator[None]:
    """Let `config` alone apply: what it leaves open is filled in from the model's own settings."""
    own = base.model.generation_config
    base.model.generation_config = config
    try:
        yield
    finally:
        base.model.generation_config = own
