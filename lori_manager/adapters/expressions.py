"""Regular expressions out of strangers' files: PEFT's patterns, with an end to how long they take.

An expression such as `(a+)+b` takes years on a name of forty letters. `re` cannot be stopped;
the `regex` package, which transformers needs as well, can. What is no expression to `re`, as
PEFT uses it, is none here.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import regex

from lori_manager.errors import ImportRefused

LONGEST = 10_000  # characters
REPEATS = 10_000  # the product of all counts: `regex` writes repeated parts out
SECONDS = 0.5  # of processor time, for all names of an adapter together

_BRACES = re.compile(r"\{[^}]*\}?")
_COUNT = re.compile(r"\{[0-9]{0,5}(,[0-9]{0,5})?\}")  # others are fuzzy matching to `regex`

_left: ContextVar[list[float] | None] = ContextVar("_left", default=None)


@contextmanager
def one_adapter() -> Iterator[None]:
    """What is matched inside has `SECONDS` together."""
    token = _left.set([SECONDS])
    try:
        yield
    finally:
        _left.reset(token)


@lru_cache(4096)
def compiled(expression: str, field: str, written: str) -> regex.Pattern[str]:
    """The expression.

    Args:
        field, written: for messages: of the configuration, and what stands there.
    Raises:
        ImportRefused: not a regular expression, or too long.
    """
    shown = repr(written) if len(written) <= 77 else repr(written)[:77] + "..."
    if len(expression) > LONGEST:
        raise ImportRefused(f"{field} has an expression of {len(expression)} characters: shorten "
                            f"it to {LONGEST}")  # fmt: skip
    braces = _BRACES.findall(expression)
    counts = [int(n) for brace in braces for n in re.findall("[0-9]+", brace)]
    if not all(_COUNT.fullmatch(b) for b in braces) or math.prod(n or 1 for n in counts) > REPEATS:
        raise ImportRefused(
            f"{field} has {shown}, with braces that are no counts or count to more than {REPEATS}: "
            "list the modules by name"
        )
    try:
        re.compile(expression)
        return regex.compile(expression)
    except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as e:
        raise ImportRefused(f"{field} has {shown}, which is no regular expression: {e}") from e


def match(pattern: regex.Pattern[str], text: str, field: str) -> regex.Match[str] | None:
    """Whether the text begins so; see `fullmatch`."""
    return _timed(pattern, text, field, whole=False)


def fullmatch(pattern: regex.Pattern[str], text: str, field: str) -> regex.Match[str] | None:
    """Whether that is the whole text.

    Raises:
        ImportRefused: the time for this adapter is over.
    """
    return _timed(pattern, text, field, whole=True)


def _timed(
    pattern: regex.Pattern[str], text: str, field: str, *, whole: bool
) -> regex.Match[str] | None:
    left = _left.get() or [SECONDS]
    call = pattern.fullmatch if whole else pattern.match
    begun = time.process_time()
    try:
        if left[0] <= 0:
            raise TimeoutError
        return call(text, timeout=left[0])
    except TimeoutError as e:
        raise ImportRefused(
            f"{field} has expressions that take too long to match: list the modules by name"
        ) from e
    finally:
        left[0] -= time.process_time() - begun
