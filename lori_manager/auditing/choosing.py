"""Which versions of a long history are told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import datetime

from lori_manager.auditing.lineage import Lineage
from lori_manager.records import Adapter, Line
from lori_manager.refs import BASE

MOST = 24  # entries that a table may have before only those that matter are shown
RECENT = 5  # of the newest, and of the newest with an alias
REGRESSIONS = 8  # of the largest real ones
WHAT_MATTERS = (
    f"base, own, best, aliases, the audited one, the last {RECENT} and the {REGRESSIONS} largest "
    "real regressions"
)


@dataclass(frozen=True)
class Filters:
    """Which subjects an audit tells; the base always is. Comparisons do not change with them.

    `since` and `until` are of the adapter's making, both ends within.
    """

    since: datetime | None = None
    until: datetime | None = None
    alias: str | None = None
    among: Set[str] | None = None

    def keep(self, subject: str, lineage: Lineage) -> bool:
        """Whether `subject` is told."""
        if subject == BASE:
            return True
        if self.among is not None and subject not in self.among:
            return False
        made = lineage.adapters[subject].created_at
        if (self.since is not None and made < self.since) or (
            self.until is not None and made > self.until
        ):
            return False
        return self.alias is None or self.alias in lineage.aliases(subject)


def experiments(adapters: Iterable[Adapter], lines: Iterable[Line]) -> frozenset[str]:
    """The adapters that a look at everything leaves out: those of comparisons of kinds.

    One that an alias points at, or that another was continued or merged from, has become
    part of the history and is none.
    """
    adapters = list(adapters)
    needed = {f"{line.name}@{version}" for line in lines for version in line.aliases.values()}
    left_out = set()
    for adapter in reversed(adapters):  # children come after their parents
        if adapter.compared is None or adapter.ref in needed:
            needed.update(parent.ref for parent in adapter.parents)
        else:
            left_out.add(adapter.ref)
    return frozenset(left_out)


def without(left_out: Set[str], lines: Iterable[Line], adapters: Iterable[Adapter]) -> list[Line]:
    """The lines as they would be without those adapters; one that has no other is gone."""
    newest: dict[str, Adapter] = {}
    touched = {ref.partition("@")[0] for ref in left_out}
    for adapter in adapters:
        if adapter.ref not in left_out:
            newest[adapter.line] = adapter
    kept = [line for line in lines if line.name not in touched or line.name in newest]
    return [
        replace(line, latest=newest[line.name]) if line.name in touched else line for line in kept
    ]


def what_matters(
    subjects: Sequence[str],
    always: Iterable[str | None],
    dropped: Mapping[str, float],
    lineage: Lineage,
) -> set[str]:
    """Of a long history, the subjects to tell.

    Args:
        subjects: in time order.
        always: base, own, best and the like; None is none.
        dropped: the real regressions, each with its size.
    """
    named = [s for s in subjects if lineage.aliases(s)]
    largest = sorted(dropped, key=lambda s: -dropped[s])
    return {
        *filter(None, always),
        *named[-RECENT:],
        *subjects[-RECENT:],
        *largest[:REGRESSIONS],
    }
