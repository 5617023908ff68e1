"""The report's part about comparisons of kinds: a drawing and a table for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from lori_manager.reporting.harmless import visible
from lori_manager.reporting.headline import number, signed
from lori_manager.reporting.kind_comparisons import (
    BEATS,
    LOSES,
    KindResult,
    KindsCompared,
)
from lori_manager.reporting.kinds_plot import drawing

MARKS = {BEATS: ("better", "▲"), LOSES: ("worse", "▼")}


def kinds_section(comparisons: Sequence[KindsCompared]) -> str:
    """The section, empty without any comparison; the newest first."""
    if not comparisons:
        return ""
    return (
        '<section id="kinds" aria-labelledby="kinds-title"><h2 id="kinds-title">Kinds of adapters '
        "compared</h2><p>Equal data and steps; each kind at the best of equally many learning "
        "rates, chosen by the loss on held-out training rows. Intervals are 95%, over rows and, "
        "with several seeds, seeds; verdicts by p &lt; .05, corrected for the number of kinds.</p>"
        f"{''.join(_comparison(one) for one in reversed(comparisons))}</section>"
    )


def _comparison(found: KindsCompared) -> str:
    rows = "".join(_row(kind, found) for kind in found.kinds)
    task, first = _text(found.task), _text(found.first)
    missing = "".join(f"<li>{_text(line)}</li>" for line in found.missing)
    full = f", then at most {found.full} with all of them" if found.full else ""
    lower = ", lower is better" if not found.higher_is_better else ""
    return (
        f'<h3>{task}</h3><div class="scroll" tabindex="0" role="region" '
        f'aria-label="Scores of the kinds on {task}">{drawing(found)}</div>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="Kinds on {task}"><table>'
        f"<caption>{_text(found.scorer)}{lower}, {found.rows:,} rows; {found.steps:,} steps each; "
        f"{found.points} rates of {found.search_steps:,} steps{full}; "
        f"{_text('; '.join(found.devices))}</caption>"
        '<thead><tr><th scope="col">Kind</th><th scope="col">Score</th>'
        f'<th scope="col">Against {first}</th><th scope="col">Trained</th>'
        '<th scope="col">Stored</th><th scope="col">Step</th><th scope="col">Training</th>'
        '<th scope="col">Memory</th>'
        f'<th scope="col">Rate</th></tr></thead><tbody>{rows}</tbody></table></div>'
        + (f"<p>Not done:</p><ul>{missing}</ul>" if missing else "")
    )


def _row(kind: KindResult, found: KindsCompared) -> str:
    refs = _text(", ".join(kind.adapters))
    name = f'<th scope="row">{_text(kind.entry)}<small>{refs}</small></th>'
    if math.isnan(kind.value):
        return f'<tr class="missing">{name}<td colspan="8">nothing trained yet</td></tr>'
    several = f", {len(kind.seeds)} seeds" if len(kind.seeds) > 1 else ", one seed"
    score = f"{number(kind.value)}<small>{number(kind.low)} to {number(kind.high)}{several}</small>"
    against = "–"
    if kind.against is not None:
        told = kind.against
        css, mark = MARKS.get(told.verdict, ("", ""))
        words = f"{_text(told.verdict)} {_text(found.first)}"
        verdict = f'<span class="{css}">{mark} {words}</span>' if mark else words
        p = "&lt;1e-6" if told.corrected < 1e-6 else f"{told.corrected:.2g}"
        against = (
            f"{verdict}<small>{signed(told.change)}, {signed(told.low)} to {signed(told.high)}, "
            f"p {p}</small>"
        )
    step = "–" if kind.step_seconds is None else f"{kind.step_seconds * 1e3:.3g} ms"
    memory = "–" if kind.peak_bytes is None else f"{kind.peak_bytes / 1e9:.3g} GB"
    edge = "<small>at the edge of those tried</small>" if kind.edge else ""
    rate = "–" if kind.rate is None else f"{kind.rate:g}{edge}"
    stored = "–" if kind.bytes is None else f"{kind.bytes / 1e6:.3g} MB"
    trained = "–" if kind.parameters is None else f"{kind.parameters:,}"
    whole = "–" if kind.seconds is None else f"{kind.seconds:,.3g} s"
    cells = (score, against, trained, stored, step, whole, memory, rate)
    return f"<tr>{name}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _text(value: str) -> str:
    return escape(visible(value))
