"""Copies of a PostgreSQL database, by pg_dump."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from lori_manager.errors import StorageFailed
from lori_manager.store.files import sync_folder
from lori_manager.store.postgres_failures import one_line


def dump(
    target: Path, url: str, schema: str, server: int, password: str | None
) -> tuple[Path | None, str]:
    """Write the tables of a schema to `target`, for `pg_restore --clean --dbname URL TARGET`.

    Args:
        url: without a password. server: its major version.
        password: given to pg_dump by its environment; None leaves it to libpq's own ways.
    Returns:
        The dump, or None and why there is none: no pg_dump, or one older than the server.
    Raises:
        StorageFailed: pg_dump failed.
    """
    program = shutil.which("pg_dump")
    if program is None:
        return None, "no pg_dump is installed here"
    own = one_line(_run([program, "--version"], os.environ).stdout)
    found = re.search(r"(\d+)(\.\d+)?", own)
    if found is None or int(found[1]) < server:
        return None, f"pg_dump here is {own or 'unknown'}, the server is {server}"
    unfinished = target.with_name(f".{target.name}.new")
    unfinished.unlink(missing_ok=True)
    unfinished.touch(0o600)
    environment = dict(os.environ) | ({} if password is None else {"PGPASSWORD": password})
    command = [
        program, "--format=custom", "--no-owner", "--no-password",
        f"--schema={_pattern(schema)}", f"--file={unfinished}", f"--dbname={url}",
    ]  # fmt: skip
    done = _run(command, environment)
    if done.returncode:
        unfinished.unlink(missing_ok=True)
        reason = one_line(done.stderr) or f"it ended with {done.returncode}"
        raise StorageFailed(f"pg_dump of {url} failed ({reason}): nothing was changed")
    with unfinished.open("rb") as f:
        os.fsync(f.fileno())
    unfinished.replace(target)
    sync_folder(target.parent)
    return target, ""


def _pattern(schema: str) -> str:
    """A schema's name as pg_dump wants it: quoted, for else it is a pattern."""
    return '"' + schema.replace('"', '""') + '"'


def _run(command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - pg_dump, without a shell
        command, env=environment, capture_output=True, text=True, check=False, errors="replace"
    )
