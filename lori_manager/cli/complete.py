"""What the shell offers for a word that is not finished: names out of the workspace.

Nothing here may fail, print or load a model: without a workspace there is nothing to offer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from lori_manager.workspace import Workspace

MOST = 200  # names; a shell that offers more helps nobody


def _from_workspace(
    names: Callable[[Workspace], Iterable[str]],
) -> Callable[[typer.Context, str], list[str]]:
    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            from lori_manager.workspace import Workspace

            with Workspace.open(ctx.find_root().params.get("workspace") or Path()) as ws:
                begun, comma, last = incomplete.rpartition(",")
                found = (begun + comma + name for name in names(ws) if name.startswith(last))
                return [name for name, _ in zip(found, range(MOST), strict=False)]
        except Exception:  # noqa: BLE001 - a traceback would land in the user's prompt
            return []

    return complete


def _refs(ws: Workspace) -> Iterable[str]:
    yield "base"
    for line in ws.store.lines():
        if line.versions:
            yield line.name
            yield from (f"{line.name}@{alias}" for alias in line.aliases)
            yield from (f"{line.name}@{v}" for v in range(line.versions, 0, -1))


def _masks(ws: Workspace) -> Iterable[str]:
    return (mask.ref for task in ws.store.tasks() for mask in ws.store.masks(task.name))


def _anything(ws: Workspace) -> Iterable[str]:
    yield from _refs(ws)
    yield from _tasks(ws)
    yield from _masks(ws)


def _tasks(ws: Workspace) -> Iterable[str]:
    return (task.name for task in ws.store.tasks())


def _lines(ws: Workspace) -> Iterable[str]:
    return (line.name for line in ws.store.lines())


tasks = _from_workspace(_tasks)
lines = _from_workspace(_lines)
refs = _from_workspace(_refs)
masks = _from_workspace(_masks)
anything = _from_workspace(_anything)


def scorers(incomplete: str) -> list[str]:
    """Names in the registry of scorers."""
    try:
        from lori_manager.tasks.scorers import scorers
    except Exception:  # noqa: BLE001 - as above
        return []
    return [name for name in scorers.names() if name.startswith(incomplete)]


def refs_or_add(ctx: typer.Context, incomplete: str) -> list[str]:
    """For `lori score`, whose first word may also be its command `add`."""
    return [*among("add")(incomplete), *refs(ctx, incomplete)]


def among(*choices: str) -> Callable[[str], list[str]]:
    """Completion from a fixed list."""

    def complete(incomplete: str) -> list[str]:
        return [c for c in choices if c.startswith(incomplete)]

    return complete
