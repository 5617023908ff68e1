"""One registration route for every family of methods (scorers, merges, kinds)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from lori_manager.errors import NotFound

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A registered item with what tables and help texts say about it."""

    name: str
    item: T
    source: str
    facts: dict[str, object] = field(default_factory=dict)


class Registry(Generic[T]):
    """Name -> item, in order of registration.

    The CLI's choices, the documentation's tables and the contract tests read it,
    so that one new file is all that a new method needs.
    """

    def __init__(self, family: str) -> None:
        self.family = family
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, *, source: str = "", **facts: object) -> Callable[[T], T]:
        """Decorator that registers under `name`; a second use of a name is a bug."""

        def add(item: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.family} {name!r} is registered twice")
            self._entries[name] = Entry(name, item, source, dict(facts))
            return item

        return add

    def entry(self, name: str) -> Entry[T]:
        """The entry of that name.

        Raises:
            NotFound: no such name; the message lists what there is.
        """
        if name not in self._entries:
            known = ", ".join(self._entries) or "none"
            raise NotFound(f"no {self.family} is called {name!r}; there are: {known}")
        return self._entries[name]

    def get(self, name: str) -> T:
        """The item of that name; raises NotFound like `entry`."""
        return self.entry(name).item

    def names(self) -> list[str]:
        """All names, in order of registration."""
        return list(self._entries)

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries.values())
