"""All adapters in order of creation, and who descends from whom."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from lori_manager.records import Adapter, Line
from lori_manager.refs import BASE

CHAMPION = "champion"


class Lineage:
    """Every adapter and line of a workspace, as an audit looks at them."""

    def __init__(self, adapters: Iterable[Adapter], lines: Iterable[Line]) -> None:
        self.adapters = {a.ref: a for a in adapters}
        self.lines = {line.name: line for line in lines}
        self._order = {ref: i for i, ref in enumerate((BASE, *self.adapters))}
        self._versions: dict[str, list[Adapter]] = defaultdict(list)
        self._trained: dict[str, Mapping[str | None, None]] = {}
        for a in self.adapters.values():
            self._versions[a.line].append(a)
            self._trained[a.ref] = self._trained_of(a)
        self._histories: dict[str, frozenset[str]] = {}
        self._aliases: dict[str, list[str]] = defaultdict(list)
        self._own_lines: dict[str, Line] = {}
        for line in self.lines.values():
            for name, version in sorted(line.aliases.items()):
                self._aliases[f"{line.name}@{version}"].append(name)
            if line.task is not None and not line.sequence:
                self._own_lines[line.task] = line

    def everything(self) -> frozenset[str]:
        """Every subject."""
        return frozenset(self._order)

    def in_time(self, subjects: Iterable[str]) -> list[str]:
        """The subjects by creation, the base first."""
        return sorted(subjects, key=self._order.__getitem__)

    def line(self, last: Adapter) -> list[Adapter]:
        """The adapters of `last`'s line up to it."""
        return [a for a in self._versions[last.line] if a.version <= last.version]

    def aliases(self, subject: str) -> tuple[str, ...]:
        """The aliases that point at it, without their line."""
        return tuple(self._aliases.get(subject, ()))

    def history(self, last: Adapter) -> frozenset[str]:
        """`last`'s line up to it, the parents and members of all these, and the base."""
        if last.ref not in self._histories:
            line = self.line(last)
            refs = {BASE, *(a.ref for a in line), *(p.ref for a in line for p in a.parents)}
            self._histories[last.ref] = frozenset(refs & self._order.keys())
        return self._histories[last.ref]

    def is_merge(self, subject: str) -> bool:
        """Whether what it is compared with depends on the task."""
        return subject != BASE and self.adapters[subject].origin == "merged"

    def compared_with(self, subject: str, task: str) -> list[str]:
        """What `subject` is measured against on `task`: one ref, or several equal members."""
        if subject == BASE:
            return []
        adapter = self.adapters[subject]
        parents = [p.ref for p in adapter.parents]
        if adapter.origin != "merged":
            return parents[:1] or [BASE]
        members = [self.adapters[p] for p in parents if p in self.adapters]
        direct = [m for m in members if m.task == task]
        indirect = [m for m in members if task in self._trained[m.ref]]
        return [m.ref for m in direct or indirect] or [BASE]

    def previous(self, subject: str) -> str | None:
        """The version before it on its line."""
        line, _, version = subject.partition("@")
        before = f"{line}@{int(version) - 1}" if version else ""
        return before if before in self.adapters else None

    def own(self, task: str) -> Adapter | None:
        """What stands for a task's own line: its champion, else its latest that only ever
        trained on that task; None without such a line or adapter.
        """
        line = self._own_lines.get(task)
        if line is None:
            return None
        champion = line.aliases.get(CHAMPION)
        for a in reversed(self._versions[line.name]):
            if champion is not None:
                if a.version == champion:
                    return a
            elif self._trained[a.ref].keys() == {task}:
                return a
        return None

    def tasks_in(self, adapter: Adapter) -> list[str]:
        """Names of the tasks that it, or anything that it descends from, was trained on.

        In the order in which its members or stages brought them in.
        """
        return [task for task in self._trained[adapter.ref] if task is not None]

    def _trained_of(self, adapter: Adapter) -> Mapping[str | None, None]:
        """What it and all its ancestors were trained on, in order; None for a merge or import.

        Parents were created before, so what they say is known.
        """
        found: Mapping[str | None, None] = {}
        for parent in adapter.parents:
            known = self._trained.get(parent.ref, {})
            # In a long line the parent has it all: share it.
            found = known if known.keys() >= found.keys() else {**found, **known}
        return found if adapter.task in found else {**found, adapter.task: None}
