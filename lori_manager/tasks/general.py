"""General text in pieces: what no task is about, for merges to leave alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lori_manager.errors import BadData
from lori_manager.tasks.encoding import Encoded, begin_of_text

PIECE = 128  # tokens


def general_rows(
    tokenizer: Any,
    file: Path | None,
    count: int,
    context: int | None = None,
    piece: int = PIECE,
) -> list[Encoded]:
    """Pieces of `piece` tokens, spread evenly over a text.

    Each begins with the begin-of-text token where the tokenizer puts one before plain text:
    without it some models' states are like nothing that they see in use.

    Args:
        tokenizer: the base's.
        file: UTF-8 text; None is the English manual that every Python brings along.
        count: how many at most.
        context: the model's longest input; pieces are no longer. None: no limit.
    Raises:
        BadData: a file that cannot be read, or that is shorter than one piece.
    """
    if file is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise BadData(f"cannot read {file} as UTF-8 text: {e}") from e
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = begin_of_text(tokenizer)
    first = [] if bos is None else [bos]
    size = min(piece, context or piece) - len(first)
    pieces = len(ids) // size
    if not pieces:
        raise BadData(f"{file} has {len(ids)} tokens: expected at least {size}, give a longer text")
    chosen = np.linspace(0, pieces - 1, min(count, pieces)).round().astype(int)
    return [
        Encoded(np.asarray([*first, *ids[i * size : (i + 1) * size]], np.int32), 1) for i in chosen
    ]
