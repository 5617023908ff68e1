"""General text in pieces: what no task is about, for merges to leave alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lori_manager.errors import BadData
from lori_manager.tasks.encoding import Encoded

PIECE = 128  # tokens


def general_rows(tokenizer: Any, file: Path | None, count: int) -> list[Encoded]:
    """Pieces of `PIECE` tokens, spread evenly over a text.

    Args:
        tokenizer: the base's.
        file: UTF-8 text; None is the English manual that every Python brings along.
        count: how many at most.
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
    pieces = len(ids) // PIECE
    if not pieces:
        raise BadData(
            f"{file} has {len(ids)} tokens: expected at least {PIECE}, give a longer text"
        )
    chosen = np.linspace(0, pieces - 1, min(count, pieces)).round().astype(int)
    return [Encoded(np.asarray(ids[i * PIECE : (i + 1) * PIECE], np.int32), 1) for i in chosen]
