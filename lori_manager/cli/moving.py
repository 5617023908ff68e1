"""`lori push`, `lori pull`, `lori clone` and `lori bundle`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lori_manager.cli import complete, output
from lori_manager.cli.output import Json
from lori_manager.cli.progress import Teller
from lori_manager.cli.session import workspace
from lori_manager.errors import InvalidInput
from lori_manager.plain import counted

if TYPE_CHECKING:
    from lori_manager.store.moving import Moved

_Refs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[REF...]",
        help="Versions, with all that they need; everything without any.",
        autocompletion=complete.refs,
        show_default=False,
    ),
]
_As = Annotated[
    list[str] | None,
    typer.Option(
        "--as",
        metavar="[OLD=]NEW",
        help="What the versions of a line are to be called there; numbers stay. Repeatable.",
    ),
]
_Aliases = Annotated[
    bool, typer.Option("--aliases", help="Set aliases, too, where none is there yet.")
]


def push(
    ctx: typer.Context,
    target: Annotated[
        str, typer.Argument(metavar="DEST", help="Another workspace.", show_default=False)
    ],
    refs: _Refs = None,
    names: _As = None,
    aliases: _Aliases = False,
    json: Json = False,
) -> None:
    """Bring versions into another workspace of the same base.

    With parents, masks, tasks and their rows, scores with every outcome. What is there is left
    as it is; interrupted, the same command goes on.
    """
    with workspace(ctx) as ws:
        moved = ws.push(target, refs or (), names=_names(names, refs or ()), aliases=aliases)
    _tell(moved, json)


def pull(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="Another workspace, or a bundle.", show_default=False),
    ],
    refs: _Refs = None,
    names: _As = None,
    aliases: _Aliases = False,
    json: Json = False,
) -> None:
    """Bring versions out of another workspace, or out of a bundle, as `push` does.

    Whatever comes is checked before anything names it.
    """
    with workspace(ctx) as ws:
        moved = ws.pull(source, refs or (), names=_names(names, refs or ()), aliases=aliases)
    _tell(moved, json)


def clone(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="A workspace, or a bundle.", show_default=False),
    ],
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The new workspace.", show_default=False)
    ],
    base: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Where the base's weights lie on this machine."),
    ] = None,
    objects: Annotated[
        str | None, typer.Option(metavar="s3://BUCKET/PREFIX", help="Keep files there.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a workspace with all that is in another one, or in a bundle, aliases included.

    Interrupted, the same command goes on; later, it brings what is new.
    """
    from lori_manager.workspace import Workspace

    with Teller(quiet=ctx.obj.quiet) as teller:
        ws, moved = Workspace.clone(
            source, directory, base=base, objects=objects, on_message=teller.message
        )
        ws.close()
    _tell(moved, json)


def bundle(
    ctx: typer.Context,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="New.", show_default=False)
    ],
    refs: _Refs = None,
    json: Json = False,
) -> None:
    """Write versions with all that they need as one file, for machines without a network.

    A plain tar; `lori pull FILE` and `lori clone FILE DIR` read it. The same versions give the
    same bytes.
    """
    with workspace(ctx) as ws:
        written = ws.bundle(refs or (), out)
    if json:
        output.print_json(written)
        return
    what = counted(len(written.adapters), "version")
    typer.echo(f"{written.path}: {what}, {counted(written.files, 'file')}, "
               f"{output.size(written.bytes)}")  # fmt: skip


def _names(given: Sequence[str] | None, refs: Sequence[str]) -> dict[str, str]:
    """Line -> its name there.

    Raises:
        InvalidInput: a line twice, or a new name alone where it is not clear whose.
    """
    names: dict[str, str] = {}
    for text in given or ():
        old, equals, new = text.partition("=")
        if not equals:
            lines = {ref.partition("@")[0] for ref in refs}
            if len(lines) != 1:
                raise InvalidInput(
                    f"`--as {text}` needs versions of one line; say --as LINE={text}"
                )
            old, new = lines.pop(), text
        if old in names:
            raise InvalidInput(f"`--as` gives line {old!r} two names")
        names[old] = new
    return names


def _tell(moved: Moved, json: bool) -> None:
    if json:
        output.print_json(moved)
        return
    output.fields(
        {
            "versions": _listed(moved.adapters),
            "back again": _listed(moved.back),
            "tasks": _listed(moved.tasks),
            "masks": _listed(moved.masks),
            "renumbered": ", ".join(f"{old} is {new}" for old, new in moved.renumbered) or None,
            "aliases": _listed(moved.aliases),
            "aliases left": _listed(moved.left),
            "scores": moved.scores or None,
        }
    )
    new = counted(len(moved.adapters), "new version")
    typer.echo(f"{new}, {moved.known} known; {counted(moved.files, 'file')}, "
               f"{output.size(moved.bytes)}")  # fmt: skip


def _listed(names: Sequence[str], most: int = 12) -> str | None:
    """The names, as many as are read; None for none."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or None
