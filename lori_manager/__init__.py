"""lori: a continual multi-task adapter manager for language models.

The public names load lazily, so that `import lori_manager` costs nothing; inside
the package nothing imports from here.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Workspace": "lori_manager.workspace",
    "Config": "lori_manager.config",
    "LoriError": "lori_manager.errors",
    "LowRankUpdate": "lori_manager.engine.update",
    "RoutedModel": "lori_manager.routed",
    "load_routed": "lori_manager.routed",
    "calibrate_mask": "lori_manager.engine.mask",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
