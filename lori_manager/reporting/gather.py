"""From a store and its audit to a report's contents."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from lori_manager.metrics.multiple import holm
from lori_manager.refs import BASE, parse_adapter_ref
from lori_manager.reporting import contents
from lori_manager.reporting.changed_rows import Answers, changed_rows, paired_change, weight
from lori_manager.reporting.contents import (
    PARENT,
    Alias,
    Cell,
    Change,
    ChangedRows,
    Report,
    TaskHistory,
    Version,
)
from lori_manager.reporting.headline import headline
from lori_manager.reporting.intervals import score_interval
from lori_manager.reporting.mask_overlap import mask_overlap
from lori_manager.reporting.source import Audit, Comparison, Source, TaskAudit

SIGNIFICANCE = 0.05
ROWS = 20  # of each direction, task and pair
MOST_TEXT = 4_000_000  # characters of rows in all


def gather(
    source: Source,
    workspace: str,
    ref: str | None = None,
    tasks: Sequence[str] = (),
    rows: int = ROWS,
    answers: Answers | None = None,
) -> Report:
    """Everything that the report shows.

    Args:
        source: only read; no model is loaded.
        workspace: its name, for the title.
        ref: the adapter to report on, with its line's history; everything by default.
        tasks: only these; sequences are left out then.
        rows: changed rows to keep of each direction, task and pair.
        answers: tells what two versions answered to a row, where that is stored.
    Raises:
        NotFound: no such adapter or task. InvalidInput: `ref` is none.
        DamagedObject: outcomes, rows or masks are not what was written.
    """
    audits = [source.audit(ref, task) for task in (list[str | None](tasks) or [None])]
    found = [task for audit in audits for task in audit.tasks]
    histories = [_history(source, task) for task in found]
    versions = _versions(source, audits[0], ref)
    newest = _newest(source, versions, ref)
    scored = {c.version for task in histories for c in task.cells}
    focus = newest if newest in scored else None
    if focus is None and ref is None:
        focus = next((v.ref for v in reversed(versions) if v.ref in scored and v.line), None)
    aliases = _aliases(source)
    report = Report(
        workspace=workspace,
        base=_base_name(source),
        made_at=datetime.now(UTC),
        scope=ref,
        newest=newest,
        focus=focus,
        versions=tuple(versions),
        aliases=tuple(a for a in aliases if any(v.ref == a.version for v in versions)),
        tasks=tuple(histories),
        changed=tuple(_changed(source, found, histories, focus, aliases, rows, answers)),
        overlap=mask_overlap(source),
        sequences=tuple(
            contents.Sequence(s.line, s.stages, s.tasks, s.R, s.figures, s.note)
            for s in audits[0].sequences
            if not tasks
        ),
        notes=tuple(dict.fromkeys(note for audit in audits for note in audit.notes)),
        comparisons=tuple(source.comparisons(tasks)) if ref is None else (),
    )
    return dataclasses.replace(report, headline=headline(report))


def _base_name(source: Source) -> str:
    """A hub id, or the name of a folder: where it lies is nobody's business who reads this."""
    base = source.store.base()
    return base.source if base.revision is not None else Path(base.source).name


def _versions(source: Source, audit: Audit, ref: str | None) -> list[Version]:
    """The base and the adapters in scope, in time order."""
    names = defaultdict(list)
    for alias in source.store.aliases():
        names[f"{alias.line}@{alias.version}"].append(alias.name)
    base = Version(BASE, "", "base", "", None, None, None, None, None, (), (), False)
    scope = set(source.adapters) - source.experiments
    if ref is not None:
        # The audit's own scope: the line up to REF, with parents and members.
        last = [source.adapters[r] for r in audit.adapters]
        line = [
            a for a in source.adapters.values()
            if any(a.line == x.line and a.version <= x.version for x in last)
        ]  # fmt: skip
        scope = {a.ref for a in line} | {p.ref for a in line for p in a.parents}
    return [base] + [
        Version(
            a.ref,
            a.line,
            a.origin,
            a.method,
            a.rank,
            a.bytes,
            a.created_at,
            None if a.task is None else f"{a.task}#{a.task_revision}",
            a.mask,
            tuple((p.ref, p.weight) for p in a.parents),
            tuple(names[a.ref]),
            a.sequence,
        )
        for a in source.adapters.values()
        if a.ref in scope
    ]


def _newest(source: Source, versions: Sequence[Version], ref: str | None) -> str | None:
    if ref is not None:
        parsed = parse_adapter_ref(ref)
        return None if parsed is None else source.store.adapter(parsed).ref
    return versions[-1].ref if len(versions) > 1 else None


def _history(source: Source, task: TaskAudit) -> TaskHistory:
    """One task's cells; of a version scored several times, its newest measured score stands."""
    own = defaultdict(list)
    for entry in task.entries:
        own[entry.subject].append(entry)
    cells = []
    for subject, entries in own.items():
        entry = ([e for e in entries if not e.imported] or entries)[-1]
        low, high = score_interval(entry.value, entry.error, entry.rows)
        cells.append(
            Cell(
                subject,
                entry.value,
                low,
                high,
                entry.rows,
                entry.origin,
                entry.precision,
                _change(entry.parent),
                _change(entry.best),
                len(entries) - 1,
            )
        )
    return TaskHistory(
        task.ref,
        task.task,
        task.latest,
        task.scorer,
        task.scorer_version,
        task.higher_is_better is not False,
        source.eval_rows(task),
        task.best,
        tuple(cells),
        task.note,
    )


def _change(found: Comparison | None) -> Change | None:
    if found is None:
        return None
    return Change(
        found.against,
        found.change,
        found.low,
        found.high,
        found.p,
        found.rows,
        found.rows_only_before,
        found.rows_only_after,
        found.gained,
        found.lost,
        ("worse" if found.worse else "better") if found.real else "",
        found.note,
    )


def _aliases(source: Source) -> list[Alias]:
    moves = {(move.line, move.name): move for move in source.store.journal()}
    newest: dict[str, int] = defaultdict(int)
    for a in source.adapters.values():
        newest[a.line] = max(newest[a.line], a.version)
    found = []
    for alias in source.store.aliases():
        move = moves.get((alias.line, alias.name))
        before = move.from_version if move is not None else None
        found.append(
            Alias(
                alias.ref,
                f"{alias.line}@{alias.version}",
                alias.moved_at,
                None if before is None else f"{alias.line}@{before}",
                newest[alias.line] - alias.version,
            )
        )
    return found


def _changed(
    source: Source,
    audits: Sequence[TaskAudit],
    histories: Sequence[TaskHistory],
    focus: str | None,
    aliases: Sequence[Alias],
    rows: int,
    answers: Answers | None,
) -> list[ChangedRows]:
    """The rows that the version in focus changed, against what it was made from and against
    what its line's aliases mean (or meant, where one was moved to it).
    """
    if focus is None:
        return []
    others = {}
    for alias in aliases:
        name, _, line_alias = alias.ref.partition("@")
        if name == focus.rpartition("@")[0]:
            if alias.version != focus:
                others[line_alias] = alias.version
            elif alias.before is not None and alias.before != focus:
                others[f"{line_alias} before"] = alias.before
    found: list[ChangedRows] = []
    for task, history in zip(audits, histories, strict=True):
        cell = history.cell(focus)
        if cell is None:
            continue
        known = {} if cell.parent is None else {PARENT: cell.parent.against}
        for purpose, before in (known | others).items():
            pair = source.pair(task, before, focus)
            if pair is None:
                continue
            change = paired_change(pair, before)
            if purpose == PARENT and cell.parent is not None:
                change = cell.parent
            found.append(changed_rows(source, task, pair, change, focus, purpose, rows, answers))
    return _within_budget(_corrected(found))


def _corrected(found: Sequence[ChangedRows]) -> list[ChangedRows]:
    """Verdicts against an alias after Holm over the tasks; those against parents have it."""
    out = list(found)
    for purpose in {f.pair for f in found} - {PARENT}:
        family = [i for i, f in enumerate(found) if f.pair == purpose]
        for i, p in zip(family, holm([found[i].change.p for i in family]).tolist(), strict=True):
            if not p < SIGNIFICANCE:
                change = dataclasses.replace(found[i].change, verdict="")
                out[i] = dataclasses.replace(found[i], change=change)
    return out


def _within_budget(found: Sequence[ChangedRows]) -> list[ChangedRows]:
    """What is really worse first; rows without counting on, once their text is too much."""
    out, text = [], 0
    for one in sorted(found, key=weight):
        kept = []
        for row in one.rows:
            text += len(row.prompt) + len(row.expected) + 100
            text += len(row.answer_before or "") + len(row.answer_after or "")
            if text > MOST_TEXT:
                break
            kept.append(row)
        out.append(dataclasses.replace(one, rows=tuple(kept)))
    return out
