"""What commands print: tables for people, one JSON document for programs."""

from __future__ import annotations

import json
import math
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any

import typer

from lori_manager.plain import plain

NONE = "-"
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def print_json(value: Any) -> None:
    """One document on stdout, in ASCII, so that any terminal and program takes it."""
    typer.echo(json.dumps(plain(value), indent=2, allow_nan=False))


def one_line(text: str) -> str:
    """`text` without line breaks and control characters, which could steer a terminal."""
    if text.isascii() and text.isprintable():
        return text
    shown = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text)
    return " ".join(shown.split())


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Aligned columns on stdout, every cell whole.

    Not rich's table: it would take most of a second for a thousand lines and cut
    references to the width of the terminal.

    Args:
        columns: headings; `>` before one aligns its column right.
        rows: cells; None is shown as `-`, for what is not there or not known.
    """
    cells = [[one_line(NONE if c is None else str(c)) for c in row] for row in rows]
    titles = [c.removeprefix(">") for c in columns]
    widths = [max(map(_width, column)) for column in zip(titles, *cells, strict=True)]
    right = [c.startswith(">") for c in columns]

    def line(row: Sequence[str]) -> str:
        padded = []
        for cell, width, to_right in zip(row, widths, right, strict=True):
            space = " " * (width - _width(cell))
            padded.append(space + cell if to_right else cell + space)
        return "  ".join(padded).rstrip()

    typer.echo("\n".join([_bold(line(titles)), *map(line, cells)]))


def fields(pairs: Mapping[str, object]) -> None:
    """Name and value, a line each; None is left out."""
    shown = {k: one_line(str(v)) for k, v in pairs.items() if v is not None}
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        typer.echo(f"{name:<{width}}  {value or NONE}")


def title(text: str) -> None:
    """A heading with an empty line before it."""
    typer.echo("\n" + _bold(text))


def _width(text: str) -> int:
    """Columns that a terminal needs for `text`."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def _bold(text: str) -> str:
    return f"\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() else text


def _unless_nan(value: float | None, shown: Callable[[float], str]) -> str:
    return NONE if value is None or math.isnan(value) else shown(value)


def number(value: float | None, digits: int = 3) -> str:
    """`0.853`, or `-` for what was not measured."""
    return _unless_nan(value, lambda v: f"{v:.{digits}f}")


def signed(value: float | None, digits: int = 3) -> str:
    """`+0.012`, or `-` for what was not measured."""
    return _unless_nan(value, lambda v: f"{v:+.{digits}f}")


def with_error(value: float | None, error: float | None) -> str:
    """`0.853 +- 0.012`: a value and its standard error."""
    told = "" if error is None or math.isnan(error) else f" +- {error:.3f}"
    return _unless_nan(value, lambda v: f"{v:.3f}{told}")


def change(value: float | None, error: float | None) -> str:
    """`+0.120 +- 0.031`: a difference and its standard error."""
    told = "" if error is None or math.isnan(error) else f" +- {error:.3f}"
    return _unless_nan(value, lambda v: f"{v:+.3f}{told}")


def count(value: int | None) -> str:
    """`4,884,480`."""
    return NONE if value is None else f"{value:,}"


def size(value: int | None) -> str:
    """`1.43 MB`: bytes, in powers of 1000."""
    if value is None:
        return NONE
    scaled = float(value)
    for unit in ("B", "kB", "MB"):
        if scaled < 1000:
            return f"{scaled:.0f} B" if unit == "B" else f"{scaled:.3g} {unit}"
        scaled /= 1000
    return f"{scaled:.3g} GB"


def time(value: datetime | None) -> str | None:
    """`2026-01-31 14:05`, in the reader's time zone."""
    return None if value is None else value.astimezone().strftime("%Y-%m-%d %H:%M")


def duration(seconds: float | None) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
