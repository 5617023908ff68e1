"""Names and references: `safety`, `safety#2`, `safety@3`, `safety@champion`, `safety%1`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lori_manager.errors import InvalidInput

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,63}")
_NUMBER = re.compile(r"[0-9]{1,18}")  # what SQLite's integers hold
_DIGITS = re.compile(r"[0-9]+")
RESERVED = frozenset({"base", "latest"})
BASE = "base"
LATEST = "latest"


def check_name(name: str, what: str = "name") -> str:
    """Return `name` if it may name a task, line or alias.

    Allowed: 1 to 64 letters, digits, `_`, `-` and single dots, starting with a
    letter or digit, and none of the reserved words `base` and `latest`. A name of
    digits alone is refused because `line@3` means version 3.
    Raises:
        InvalidInput: with the offending name, shortened.
    """
    shown = repr(name if len(name) <= 40 else name[:37] + "...")
    if not _NAME.fullmatch(name) or name.isdigit():
        raise InvalidInput(
            f"{what} {shown} is not usable: expected 1 to 64 letters, digits, '_', '-' or single "
            "dots, starting with a letter or digit, and not a number; choose another name"
        )
    if name.lower() in RESERVED:
        raise InvalidInput(f"{what} {shown} is reserved; choose another name")
    return name


def is_number(text: str) -> bool:
    """Whether `text` is a version or revision in ASCII digits that the store can hold."""
    return _NUMBER.fullmatch(text) is not None


@dataclass(frozen=True)
class AdapterRef:
    """A parsed `line@selector`; the selector is a version, `latest` or an alias."""

    line: str
    selector: str

    @property
    def version(self) -> int | None:
        """The version number, or None for `latest` and aliases."""
        if not _DIGITS.fullmatch(self.selector):
            return None
        return int(self.selector) if is_number(self.selector) else 10**18  # no line has so many

    def __str__(self) -> str:
        return f"{self.line}@{self.selector}"


def parse_adapter_ref(text: str) -> AdapterRef | None:
    """Parse `line@3`, `line@latest` or `line@alias`; None stands for `base`.

    A bare `line` means `line@latest`.
    Raises:
        InvalidInput: anything else.
    """
    if text == BASE:
        return None
    line, at, selector = text.partition("@")
    if not at:
        selector = LATEST
    if not line or not selector or "@" in selector:
        raise InvalidInput(
            f"{text!r} is not a reference: expected `line@3`, `line@latest`, `line@alias` or `base`"
        )
    check_name(line, "line")
    if is_number(selector):
        if int(selector) < 1:
            raise InvalidInput(f"{text!r}: versions start at 1")
    elif selector != LATEST:
        check_name(selector, "alias")
    return AdapterRef(line, selector)


def parse_mask_ref(text: str) -> tuple[str, int]:
    """Parse `task%2` into (task, version).

    Raises:
        InvalidInput: not of that form.
    """
    task, percent, version = text.partition("%")
    if not percent or not is_number(version) or int(version) < 1:
        raise InvalidInput(f"{text!r} is not a mask: expected `task%version`, such as `safety%1`")
    return check_name(task, "task"), int(version)
