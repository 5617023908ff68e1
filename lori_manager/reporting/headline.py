"""The report in words: what is in use, what the newest change did, what to do next."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lori_manager.reporting.contents import (
    PARENT,
    Alias,
    Cell,
    ChangedRows,
    Headline,
    Report,
    Statement,
    TaskHistory,
    Version,
)

NAMED = 4  # tasks named in one sentence before the rest is counted
ROWS_THAT_HALVE = 4  # an interval shrinks with the root of the rows


def headline(report: Report) -> Headline:
    """A title that states the result, and statements in the order in which they are read."""
    if report.newest is None:
        title = "The base, before any adapter" if report.scope else "Nothing is trained yet"
        return Headline(title, tuple(_unscored_or_empty(report)))
    if report.focus is None:
        statements = [
            *_in_use(report),
            Statement(
                "next", f"Score {report.newest} on every task.", f"lori score {report.newest}"
            ),
        ]
        return Headline(f"{report.newest} was not scored on any task", tuple(statements))
    focus = report.version(report.focus)
    scored = [(task, cell) for task in report.tasks if (cell := task.cell(focus.ref)) is not None]
    worse = _sorted(scored, "worse")
    better = _sorted(scored, "better")
    compared = [(t, c) for t, c in scored if c.parent is not None and c.parent.rows]
    statements = [
        *_in_use(report),
        _what_it_is(focus, len(scored)),
        *_newest_unscored(report),
        *_against_aliases(report),
        *_moved("worse", worse, report),
        *_moved("better", better, report),
        *_open(compared),
        *_lost_before(report, focus, scored),
        *_next(report, focus, scored, worse, compared),
    ]
    return Headline(_title(report, focus, worse, better, compared), tuple(statements))


def _unscored_or_empty(report: Report) -> list[Statement]:
    if report.scope:
        return []
    if not report.tasks:
        return [Statement("next", "Add a first task.", "lori add-task NAME --train F --eval F")]
    name = report.tasks[0].name
    return [Statement("next", "Train a first adapter.", f"lori train {name}")]


def _title(
    report: Report,
    focus: Version,
    worse: Sequence[tuple[TaskHistory, Cell]],
    better: Sequence[tuple[TaskHistory, Cell]],
    compared: Sequence[tuple[TaskHistory, Cell]],
) -> str:
    """What matters most: the comparison with what is in use, else with what it was made from."""
    for purpose, own in _against(report).items():
        verdicts = [c.change.verdict for c in own]
        counts = verdicts.count("worse"), verdicts.count("better"), len(own)
        return _verdict(focus.ref, f"{_meant(purpose)} ({own[0].before})", *counts)
    if not compared:
        return f"{focus.ref} is scored, and there is nothing to compare it with"
    others = {cell.parent.against for _, cell in compared if cell.parent is not None}
    made_from = others.pop() if len(others) == 1 else "what it was made from"
    return _verdict(focus.ref, made_from, len(worse), len(better), len(compared))


def _verdict(ref: str, other: str, worse: int, better: int, tasks: int) -> str:
    of = _count(tasks, "task")
    if worse:
        also = f", better on {better}" if better else ""
        return f"{ref} is really worse than {other} on {worse} of {of}{also}"
    if better:
        return f"{ref} is really better than {other} on {better} of {of}, worse on none"
    return f"No real difference between {ref} and {other} is shown on {of}"


def _against(report: Report) -> dict[str, list[ChangedRows]]:
    """The comparisons with what aliases mean or meant, by their purpose."""
    found: dict[str, list[ChangedRows]] = {}
    for one in report.changed:
        if one.pair != PARENT:
            found.setdefault(one.pair, []).append(one)
    return found


def _meant(purpose: str) -> str:
    """The alias's name, or that it is about what the alias meant before."""
    name, _, earlier = purpose.partition(" ")
    return f"what {name} meant before" if earlier else name


def _in_use(report: Report) -> list[Statement]:
    if not report.aliases:
        text = "No alias says which version is in use, so nothing is compared with that."
        return [Statement("in use", text)]
    return [Statement("in use", _alias_text(alias)) for alias in report.aliases[:NAMED]] + (
        [Statement("in use", f"And {len(report.aliases) - NAMED} more aliases.")]
        if len(report.aliases) > NAMED
        else []
    )


def _alias_text(alias: Alias) -> str:
    since = alias.moved_at.strftime("%Y-%m-%d")
    before = f", before that {alias.before}" if alias.before else ""
    ahead = f"; its line is {_count(alias.behind, 'version')} further" if alias.behind else ""
    return f"{alias.ref} means {alias.version} since {since}{before}{ahead}."


def _what_it_is(focus: Version, scored: int) -> Statement:
    if focus.origin == "merged":
        made = f"merges {_and(ref for ref, _ in focus.parents)} by {focus.method}"
    elif focus.origin == "imported":
        made = "was imported"
    else:
        start = focus.parents[0][0] if focus.parents else "the base"
        on = f" on {focus.task}" if focus.task else ""
        made = f"was trained{on} from {start}"
    return Statement("change", f"{focus.ref} {made}; scored on {_count(scored, 'task')}.")


def _newest_unscored(report: Report) -> list[Statement]:
    if report.newest == report.focus:
        return []
    text = f"{report.newest} is newer, and nothing is known of it: it was not scored."
    return [Statement("open", text, f"lori score {report.newest}")]


def _moved(kind: str, found: Sequence[tuple[TaskHistory, Cell]], report: Report) -> list[Statement]:
    if not found:
        return []
    named = [f"{_task(task, report)} {_from_to(cell)}" for task, cell in found[:NAMED]]
    listed = _listed(named, len(found))
    return [Statement(kind, f"Really {kind} than what it was made from: {listed}.")]


def _from_to(cell: Cell) -> str:
    change = cell.parent
    if change is None:
        return number(cell.value)
    rows = ""
    if change.lost is not None and change.gained is not None:
        rows = f"; {_count(change.lost, 'row')} lost, {change.gained} gained"
    return (
        f"{number(cell.value - change.change)} to {number(cell.value)} "
        f"({signed(change.change)}, 95% {signed(change.low)} to {signed(change.high)}{rows})"
    )


def _open(compared: Sequence[tuple[TaskHistory, Cell]]) -> list[Statement]:
    """What is neither shown to be worse nor to be better, and how far it could have fallen."""
    unclear = [(t, c, c.parent) for t, c in compared if c.parent and not c.parent.verdict]
    if not unclear:
        return []
    room = sorted(
        ((c.possible_drop(t.higher_is_better), t) for t, _, c in unclear), key=lambda x: -x[0]
    )
    if len(unclear) == 1:
        drop, task = room[0]
        text = (
            f"On {task.name} nothing is shown: the test set allows a drop of up to {number(drop)}."
        )
    else:
        named = [f"{task.name} up to {number(drop)}" for drop, task in room[:NAMED]]
        text = (
            f"On {len(unclear)} tasks nothing is shown either way. Drops that the test sets "
            f"do not exclude: {_listed(named, len(room))}."
        )
    return [Statement("open", text)]


def _against_aliases(report: Report) -> list[Statement]:
    out = []
    for purpose, own in _against(report).items():
        own = sorted(own, key=lambda c: -abs(c.change.change) if c.change.rows else 0.0)
        worse = [c for c in own if c.change.verdict == "worse"]
        better = [c for c in own if c.change.verdict == "better"]
        told = []
        for kind, found in (("worse", worse), ("better", better)):
            if found:
                each = [f"{c.task.partition('#')[0]} {signed(c.change.change)}" for c in found]
                told.append(f"really {kind} on {_listed(each[:NAMED], len(found))}")
        higher = {task.ref: task.higher_is_better for task in report.tasks}
        room = max(
            (c.change.possible_drop(higher[c.task]) for c in own if c.change.rows), default=0.0
        )
        nothing = f"no real difference shown; the test sets allow drops of up to {number(room)}"
        said = "; ".join(told) or nothing
        kind = "worse" if worse else "better" if better else "open"
        what = f"{_meant(purpose)} ({own[0].before})"
        out.append(Statement(kind, f"Against {what}, {_count(len(own), 'task')}: {said}."))
    return out


def _lost_before(
    report: Report, focus: Version, scored: Sequence[tuple[TaskHistory, Cell]]
) -> list[Statement]:
    """Tasks below their best by more than noise that the newest change is not guilty of."""
    found = []
    for task, cell in scored:
        below = cell.best
        if below is None or below.verdict != "worse":
            continue
        if cell.parent is not None and cell.parent.verdict == "worse":
            continue
        since = _since(report, focus, task)
        found.append(
            f"{_task(task, report)} {signed(below.change)} against {below.against}, since {since}"
        )
    if not found:
        return []
    text = (
        f"Not this change's doing, but really below the best: {_listed(found[:NAMED], len(found))}."
    )
    return [Statement("lost before", text)]


def _since(report: Report, focus: Version, task: TaskHistory) -> str:
    """The first version of the focus's line from which on all were really below the best."""
    since = focus.ref
    own = {v.ref for v in report.versions if v.line == focus.line}
    for cell in reversed([c for c in task.cells if c.version in own]):
        if cell.best is None or cell.best.verdict != "worse":
            break
        since = cell.version
    return since


def _next(
    report: Report,
    focus: Version,
    scored: Sequence[tuple[TaskHistory, Cell]],
    worse: Sequence[tuple[TaskHistory, Cell]],
    compared: Sequence[tuple[TaskHistory, Cell]],
) -> list[Statement]:
    out = []
    known = {task.name for task, _ in scored}
    missing = [t.name for t in report.tasks if t.latest and t.name not in known]
    missing = list(dict.fromkeys(missing))
    if missing:
        few = ",".join(missing[:NAMED])
        out.append(
            Statement(
                "next",
                f"{focus.ref} has no score on {_listed(missing[:NAMED], len(missing))}.",
                f"lori score {focus.ref} --tasks {few}",
            )
        )
    own = [a for a in report.aliases if a.version.rpartition("@")[0] == focus.line]
    live = [a for a in own if a.version == focus.ref]
    used = [c for own_pairs in _against(report).values() for c in own_pairs]
    lost = [c.task.partition("#")[0] for c in used if c.change.verdict == "worse"]
    lost = list(dict.fromkeys(lost if used else [task.name for task, _ in worse]))
    if lost:
        out += _after_a_loss(focus, lost, live)
    elif compared or used:
        out += _after_no_loss(focus, own, live)
    if worse and used and not lost:
        names = [task.name for task, _ in worse]
        out.append(
            Statement(
                "next",
                f"There is more to have: what it was made from is better on "
                f"{_listed(names[:NAMED], len(names))}. Read the rows that were lost, below.",
            )
        )
    rooms = [
        (c.parent.possible_drop(t.higher_is_better), t)
        for t, c in compared
        if c.parent is not None and not c.parent.verdict and t.eval_rows
    ]
    if rooms:
        drop, task = max(rooms, key=lambda room: room[0])
        out.append(
            Statement(
                "next",
                f"To halve what {task.name} leaves open ({number(drop)}), its test set would need "
                f"about {task.eval_rows * ROWS_THAT_HALVE:,} rows instead of {task.eval_rows:,}.",
            )
        )
    return out


def _after_a_loss(focus: Version, lost: Sequence[str], live: Sequence[Alias]) -> list[Statement]:
    out = []
    for alias in live[:1]:
        back = alias.before
        if back is not None:
            out.append(
                Statement(
                    "next",
                    f"{alias.ref} means this version: weigh going back to {back}.",
                    f"lori rollback {alias.ref}",
                )
            )
    out.append(
        Statement(
            "next",
            f"Read the rows that were lost on {_listed(lost[:NAMED], len(lost))}, below"
            + ("." if live else f", before {focus.ref} is given an alias."),
        )
    )
    if focus.sequence:
        out.append(
            Statement(
                "next",
                "Each stage writes over those before it. Adapters trained alone and then merged "
                "keep more, and so do --projection nullspace and --replay while training.",
                "lori train --help",
            )
        )
    return out


def _after_no_loss(focus: Version, own: Sequence[Alias], live: Sequence[Alias]) -> list[Statement]:
    if live:
        return []
    if own:
        alias = own[0]
        text = (
            f"As far as the test sets can tell, nothing speaks against moving {alias.ref} from "
            f"{alias.version} to {focus.ref}."
        )
        name = alias.ref.partition("@")[2]
        return [Statement("next", text, f"lori promote {focus.ref} {name}")]
    text = "Give an alias to what is in use, so that the next version is compared with it."
    return [Statement("next", text, f"lori promote {focus.ref}")]


def _sorted(
    scored: Iterable[tuple[TaskHistory, Cell]], verdict: str
) -> list[tuple[TaskHistory, Cell]]:
    """Those with that verdict against their parent, the largest change first."""
    found = [(t, c) for t, c in scored if c.parent is not None and c.parent.verdict == verdict]
    return sorted(found, key=lambda x: -abs(x[1].parent.change if x[1].parent else 0.0))


def _task(task: TaskHistory, report: Report) -> str:
    """The task's name; with its revision where another of its histories is shown too."""
    several = sum(t.name == task.name for t in report.tasks) > 1
    return task.ref if several else task.name


def _listed(named: Sequence[str], total: int) -> str:
    rest = total - len(named)
    return ", ".join(named) + (f", and {rest} more" if rest > 0 else "")


def _and(names: Iterable[str]) -> str:
    all_of_them = list(names)
    if len(all_of_them) > NAMED:
        return _listed(all_of_them[:NAMED], len(all_of_them))
    return " and ".join(filter(None, [", ".join(all_of_them[:-1]), *all_of_them[-1:]]))


def _count(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def number(value: float) -> str:
    """`0.853`; a dash for what was not measured."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def signed(value: float) -> str:
    """`+0.012` or `−0.012`, with a minus sign of its own width."""
    return "–" if math.isnan(value) else f"{value:+.3f}".replace("-", "−")
