"""What two versions are made of, and in what that differs: read from the store alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lori_manager.context import Context
from lori_manager.records import Adapter, Parent, Task
from lori_manager.refs import BASE

# Told elsewhere: as members, as the method or as the rank.
_ELSEWHERE = frozenset({"weights", "method", "rank"})


@dataclass(frozen=True)
class Change:
    """One thing that differs.

    Attributes:
        kind: "adapter", "member", "data", "config" or "code".
        name: of what: `rank`, a member's line, a task, `steps`, a library.
        before, after: None where that side has none.
        of: the member that it is about, `nlu@1 -> nlu@2`; empty for the two versions themselves.
        note: more to know, such as how many rows came and went.
    """

    kind: str
    name: str
    before: Any
    after: Any
    of: str = ""
    note: str = ""


def changes_between(ws: Context, a: Adapter | None, b: Adapter | None) -> list[Change]:
    """All that differs between two versions, None being the base; members' own changes last."""
    found = [*_adapter(a, b), *_members(a, b), *_data(ws, a, b), *_config(a, b), *_code(a, b)]
    for old, new in _matched(a, b) if _both_merged(a, b) else ():
        if old is not None and new is not None and old.digest != new.digest:
            one, other = ws.adapter(old.ref), ws.adapter(new.ref)
            name = f"{one.ref} -> {other.ref}"
            found += [
                replace(c, of=c.of or name)
                for c in changes_between(ws, one, other)
                # That the weights differ is plain, and data are told of the whole.
                if c.kind != "data" and c.name != "digest"
            ]
    return found


def _both_merged(a: Adapter | None, b: Adapter | None) -> bool:
    return a is not None and b is not None and a.origin == b.origin == "merged"


def relation(ws: Context, a: Adapter | None, b: Adapter | None) -> str:
    """How one came from the other, in words; empty where neither did."""
    for young, old in ((b, a), (a, b)):
        if young is None or old is None:
            continue
        if any(parent.ref == old.ref for parent in young.parents):
            if young.origin == "merged":
                return f"{old.ref} is a member of {young.ref}"
            return f"{young.ref} was continued from {old.ref}"
        if old.ref in _ancestors(ws, young):
            return f"{young.ref} descends from {old.ref}"
    return ""


def _ancestors(ws: Context, adapter: Adapter) -> set[str]:
    found: set[str] = set()
    waiting = [parent.ref for parent in adapter.parents]
    while waiting:
        ref = waiting.pop()
        if ref not in found:
            found.add(ref)
            waiting += [parent.ref for parent in ws.adapter(ref).parents]
    return found


def _adapter(a: Adapter | None, b: Adapter | None) -> Iterator[Change]:
    """Of the two themselves."""

    def told(adapter: Adapter | None) -> dict[str, Any]:
        if adapter is None:
            return {"origin": BASE}
        return {
            "origin": adapter.origin,
            "method": adapter.method,
            "rank": adapter.rank,
            "bytes": adapter.bytes,
            "mask": adapter.mask,
            "A": adapter.projection,
            "digest": adapter.digest,
        }

    yield from _different("adapter", told(a), told(b))


def _members(a: Adapter | None, b: Adapter | None) -> Iterator[Change]:
    """Members of merges, and what a continued one began from."""
    for old, new in _matched(a, b):
        told = _member(old), _member(new)
        either = new or old
        if told[0] != told[1] and either is not None:
            yield Change("member", _line(either), *told)


def _member(parent: Parent | None) -> str | None:
    if parent is None:
        return None
    return parent.ref if parent.weight is None else f"{parent.weight:.4g} {parent.ref}"


def _line(parent: Parent) -> str:
    return parent.ref.rpartition("@")[0]


def _matched(a: Adapter | None, b: Adapter | None) -> list[tuple[Parent | None, Parent | None]]:
    """Every parent with the one in its place on the other side: the same, else the next of its
    line; None where there is none.
    """
    old, new = ([*side.parents] if side is not None else [] for side in (a, b))
    pairs: list[tuple[Parent | None, Parent | None]] = []
    for key in (lambda parent: parent.ref, _line):
        for one in list(old):
            found = next((other for other in new if key(other) == key(one)), None)
            if found is not None:
                pairs.append((one, found))
                old.remove(one)
                new.remove(found)
    return [*pairs, *((one, None) for one in old), *((None, other) for other in new)]


def _data(ws: Context, a: Adapter | None, b: Adapter | None) -> Iterator[Change]:
    """Task revisions that were trained on, by either or by what it came from."""
    old, new = _taught(ws, a), _taught(ws, b)
    for name in dict.fromkeys((*old, *new)):
        before, after = old.get(name, ()), new.get(name, ())
        if before != after:
            note = ""
            if before and after:
                pair = ws.store.task(name, before[-1]), ws.store.task(name, after[-1])
                note = "; ".join(_rows_changed(ws, *pair))
            yield Change("data", name, _revisions(name, before), _revisions(name, after), "", note)


def _revisions(name: str, revisions: tuple[int, ...]) -> str | None:
    return ", ".join(f"{name}#{revision}" for revision in revisions) or None


def _taught(ws: Context, adapter: Adapter | None) -> dict[str, tuple[int, ...]]:
    found: dict[str, set[int]] = {}
    if adapter is not None:
        for ref in (adapter.ref, *_ancestors(ws, adapter)):
            one = ws.adapter(ref)
            if one.task is not None and one.task_revision is not None:
                found.setdefault(one.task, set()).add(one.task_revision)
    return {name: tuple(sorted(found[name])) for name in sorted(found)}


def _rows_changed(ws: Context, a: Task, b: Task) -> Iterator[str]:
    """`train: 12 rows more, 3 fewer`, by the rows' hashes."""
    for split in dict.fromkeys((*a.splits, *b.splits)):
        old, new = (Counter(_keys(ws, task, split)) for task in (a, b))
        more, fewer = (new - old).total(), (old - new).total()
        if more or fewer:
            yield f"{split}: {more} rows came, {fewer} went"
    if (a.scorer, a.scorer_version) != (b.scorer, b.scorer_version):
        yield f"scored by {b.scorer} {b.scorer_version}, before by {a.scorer} {a.scorer_version}"


def _keys(ws: Context, task: Task, split: str) -> list[bytes]:
    from lori_manager.tasks.rows import rows_from_jsonl

    if split not in task.splits:
        return []
    return [row.key for row in rows_from_jsonl(ws.store.objects.get(task.splits[split].digest))]


def _config(a: Adapter | None, b: Adapter | None) -> Iterator[Change]:
    """Settings, of two that were made in the same way: those of a merge and of a training run
    have nothing in common.
    """
    if a is not None and b is not None and a.origin == b.origin:
        yield from _different("config", _flat(_settings(a)), _flat(_settings(b)))


def _settings(adapter: Adapter) -> dict[str, Any]:
    kept = {k: v for k, v in adapter.config.items() if k not in _ELSEWHERE}
    if "settings" in kept:  # all of the method's, the given ones among them
        kept.pop("options", None)
        kept |= kept.pop("settings")
    return kept


def _flat(values: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{within}{key}.")
        else:
            found[within + key] = value
    return found


def _code(a: Adapter | None, b: Adapter | None) -> Iterator[Change]:
    """Library versions."""
    if a is not None and b is not None:
        yield from _different("code", a.versions, b.versions)


def _different(kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for name in dict.fromkeys((*old, *new)):
        if old.get(name) != new.get(name):
            yield Change(kind, name, old.get(name), new.get(name))
