"""Setting one default in a `lori.toml` that people write: comments and order stay."""

from __future__ import annotations

import re
import tomllib
from typing import Any

from lori_manager.errors import InvalidInput

_HEADER = re.compile(r"\s*\[\s*defaults\s*\]\s*(#.*)?$")
_TABLE = re.compile(r"\s*\[")


def with_default(text: str, key: str, value: list[str], where: str) -> str:
    """The text of a `lori.toml` with a list in [defaults] set.

    A line that sets the key is changed and keeps its comment; without one, a line is added
    behind the comment that shows the key (as `lori init` writes it) or the table's header.

    Args:
        text: TOML; anything from nothing on.
        key: of a list of words.
        where: the file's name for errors.
    Raises:
        InvalidInput: not TOML, or written in a way that this cannot change line by line.
    """
    wanted = f"{key} = [{', '.join(_quoted(word) for word in value)}]"
    before = _parsed(text, where)
    end = "\r\n" if "\r\n" in text else "\n"
    lines = text.split(end)
    header = next((i for i, line in enumerate(lines) if _HEADER.match(line)), None)
    if header is None:
        lines = ["[defaults]", wanted, *([""] if text else []), *lines]
    else:
        first, after, comment = _place(lines, header, key)
        lines[first:after] = [wanted + comment]
    changed = end.join(lines)
    expected = {**before, "defaults": {**before.get("defaults", {}), key: value}}
    try:
        good = tomllib.loads(changed) == expected
    except tomllib.TOMLDecodeError:
        good = False
    if not good:
        raise InvalidInput(f"{where} is written so that `{key}` must be set by hand: {wanted}")
    return changed


def _place(lines: list[str], header: int, key: str) -> tuple[int, int, str]:
    """Where the key's entry begins and ends, and the comment behind it."""
    below = range(header + 1, len(lines))
    stop = next((i for i in below if _TABLE.match(lines[i])), len(lines))
    for first in range(header + 1, stop):
        if re.match(rf"\s*{key}\s*=", lines[first]):
            for after in range(first + 1, stop + 1):
                comment = _comment_behind("\n".join(lines[first:after]))
                if comment is not None:
                    return first, after, comment
    shown = (i for i in range(header + 1, stop) if re.match(rf"\s*#\s*{key}\s*=", lines[i]))
    place = next(shown, header) + 1
    return place, place, ""


def _comment_behind(entry: str) -> str | None:
    """What stands behind the value of a whole `key = value`; None where it is not whole."""
    for stop in range(1, len(entry) + 1):
        rest = entry[stop:]
        if rest.strip() and not rest.lstrip().startswith("#"):
            continue
        try:
            tomllib.loads(entry[:stop])
        except tomllib.TOMLDecodeError:
            continue
        return rest.rstrip() if rest.strip() else ""
    return None


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise InvalidInput(f"{where} is not TOML: {e}") from e


def _quoted(word: str) -> str:
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
