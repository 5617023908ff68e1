"""The registry of merge methods, and what every one of them is given."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lori_manager.engine.weights import AdapterWeights
from lori_manager.registry import Registry


class MergeMethod(Protocol):
    """Members and their weights -> one adapter. Members are not modified."""

    def __call__(
        self, members: Sequence[AdapterWeights], weights: Sequence[float]
    ) -> AdapterWeights:
        """Merge; raises InvalidInput where the members do not admit this method."""


merge_methods: Registry[MergeMethod] = Registry("merge method")


def load_all() -> Registry[MergeMethod]:
    """The registry with every method of this package in it: each file registers its own."""
    folder = Path(__file__).parent
    for module in pkgutil.iter_modules([str(folder)]):
        importlib.import_module(f"lori_manager.merging.{module.name}")
    return merge_methods
