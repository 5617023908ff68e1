"""Images in rows and columns with their names, as one PNG."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

GAP = 8  # pixels
LETTERS = 14  # height of the text, pixels
LINES = 3  # of a heading
SMALLEST = 160  # pixels of a cell's side: smaller images are enlarged, so that headings fit


def grid(rows: Sequence[Sequence[Image]], labels: Sequence[str], heads: Sequence[str]) -> Image:
    """One image of all, labels on the left, headings on top.

    Args:
        rows: images, all of one size; as many rows as `labels`, as many columns as `heads`.
        labels, heads: text; headings are broken into `LINES` lines, then cut.
    Raises:
        ValueError: other counts than that.
    """
    from PIL import Image as Images
    from PIL import ImageDraw, ImageFont

    if len(rows) != len(labels) or any(len(row) != len(heads) for row in rows):
        raise ValueError(f"got {len(rows)} rows for {len(labels)} labels and {len(heads)} heads")
    scale = max(1, -(-SMALLEST // rows[0][0].width))
    width, height = (scale * n for n in rows[0][0].size)
    font = ImageFont.load_default(LETTERS)
    per_line = max(8, int(width / (font.getlength("abcdefghij") / 10)))
    titles = ["\n".join(_lines(head, per_line)) for head in heads]
    left = 2 * GAP + int(max(font.getlength(_plain(label)) for label in labels))
    top = 2 * GAP + max(title.count("\n") + 1 for title in titles) * (LETTERS + 4)
    size = left + len(heads) * (width + GAP), top + len(rows) * (height + GAP)
    whole = Images.new("RGB", size, "white")
    draw = ImageDraw.Draw(whole)
    for column, title in enumerate(titles):
        draw.multiline_text((left + column * (width + GAP), GAP), title, "black", font, spacing=4)
    for number, (label, row) in enumerate(zip(labels, rows, strict=True)):
        y = top + number * (height + GAP)
        draw.text((GAP, y + height // 2), _plain(label), "black", font, anchor="lm")
        for column, image in enumerate(row):
            shown = image.convert("RGB").resize((width, height), Images.Resampling.NEAREST)
            whole.paste(shown, (left + column * (width + GAP), y))
    return whole


def png(image: Image) -> bytes:
    """The image as a PNG file's bytes."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _lines(text: str, width: int) -> list[str]:
    return textwrap.wrap(_plain(text), width, max_lines=LINES, placeholder=" ...") or [""]


def _plain(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
