"""A comparison of kinds as a drawing: each kind's score with its interval, its size beside."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from lori_manager.reporting.harmless import visible
from lori_manager.reporting.kind_comparisons import BEATS, LOSES, KindResult, KindsCompared

WIDTH, ROW, TOP, BOTTOM = 680, 28, 14, 46
LEFT, RIGHT = 120, 110  # of the axis: names stand before it, sizes behind
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1a2027}.small{font-size:12px;fill:#55606b}"
    ".grid{stroke:#e4e8ec}.zero{stroke:#8a96a3;stroke-dasharray:3 3}.range{stroke:#8a96a3;"
    "stroke-width:3}.point{fill:#33404d}.seed{fill:none;stroke:#33404d}"
    ".better .range{stroke:#0b5f97}.better .point{fill:#0b5f97}"
    ".worse .range{stroke:#a8430a}.worse .point{fill:#a8430a}"
)


def drawing(found: KindsCompared) -> str:
    """An SVG element that a page's style colours; kinds without a score have no mark."""
    shown = [k for k in found.kinds if not math.isnan(k.value)]
    height = TOP + ROW * len(found.kinds) + BOTTOM
    ends = [v for k in shown for v in (k.low, k.high, *k.scores) if math.isfinite(v)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    marks = ticks(low, high)
    low, high = min(low, marks[0]), max(high, marks[-1])

    def x(value: float) -> float:
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    bottom = height - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="kinds" role="img" '
        f'viewBox="0 0 {WIDTH} {height}" aria-label="{escape(visible(_told(found)))}">'
    ]
    for mark in marks:
        parts.append(f'<line class="grid" x1="{x(mark)}" x2="{x(mark)}" y1="{TOP - 6}" '
                     f'y2="{bottom}"/><text class="small" text-anchor="middle" x="{x(mark)}" '
                     f'y="{bottom + 17}">{mark:g}</text>')  # fmt: skip
    what = escape(visible(f"{found.scorer} on {found.task}"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="small" text-anchor="middle" x="{middle}" y="{bottom + 36}">{what}, '
                 'mean and 95% interval; rings: single seeds</text>')  # fmt: skip
    parts.append(f'<text class="small" text-anchor="end" x="{WIDTH - 6}" y="{bottom + 17}">'
                 'stored</text>')  # fmt: skip
    if shown and shown[0].entry == found.first:
        at = x(shown[0].value)
        parts.append(f'<line class="zero" x1="{at}" x2="{at}" y1="{TOP - 6}" y2="{bottom}"/>')
    for number, kind in enumerate(found.kinds):
        parts.append(_row(kind, TOP + ROW * number + ROW / 2, x))
    return "".join([*parts, "</svg>"])


def standalone(found: KindsCompared) -> str:
    """The drawing as a file of its own, with its style."""
    svg = drawing(found)
    begin = svg.index(">") + 1
    backdrop = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return f"{svg[:begin]}<style>{STYLE}</style>{backdrop}{svg[begin:]}\n"


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers from the last not above `low` to the first not below `high`.

    >>> ticks(0.83, 0.97)
    [0.8, 0.85, 0.9, 0.95, 1.0]
    """
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw - 1e-12)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _row(kind: KindResult, y: float, x: Callable[[float], float]) -> str:
    verdict = kind.against.verdict if kind.against else ""
    color = {BEATS: " better", LOSES: " worse"}.get(verdict, "")
    name = f'<text x="6" y="{y + 4}">{escape(visible(kind.entry))}</text>'
    if math.isnan(kind.value):
        return f'<g>{name}<text class="small" x="{LEFT}" y="{y + 4}">not scored</text></g>'
    low = kind.low if math.isfinite(kind.low) else kind.value
    high = kind.high if math.isfinite(kind.high) else kind.value
    seeds = "".join(
        f'<circle class="seed" cx="{x(score)}" cy="{y}" r="3"/>'
        for score in kind.scores
        if len(kind.scores) > 1
    )
    stored = "" if kind.bytes is None else f"{kind.bytes / 1e6:.3g} MB"
    return (
        f'<g class="row{color}">{name}'
        f'<line class="range" x1="{x(low)}" x2="{x(high)}" y1="{y}" y2="{y}"/>{seeds}'
        f'<circle class="point" cx="{x(kind.value)}" cy="{y}" r="5"/>'
        f'<text class="small" text-anchor="end" x="{WIDTH - 6}" y="{y + 4}">{stored}</text></g>'
    )


def _told(found: KindsCompared) -> str:
    scores = [f"{k.entry} {k.value:.3f}" for k in found.kinds if not math.isnan(k.value)]
    return f"Scores on {found.task}: {', '.join(scores) or 'none yet'}"
