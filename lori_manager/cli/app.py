"""The console entry point: every command, in the order in which they are met."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lori_manager.cli.session import PLAIN, FailingGroup, Session

# Where each is: one call needs the module of one.
COMMANDS: dict[str, str] = {
    "init": "workspace_commands:init",
    "base": "workspace_commands:base",
    "add-task": "tasks:add_task",
    "tasks": "tasks:tasks",
    "kinds": "kinds:kinds",
    "place": "placing:place",
    "suggest": "suggesting:suggest",
    "calibrate": "training:calibrate",
    "train": "training:train",
    "score": "scores:group",
    "merge": "merging:merge",
    "compare": "kind_comparison:compare",
    "bench": "benching:bench",
    "audit": "auditing:audit",
    "diff": "comparing:diff",
    "blame": "comparing:blame",
    "report": "report:report",
    "lines": "history:lines",
    "show": "history:show",
    "log": "history:log",
    "alias": "history:alias",
    "promote": "promoting:promote",
    "rollback": "promoting:rollback",
    "journal": "promoting:journal",
    "sample": "sampling:sample",
    "export": "transfer:export",
    "import": "transfer:import_",
    "push": "moving:push",
    "pull": "moving:pull",
    "clone": "moving:clone",
    "bundle": "moving:bundle",
    "rm": "caring:rm",
    "gc": "caring:gc",
    "verify": "store:verify",
    "doctor": "caring:doctor",
    "db": "store:group",
}


@functools.cache
def _built(name: str) -> Any:
    """One command out of COMMANDS, as Typer parses with it."""
    module, _, function = COMMANDS[name].partition(":")
    command = getattr(importlib.import_module(f"lori_manager.cli.{module}"), function)
    if isinstance(command, typer.Typer):
        made = typer.main.get_group(command)
    else:
        alone = typer.Typer(add_completion=False, **PLAIN)
        alone.command(name)(command)
        made = typer.main.get_command(alone)  # type: ignore[assignment]
    made.name = name
    return made


class LoriGroup(FailingGroup):
    """The top of all commands. Builds those that are asked for: most calls need one."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self.commands.update(dict.fromkeys(COMMANDS))  # type: ignore[arg-type]  # suggested on typos

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, None where there is none."""
        return _built(cmd_name) if cmd_name in COMMANDS else None


def _version(wanted: bool) -> None:
    if wanted:
        from lori_manager import __version__

        typer.echo(f"lori {__version__}")
        raise typer.Exit


def lori(
    ctx: typer.Context,
    workspace: Annotated[
        Path,
        typer.Option(
            "--workspace",
            "-C",
            metavar="DIR",
            help="Where to look for the workspace, and upwards from there.",
            show_default="the current folder",
        ),
    ] = Path(),
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose", "-v", count=True, help="Say more; twice, still more.", show_default=False
        ),
    ] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no messages.")] = False,
    _: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_version,
                     is_eager=True),
    ] = False,
) -> None:  # fmt: skip
    """Train LoRI adapters on one base model task after task, merge them, audit them.

    A REF is line@3, line@latest, line@alias, a bare line for its latest, or base.
    Exit codes: 2 unusable input, 3 audit failed, 4 not found, 5 bad data, 6 another
    base, 7 another database version, 8 damaged, 9 the disk refused, 10 in conflict,
    11 import refused, 12 gate refused, 13 doctor found trouble, 130 interrupted, 1 a bug
    or no memory.
    """
    ctx.obj = Session(workspace, verbose, quiet)
    ctx.obj.listen()


app = typer.Typer(
    cls=LoriGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    **PLAIN,
)
app.callback()(lori)


def main() -> None:
    """Run `lori`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name may not fit the terminal
    app(prog_name="lori")
