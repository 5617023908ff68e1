"""What every command shares: the workspace it works in, and how its failures are told."""

from __future__ import annotations

import errno
import gc
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from typer.core import TyperGroup

from lori_manager.cli.output import one_line
from lori_manager.cli.progress import Teller
from lori_manager.errors import InvalidInput, LoriError, NotFound, StorageFailed
from lori_manager.ranks import joined, launched, ranks

if TYPE_CHECKING:
    from lori_manager.context import Context
    from lori_manager.workspace import Workspace

C = TypeVar("C", bound="Context")
# Rich's help would take a third of the time that `--help` may take.
PLAIN: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False}
INTERRUPTED = 130
_USAGE: type[Exception] = typer.BadParameter.__mro__[2]  # any usage error
_CHATTER = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass(frozen=True)
class Session:
    """The options that stand before a command's name."""

    folder: Path
    verbose: int = 0
    quiet: bool = False

    def listen(self) -> None:
        """Send what modules log to stderr, and keep libraries from drawing on it."""
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("lori: %(message)s"))
        logger = logging.getLogger("lori_manager")
        logger.handlers = [handler]
        logger.setLevel([logging.WARNING, logging.INFO, logging.DEBUG][min(self.verbose, 2)])
        if not self.verbose:
            for name, value in _CHATTER.items():
                os.environ.setdefault(name, value)
        # Read when torch is imported: threads that spin for long while they wait are ruinous
        # where another process wants the same cores, and none at all costs some speed.
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")


@contextmanager
def uncollected() -> Iterator[None]:
    """No looking for cycles inside, where much is made and little thrown away."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def workspace(ctx: typer.Context, *, by_ranks: bool = False) -> Iterator[Workspace]:
    """The workspace that the command is for, telling its progress on stderr.

    Args:
        by_ranks: the command can be done by several processes, of which rank 0 alone tells.
    Raises:
        InvalidInput: torchrun has started several of a command that cannot.
    """
    session: Session = ctx.obj
    if launched() > 1 and not by_ranks:
        raise InvalidInput(
            f"{launched()} processes were started for this command, and only `lori train` and "
            "`lori calibrate` can be done by several: start it without torchrun"
        )
    with uncollected():
        from lori_manager.workspace import Workspace
    with joined() as group:
        quiet = session.quiet or not group.first
        with _opened(Workspace, session, quiet=quiet) as opened:
            yield opened


@contextmanager
def records(ctx: typer.Context) -> Iterator[Context]:
    """The same for a command that looks records up: what makes new ones is not loaded."""
    with uncollected():
        from lori_manager.context import Context
    with _opened(Context, ctx.obj, quiet=ctx.obj.quiet) as opened:
        yield opened


@contextmanager
def _opened(kind: type[C], session: Session, *, quiet: bool) -> Iterator[C]:
    with uncollected():
        found = kind.open(session.folder)
    gc.freeze()  # what is loaded stays: no later look for cycles has to go over it
    with Teller(quiet=quiet) as teller, found as opened:
        opened.on_message = teller.message
        opened.on_progress = teller.progress
        yield opened


def store_folder(ctx: typer.Context) -> Path:
    """The `.lori` that the command is for, whatever state its database is in.

    Raises:
        NotFound: none up to the root of the file system.
    """
    from lori_manager.context import FOLDER

    session: Session = ctx.obj
    start = session.folder.absolute()
    root = next((f for f in (start, *start.parents) if (f / FOLDER).is_dir()), None)
    if root is None:
        raise NotFound(f"no workspace in {start} or above it: run `lori init --base MODEL` first")
    return root / FOLDER


class FailingGroup(TyperGroup):
    """A group whose commands end in one line and an exit code, whatever happens in them."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, _USAGE):
            raise
        except KeyboardInterrupt:
            message = "interrupted; what was stored stays, and the same command goes on from there"
            raise _end(message, INTERRUPTED, ctx) from None
        except LoriError as e:
            raise _end(str(e), e.exit_code, ctx) from e
        except OSError as e:
            if e.errno == errno.EPIPE:  # whoever read our output has enough: Typer ends quietly
                raise
            if e.errno is None:
                raise _bug(e, ctx) from e
            place = f"{e.filename}: " if e.filename else ""
            message = f"{place}{e.strerror}; check the path, its permissions and the disk, retry"
            raise _end(message, StorageFailed.exit_code, ctx) from e
        except Exception as e:  # nothing above this could tell it
            raise _bug(e, ctx) from e


def _bug(error: Exception, ctx: Any) -> typer.Exit:
    kind = type(error).__name__
    who = "" if ranks().first else f"rank {ranks().rank}: "
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError):
        return _end(f"{who}out of memory: use a smaller --batch or --score-batch", 1, ctx)
    message = (
        f"{who}{kind}: {error}; this is a bug, please report it with the output of LORI_DEBUG=1"
    )
    return _end(message, 1, ctx)


def _end(message: str, code: int, ctx: Any) -> typer.Exit:
    if not ranks().may_tell():
        return typer.Exit(code)
    typer.echo(f"lori: {one_line(message)}", err=True)
    verbose = isinstance(ctx.obj, Session) and ctx.obj.verbose
    if verbose or os.environ.get("LORI_DEBUG") == "1":
        typer.echo(traceback.format_exc(), err=True)
    return typer.Exit(code)
