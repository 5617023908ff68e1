"""What a file that is to hold a drawing must be."""

from __future__ import annotations

from pathlib import Path

from lori_manager.errors import InvalidInput


def check_plot(path: Path) -> None:
    """Refuse a file that cannot be drawn, before anything is computed.

    Raises:
        InvalidInput: another ending than .svg, or a folder that is not there.
    """
    if path.suffix.lower() != ".svg":
        raise InvalidInput(f"plots are SVG: expected a name that ends in .svg, got {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise InvalidInput(f"cannot write {path}: there is no folder {path.absolute().parent}")
