"""Which score a score is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lori_manager.auditing.groups import Group, Ranking, alike
from lori_manager.auditing.lineage import CHAMPION, Lineage
from lori_manager.auditing.reading import AuditStore
from lori_manager.errors import NotFound
from lori_manager.records import Score
from lori_manager.refs import BASE, AdapterRef, check_name, parse_adapter_ref

PRODUCTION = "production"


@dataclass(frozen=True)
class Against:
    """What every version is held against besides its parent and the best.

    Either one subject for all, or for each line its own version under an alias.
    """

    fixed: str | None
    by_line: Mapping[str, str]  # line -> ref

    @classmethod
    def of(cls, asked: str | None, store: AuditStore, lineage: Lineage) -> Against:
        """What `--against` means.

        Args:
            asked: `base` or a reference with an `@`: one for all. Another word: an alias, on
                each line that has it. None: each line's `production`, else its `champion`.
        Raises:
            NotFound: no line has that alias, or there is no such adapter.
            InvalidInput: neither an alias nor a reference.
        """
        if asked is not None and (asked == BASE or "@" in asked):
            ref = parse_adapter_ref(asked)
            return cls(BASE if ref is None else store.adapter(ref).ref, {})
        names = [PRODUCTION, CHAMPION] if asked is None else [check_name(asked, "alias")]
        found = {}
        for line in lineage.lines.values():
            version = next((line.aliases[n] for n in names if n in line.aliases), None)
            if version is not None:
                found[line.name] = store.adapter(AdapterRef(line.name, str(version))).ref
        if asked is not None and not found:
            known = sorted({name for line in lineage.lines.values() for name in line.aliases})
            there = f"there are {', '.join(known)}" if known else "there are no aliases yet"
            raise NotFound(f"no line has the alias {asked!r}: {there}")
        return cls(None, found)

    @property
    def refs(self) -> tuple[str, ...]:
        """All that something is held against."""
        return (self.fixed,) if self.fixed is not None else tuple(self.by_line.values())

    def target(self, subject: str) -> str | None:
        """What `subject` is held against; None for what is held against nothing."""
        if self.fixed is not None:
            return self.fixed if subject not in (self.fixed, BASE) else None
        line, _, _ = subject.partition("@")
        found = self.by_line.get(line)
        return found if found != subject else None


def parent_of(
    score: Score, group: Group, candidates: Sequence[str], ranking: Ranking
) -> Score | None:
    """The score of the parent, or of the best of several candidates; None where none has one.

    Args:
        candidates: what `Lineage.compared_with` gives for the score's subject.
    """
    chosen: Score | None = None
    for subject in candidates:
        for s in alike(score, group.scores.get(subject, []))[-1:]:
            chosen = s if ranking.better(s, chosen) else chosen or s
    return chosen


def told_once(parent: Score | None, previous: Score | None) -> bool:
    """Whether the version before is the parent too, and need not be compared twice."""
    return parent is not None and previous is not None and parent.subject == previous.subject
