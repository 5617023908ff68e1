"""The registry of merge methods, and what every one of them is given."""

from __future__ import annotations

from collections.abc import Sequence
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
    """The registry with every method of this package in it."""
    from lori_manager.merging import concat, linear  # noqa: F401

    return merge_methods
