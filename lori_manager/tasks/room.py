"""How much a model may write."""

from __future__ import annotations

from collections.abc import Sequence

from lori_manager.tasks.encoding import Encoded

MOST_NEW_TOKENS = 512  # that any scorer of text lets a row have


def room_for(encoded: Sequence[Encoded], margin: int) -> int:
    """`margin` tokens more than the longest completion of these rows, at most MOST_NEW_TOKENS."""
    longest = max((len(e.ids) - e.prompt_length for e in encoded), default=1)
    return min(longest + margin, MOST_NEW_TOKENS)
