"""Every failure that a user can cause or meet, each with its own exit code.

A message says what was wrong, what was expected, what was found and what to do.
The CLI prints it as one line and exits with `exit_code`; a caller's bug is a
ValueError or TypeError instead. The codes are documented in the README.
"""

from __future__ import annotations

_LINE = 400  # characters of another library's message


def first_line(error: BaseException) -> str:
    """The first line of what an error says, shortened; its type where it says nothing."""
    return shortened(next(iter(str(error).strip().splitlines()), type(error).__name__))


def shortened(line: str) -> str:
    """The line, cut where it is too long for a message."""
    return line if len(line) <= _LINE else line[: _LINE - 3] + "..."


class LoriError(Exception):
    """Base of all domain failures."""

    exit_code = 1


class InvalidInput(LoriError):
    """An argument, flag or configuration value that no run can use."""

    exit_code = 2


class Diverged(InvalidInput):
    """A training whose loss or values stopped being finite."""


class EndedElsewhere(LoriError):
    """Another process of the same training has ended, and says why."""


class AuditFailed(LoriError):
    """A task on the audited line fell further than allowed."""

    exit_code = 3


class NotFound(LoriError):
    """No such workspace, task, line, adapter, mask, alias or method."""

    exit_code = 4


class BadData(LoriError):
    """Task data that cannot be read, or a row that cannot be used."""

    exit_code = 5


class WrongBase(LoriError):
    """The base model is not the one this workspace, adapter or mask was made for."""

    exit_code = 6


class IncompatibleStore(LoriError):
    """The database was written by another version of lori, or is not lori's."""

    exit_code = 7


class DamagedObject(LoriError):
    """A stored file is missing, cut short, altered or malformed."""

    exit_code = 8


class StorageFailed(LoriError):
    """The disk or the database refused: full, read-only, locked."""

    exit_code = 9


class Conflict(LoriError):
    """The name is taken, or another process holds what this command needs."""

    exit_code = 10


class ImportRefused(LoriError):
    """At least one foreign adapter could not be imported faithfully."""

    exit_code = 11


class Unhealthy(LoriError):
    """`lori doctor` found what needs mending."""

    exit_code = 13


class GateRefused(LoriError):
    """The gate does not let a version take an alias.

    Attributes:
        told: what the gate said, a `gating.Gated`; None where several versions were judged.
    """

    exit_code = 12

    def __init__(self, message: str, told: object = None) -> None:
        super().__init__(message)
        self.told = told
