"""The page: one HTML file that holds its data, style and script, and asks for nothing else.

Headline, summary, aliases and sequences are plain HTML; the rest is drawn by the script out
of the JSON in the page, when it is looked at. A content security policy by hashes lets this
script and this style act and nothing else, and no request leaves the page.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from lori_manager.metrics.continual import Figure
from lori_manager.reporting.compact import compact
from lori_manager.reporting.contents import (
    PARENT,
    Cell,
    ChangedRows,
    Report,
    Statement,
    TaskHistory,
)
from lori_manager.reporting.contents import Sequence as TaughtSequence
from lori_manager.reporting.harmless import as_script, visible
from lori_manager.reporting.headline import number, signed
from lori_manager.reporting.kinds_section import kinds_section
from lori_manager.store.files import write_atomic

STYLE = "report.css"
# In this order they are one script.
SCRIPTS = (
    "values.js",
    "elements.js",
    "summary.js",
    "matrix.js",
    "overview.js",
    "chart.js",
    "histories.js",
    "merges.js",
    "changed_rows.js",
    "versions.js",
    "masks.js",
    "start.js",
)
KINDS = {
    "in use": "In use",
    "change": "Newest",
    "worse": "Worse",
    "better": "Better",
    "open": "Not told",
    "lost before": "Lost before",
    "next": "Next",
}
MARKS = {"worse": "▼", "better": "▲", "open": "?", "lost before": "▽", "next": "→"}


def write_page(report: Report, path: Path) -> int:
    """Write the page, whole or not at all; returns its bytes.

    Raises:
        StorageFailed: the disk refused, or there is no such folder.
    """
    content = page(report).encode()
    write_atomic(path.absolute(), content)
    return len(content)


def page(report: Report) -> str:
    """The page as text."""
    style = _asset(STYLE)
    script = "(() => {\n'use strict';\n" + "\n".join(map(_asset, SCRIPTS)) + "\n})();"
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    made = report.made_at
    scope = f" · {text(report.scope)}" if report.scope else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{text(report.headline.title)} · {text(report.workspace)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header>
<p class="where"><strong>{text(report.workspace)}</strong>{scope} ·
<time datetime="{made.isoformat(timespec="seconds")}">{made:%Y-%m-%d %H:%M} UTC</time></p>
<h1>{text(report.headline.title)}</h1>
{_statements(report.headline.statements)}
</header>
<nav aria-label="Parts of the report"><ul>
<li><a href="#summary">Every task</a></li>
<li class="drawn"><a href="#matrix">All versions</a></li>
<li class="drawn"><a href="#histories">Over time</a></li>
<li class="drawn" data-for="merges"><a href="#merges">Merges</a></li>
<li class="drawn" data-for="changed"><a href="#changed">Changed rows</a></li>
<li class="drawn"><a href="#versions">Sizes</a></li>
<li class="drawn" data-for="masks"><a href="#masks">Masks</a></li>
{_kinds_link(report)}<li><a href="#reading">How to read this</a></li>
</ul></nav>
<main id="main" tabindex="-1">
{_summary(report)}
<noscript><p class="note">The parts below the summary need JavaScript: heat map, lines over
versions, merges, changed rows, sizes and masks. Nothing is loaded from anywhere.</p></noscript>
{_drawn("matrix", "All versions on all tasks")}
{_drawn("histories", "Each task over its versions")}
{_drawn("merges", "Before and after a merge")}
{_drawn("changed", "Rows that changed")}
{_drawn("versions", "Sizes of all versions")}
{_drawn("masks", "What the masks share")}
{_sequences(report.sequences)}
{kinds_section(report.comparisons)}
{_reading(report)}
</main>
<footer><p>Written by <code>lori report</code>. Base: <bdi>{text(report.base)}</bdi>.</p></footer>
<script type="application/json" id="data">{as_script(compact(report))}</script>
<script>{script}</script>
</body>
</html>
"""


def text(value: object) -> str:
    """Escaped and harmless, for an element or an attribute."""
    return escape(visible(str(value)))


def _asset(name: str) -> str:
    return (files(__package__) / "page" / name).read_text("utf-8")


def _digest(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _drawn(name: str, title: str) -> str:
    """A part that the script fills, or takes away where there is nothing to show."""
    return (
        f'<section id="{name}" class="drawn" aria-labelledby="{name}-title">'
        f'<h2 id="{name}-title">{title}</h2><div data-part="{name}"></div></section>'
    )


def _kinds_link(report: Report) -> str:
    return '<li><a href="#kinds">Kinds</a></li>\n' if report.comparisons else ""


def _statements(statements: Sequence[Statement]) -> str:
    """A list by kind; each kind is named once, in words beside its mark."""
    parts = []
    for kind, title in KINDS.items():
        own = [s for s in statements if s.kind == kind]
        if own:
            mark = f'<span class="mark" aria-hidden="true">{MARKS.get(kind, "")}</span> '
            told = "".join(f"<p>{_statement(s)}</p>" for s in own)
            name = kind.replace(" ", "-")
            parts.append(f'<div class="{name}"><dt>{mark}{title}</dt><dd>{told}</dd></div>')
    return f'<dl class="headline">{"".join(parts)}</dl>' if parts else ""


def _statement(statement: Statement) -> str:
    command = f" <code>{text(statement.command)}</code>" if statement.command else ""
    return text(statement.text) + command


def _summary(report: Report) -> str:
    head = '<section id="summary" aria-labelledby="summary-title">'
    if report.focus is None or not report.tasks:
        return f'{head}<h2 id="summary-title">Every task</h2>{_bare_tasks(report.tasks)}</section>'
    rows = [(task, task.cell(report.focus)) for task in report.tasks]
    shown = [(t, c) for t, c in rows if c is not None or t.latest]
    limit = max(
        (
            max(abs(c.parent.low), abs(c.parent.high))
            for _, c in shown
            if c is not None and c.parent is not None and c.parent.rows
        ),
        default=0.0,
    )
    used = defaultdict(list)
    for changed in report.changed:
        if changed.pair != PARENT:
            used[changed.task].append(changed)
    body = "".join(_summary_row(task, cell, limit, used[task.ref]) for task, cell in shown)
    focus = text(report.focus)
    return f"""{head}<h2 id="summary-title">What {focus} did to every task</h2>
<p>Each task against the version that {focus} was made from, on the same rows. Intervals are 95%;
a mark stands where a change is beyond noise after a correction for the number of tasks.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Score and change of every task">
<table class="summary">
<caption class="hidden">Score of {focus} on every task and its change</caption>
<thead><tr><th scope="col" data-sort="text">Task</th><th scope="col" data-sort="number">Score</th>
<th scope="col" data-sort="number">Change</th>
<th scope="col" class="graphic" aria-hidden="true">{_axis(limit)}</th>
<th scope="col" data-sort="number">Verdict</th></tr></thead>
<tbody>{body}</tbody>
</table></div></section>"""


def _summary_row(
    task: TaskHistory, cell: Cell | None, limit: float, used: Sequence[ChangedRows]
) -> str:
    rows = f"{task.eval_rows:,} rows"
    lower = "" if task.higher_is_better else ", lower is better"
    name = (
        f'<th scope="row"><span class="task" data-task="{text(task.ref)}">{text(task.ref)}</span>'
        f"<small>{text(task.scorer)}{lower}, {rows}</small></th>"
    )
    if cell is None:
        return (
            f'<tr class="missing">{name}<td data-value="">–<small>not scored</small></td>'
            '<td data-value="">–</td><td class="graphic"></td>'
            '<td data-value="9">not scored<small>nothing is known</small></td></tr>'
        )
    score = f'<td data-value="{cell.value:.6g}">{number(cell.value)}'
    change = cell.parent
    if change is None or not change.rows:
        note = text(change.note) if change is not None else "nothing came before"
        return (
            f"<tr>{name}{score}</td>"
            f'<td data-value="">–<small>{note}</small></td><td class="graphic"></td>'
            '<td data-value="8">not compared</td></tr>'
        )
    score += (
        f"<small>from {number(cell.value - change.change)}, {text(change.against)}</small></td>"
    )
    told = f"<small>{signed(change.low)} to {signed(change.high)}</small>"
    if change.lost is not None and change.gained is not None:
        told += f"<small>{change.lost:,} rows lost, {change.gained:,} gained</small>"
    if change.rows_only_before or change.rows_only_after:
        apart = change.rows_only_before + change.rows_only_after
        told += f"<small>{apart:,} rows were scored on one side only</small>"
    if change.note:
        told += f"<small>{text(change.note)}</small>"
    verdict, order = _verdict(change.verdict, change.possible_drop(task.higher_is_better))
    for other in used:
        word = other.change.verdict
        told_of = f"{MARKS[word]} really {word}, " if word else ""
        verdict += (
            f"<small>against {text(other.pair)}: {told_of}{signed(other.change.change)}</small>"
        )
    return (
        f"<tr>{name}{score}"
        f'<td data-value="{change.change:.6g}">{signed(change.change)}{told}</td>'
        f'<td class="graphic" aria-hidden="true">'
        f"{_bar(change.low, change.change, change.high, limit, change.verdict)}</td>"
        f'<td data-value="{order:.6g}">{verdict}</td></tr>'
    )


def _verdict(verdict: str, drop: float) -> tuple[str, float]:
    """In words, and a key that sorts the worst first and the widest open next."""
    if verdict:
        word = f'<span class="{verdict}">{MARKS[verdict]} really {verdict}</span>'
        return word, 0.0 if verdict == "worse" else 3.0
    nothing = "no drop" if drop == 0 else f"a drop of up to {number(drop)}"
    return f"not told apart<small>{nothing} is not excluded</small>", 1.0 + 1.0 / (1.0 + drop)


def _axis(limit: float) -> str:
    return f"<small>−{limit:.2g}</small><small>0</small><small>+{limit:.2g}</small>"


def _bar(low: float, middle: float, high: float, limit: float, verdict: str) -> str:
    """An interval and its middle on an axis from -limit to limit; the numbers stand beside it."""
    if not limit or math.isnan(middle):
        return ""

    def x(value: float) -> str:
        return f"{60 + 56 * max(-1.0, min(1.0, value / limit)):.1f}"

    return (
        f'<svg viewBox="0 0 120 20" class="bar {verdict}" focusable="false">'
        '<line class="zero" x1="60" x2="60" y1="1" y2="19"/>'
        f'<line class="range" x1="{x(low)}" x2="{x(high)}" y1="10" y2="10"/>'
        f'<circle cx="{x(middle)}" cy="10" r="3.5"/></svg>'
    )


def _bare_tasks(tasks: Iterable[TaskHistory]) -> str:
    """The tasks where no version is in focus: what the base scores, if anything."""
    rows = []
    for task in tasks:
        value = task.cells[-1].value if task.cells else math.nan
        rows.append(
            f'<tr><th scope="row">{text(task.ref)}<small>{text(task.scorer)}, '
            f"{task.eval_rows:,} rows</small></th><td>{number(value)}</td></tr>"
        )
    if not rows:
        return "<p>There are no tasks yet.</p>"
    return (
        '<table class="summary"><caption class="hidden">Every task and its newest score</caption>'
        '<thead><tr><th scope="col">Task</th><th scope="col">Score</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _sequences(sequences: Sequence[TaughtSequence]) -> str:
    """The figures of continual learning, each with formula and source."""
    parts = []
    for sequence in sequences:
        rows = "".join(map(_figure, sequence.figures))
        note = f"<p>{text(sequence.note)}</p>" if sequence.note else ""
        title = f"{text(sequence.line)}: {len(sequence.stages)} stages"
        table = (
            '<div class="scroll" tabindex="0" role="region" '
            f'aria-label="Figures of {text(sequence.line)}"><table><caption>{title}</caption>'
            '<thead><tr><th scope="col">Figure</th><th scope="col">Value</th>'
            '<th scope="col">Terms</th><th scope="col">Formula</th></tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
            if rows
            else ""
        )
        parts.append(note + table)
    if not parts:
        return ""
    return (
        '<section id="sequences" aria-labelledby="sequences-title"><h2 id="sequences-title">'
        f"Sequences and merges in figures</h2>{''.join(parts)}</section>"
    )


def _figure(figure: Figure) -> str:
    direction = "higher" if figure.higher_is_better else "lower"
    value = (signed if " - " in figure.formula else number)(figure.value)
    return (
        f'<tr><th scope="row">{text(figure.name)}<small>{text(figure.symbol)}, {direction} is '
        f"better</small></th><td>{value}</td><td>{figure.denominator}</td>"
        f'<td class="formula"><code>{text(figure.formula)}</code>'
        f"<small>{text(figure.source)}</small></td></tr>"
    )


def _reading(report: Report) -> str:
    notes = "".join(f"<li>{text(note)}</li>" for note in report.notes)
    told = f"<h3>What the audit could not judge</h3><ul>{notes}</ul>" if notes else ""
    return f"""<section id="reading" aria-labelledby="reading-title">
<h2 id="reading-title">How to read this</h2>
<dl class="words">
<dt><span class="worse">▼ really worse</span>, <span class="better">▲ really better</span></dt>
<dd>The change is beyond noise: p &lt; .05, corrected for all tasks that are looked at together.
Right/wrong rows by McNemar's exact test, all else by a sign-flip test; always on the same
rows.</dd>
<dt>not told apart</dt>
<dd>The rows show no real change. That is no proof that there is none: the interval says how large
a drop they leave possible.</dd>
<dt>95% intervals</dt>
<dd>Of a share of right rows: Wilson's. Of other scores: 1.96 standard errors. Of a paired change
of right rows: Tango's score interval; of others: by bootstrap. Each is for one comparison; they
take rows as independent.</dd>
<dt>parent</dt>
<dd>What a version was continued from; for a merge, the member that was trained on the task;
else the base.</dd>
<dt>best</dt>
<dd>The best score before it among the versions shown. The best of many is partly the luckiest.</dd>
</dl>
{told}
</section>"""
