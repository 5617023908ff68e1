"""Libraries that an extra installs: loaded where they are used, asked for by one error."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from lori_manager.errors import InvalidInput


def load_extra(module: str, extra: str, what: str) -> ModuleType:
    """Import a module that one of the package's extras brings.

    Args:
        module: its full name.
        extra: of pyproject.toml.
        what: needs it, for the message.
    Raises:
        InvalidInput: the library is not installed; names the command.
    """
    check_extra(module, extra, what)
    return import_module(module)


def check_extra(module: str, extra: str, what: str) -> None:
    """Refuse what `load_extra` would refuse, without importing anything."""
    library = module.partition(".")[0]
    if find_spec(library) is None:
        raise InvalidInput(
            f"{what} needs the library {library}: install it with "
            f'`pip install "lori-manager[{extra}]"`'
        )
