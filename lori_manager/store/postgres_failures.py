"""What a PostgreSQL server or its driver refuses, in words that say what to do."""

from __future__ import annotations

import re

from sqlalchemy.exc import DBAPIError

from lori_manager.errors import (
    Conflict,
    DamagedObject,
    IncompatibleStore,
    InvalidInput,
    LoriError,
    StorageFailed,
)

_RETRY = "what was told as done is there; look what is, and retry"
_LOGIN = "set PGPASSWORD, or add a line to ~/.pgpass; the URL's password is never kept"
_TOLD: dict[str, tuple[type[LoriError], str]] = {
    "55P03": (
        StorageFailed,
        "{shown} stayed locked by another process for {seconds} s: wait for it, retry",
    ),
    "40001": (
        StorageFailed,
        "{shown} was changed by another program at the same time ({reason}): run it again",
    ),
    "40P01": (
        StorageFailed,
        "{shown} was locked by another program in another order ({reason}): run it again",
    ),
    "53100": (
        StorageFailed,
        "no space left for {shown}: free some (what was stored before is untouched), retry",
    ),
    "53300": (StorageFailed, "{shown} has no connection left ({reason}): wait, retry"),
    "25006": (
        StorageFailed,
        "{shown} cannot be written ({reason}): use the server that takes writes",
    ),
    "25P03": (
        StorageFailed,
        "{shown} ended a transaction that stood still ({reason}): nothing of it was kept, retry",
    ),
    "42501": (
        StorageFailed,
        "{shown} refused this user ({reason}): its owner must grant the right",
    ),
    "42P07": (
        Conflict,
        "{shown} has tables that are not this store's ({reason}): use an empty database, or a "
        "schema of its own",
    ),
    "22003": (InvalidInput, "a number is too large for the database: use a smaller one"),
    "22021": (InvalidInput, "PostgreSQL cannot keep this text ({reason}): use other text"),
    "22P05": (InvalidInput, "PostgreSQL cannot keep this text ({reason}): use other text"),
    "57014": (StorageFailed, "{shown} stopped a statement ({reason}): retry"),
    "3D000": (
        StorageFailed,
        "{shown} is not there ({reason}): make it with `createdb`, or correct the URL",
    ),
}


def translate(error: DBAPIError, shown: str, patience: float) -> LoriError:
    """By SQLSTATE; while connecting there is none, and libpq's words must do.

    Args:
        shown: what to call the database.
        patience: seconds that a lock is waited for.
    """
    code, reason = code_of(error), _reason(error)
    if code is None:
        return _unconnected(error, reason, shown)
    if code in _TOLD:
        kind, told = _TOLD[code]
        return kind(told.format(shown=shown, reason=reason, seconds=f"{patience:g}"))
    family = code[:2]
    if family == "23" or code == "P0001":  # P0001: a trigger's own refusal
        return Conflict(
            f"{shown} refused the change ({reason}): another process may have made it "
            "already; run the command again"
        )
    if family in ("08", "57"):
        return StorageFailed(f"{shown} ended the connection ({reason}): {_RETRY}")
    if family == "53":
        return StorageFailed(f"{shown} has run out of something ({reason}): free some, retry")
    if family == "XX":
        return DamagedObject(f"{shown} is damaged ({reason}): restore it from a copy")
    if family == "42":
        return IncompatibleStore(
            f"{shown} lacks what this lori expects ({reason}): it was altered by another "
            "program; restore it from a copy"
        )
    if family == "28":
        return StorageFailed(f"{shown} refused the login ({reason}): {_LOGIN}")
    return StorageFailed(f"{shown} failed: {reason}")


def _unconnected(error: DBAPIError, reason: str, shown: str) -> LoriError:
    if isinstance(error.orig, ValueError) or "NUL" in reason:
        return InvalidInput(f"PostgreSQL cannot keep this text ({reason}): use other text")
    if re.search(r"password|authentication|pg_hba|role .* does not exist", reason):
        return StorageFailed(f"{shown} refused the login ({reason}): {_LOGIN}")
    if re.search(r"database .* does not exist", reason):
        return StorageFailed(
            f"{shown} is not there ({reason}): make it with `createdb`, or correct the URL"
        )
    if "too many clients" in reason or "connection slots" in reason:
        return StorageFailed(f"{shown} has no connection left ({reason}): wait, retry")
    if error.connection_invalidated or "server closed the connection" in reason:
        return StorageFailed(f"{shown} ended the connection ({reason}): {_RETRY}")
    return StorageFailed(
        f"{shown} cannot be reached ({reason}): check the URL, the network and whether the "
        "server runs"
    )


def code_of(error: DBAPIError) -> str | None:
    """The SQLSTATE; None where no server said anything."""
    return getattr(error.orig, "sqlstate", None)


def _reason(error: DBAPIError) -> str:
    """The server's sentence alone: what it says below may quote rows."""
    told = getattr(getattr(error.orig, "diag", None), "message_primary", None)
    return one_line(told or str(error.orig))


def one_line(text: str) -> str:
    """The text without line ends, cut."""
    return " ".join(text.split())[:300]
