"""The scores of a placement as one SVG: a bar a type, and a map of every layer."""

from __future__ import annotations

import math
from xml.sax.saxutils import escape

from lori_manager.placement import Placement, TypeScore

WIDTH, RIGHT = 860, 28
ROW, BAR = 30, 16
TAKEN, OTHER, INK, MUTED, GRID = "#5fa8d8", "#c9d1d8", "#1a2027", "#55606b", "#e4e8ec"
# Of the map: below 1, 1, above 1.
LOW, MIDDLE, HIGH = (33, 102, 172), (247, 247, 247), (179, 88, 6)


def placement_svg(found: Placement, top: int) -> str:
    """The picture, on a white ground, in the fonts of whoever looks at it.

    Args:
        found: scores by module.
        top: how many types are chosen.
    """
    taken = found.chosen(top)
    left = 40 + 8 * max(len(one.name) for one in found.types)
    bars_top = 92
    map_top = bars_top + ROW * len(found.types) + 86
    height = map_top + ROW * len(found.types) + 84
    title = f"Layers for {found.task}#{found.task_revision}"
    read = f"{found.read}, seed {found.seed}, {found.precision}"
    names = ", ".join(one.name for one in taken)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img" font-family="system-ui, -apple-system, '
        "'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif\">",
        f"<title>{escape(title)}: {escape(names)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(24, 34, title, size=19, weight=650),
        _text(24, 56, f"{names}: the lowest of {len(found.types)} types; {read}", fill=MUTED),
        *_bars(found.types, taken, left, bars_top),
        *_map(found.types, taken, left, map_top),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _bars(
    types: tuple[TypeScore, ...], taken: tuple[TypeScore, ...], left: int, top: int
) -> list[str]:
    """A bar for each type's mean, a whisker for its spread over layers."""
    most = max(max(one.score + one.spread for one in types), 1.0) * 1.02
    step = _step(most)
    bottom = top + ROW * len(types)

    def x(value: float) -> float:
        return left + (WIDTH - left - RIGHT - 52) * value / most

    out = []
    for count in range(math.floor(most / step + 1e-9) + 1):
        value = count * step
        out.append(_line(x(value), top - 4, x(value), bottom, GRID))
        out.append(_text(x(value), bottom + 18, f"{value:g}", fill=MUTED, anchor="middle"))
    out.append(_line(x(1), top - 4, x(1), bottom, MUTED, dash="3 3"))
    for i, one in enumerate(types):
        middle, chosen = top + ROW * i + ROW / 2, one in taken
        fill = TAKEN if chosen else OTHER
        out.append(
            _text(left - 10, middle + 4, one.name, anchor="end", weight=650 if chosen else 400)
        )
        out.append(
            f'<rect x="{left}" y="{middle - BAR / 2:g}" width="{x(one.score) - left:.1f}" '
            f'height="{BAR}" rx="2" fill="{fill}"><title>{escape(one.name)}: '
            f"{one.score:.3f}, std over layers {one.spread:.3f}</title></rect>"
        )
        low, high = x(max(one.score - one.spread, 0)), x(one.score + one.spread)
        out += [
            _line(low, middle, high, middle, INK),
            *(_line(end, middle - 4, end, middle + 4, INK) for end in (low, high)),
            _text(high + 8, middle + 4, f"{one.score:.2f}", weight=650 if chosen else 400),
        ]
    told = "Normalised feature norm: mean and standard deviation over layers; random inputs give 1."
    return [*out, _text(left, bottom + 38, told, fill=MUTED)]


def _map(
    types: tuple[TypeScore, ...], taken: tuple[TypeScore, ...], left: int, top: int
) -> list[str]:
    """A cell for each layer of each type, coloured by the logarithm of its score."""
    numbers = sorted(
        {number for one in types for number in one.layers}, key=lambda n: -1 if n is None else n
    )
    every = sorted(abs(math.log(score)) for one in types for score in one.layers.values())
    most = max(every[int(0.95 * (len(every) - 1))], math.log(1.25))
    wide = (WIDTH - left - RIGHT) / len(numbers)
    out = []
    for i, one in enumerate(types):
        y = top + ROW * i
        weight = 650 if one in taken else 400
        out.append(_text(left - 10, y + ROW / 2 + 4, one.name, anchor="end", weight=weight))
        for j, number in enumerate(numbers):
            if number not in one.layers:
                continue
            score = one.layers[number]
            place = "outside of blocks" if number is None else f"layer {number}"
            out.append(
                f'<rect x="{left + wide * j:.2f}" y="{y + 1}" width="{wide - 1:.2f}" '
                f'height="{ROW - 2}" fill="{_colour(math.log(score) / most)}"><title>'
                f"{escape(one.name)}, {place}: {score:.3f}</title></rect>"
            )
    bottom = top + ROW * len(types)
    every_so = max(1, math.ceil(len(numbers) / 20))
    for j, number in enumerate(numbers):
        if number is not None and j % every_so == 0:
            middle = left + wide * (j + 0.5)
            out.append(_text(middle, bottom + 18, str(number), fill=MUTED, anchor="middle"))
    return out + _legend(most, left, bottom + 52)


def _legend(most: float, left: int, y: float) -> list[str]:
    """What the colours stand for."""
    steps, wide = 21, 9
    out = [_text(left, y, "The same by layer", fill=MUTED)]
    start = WIDTH - RIGHT - steps * wide - 36
    for i in range(steps):
        share = 2 * i / (steps - 1) - 1
        out.append(
            f'<rect x="{start + wide * i}" y="{y - 10}" width="{wide}" height="12" '
            f'fill="{_colour(share)}"/>'
        )
    ends = ("≤ ", math.exp(-most)), ("", 1.0), ("≥ ", math.exp(most))
    for i, (sign, value) in enumerate(ends):
        place = start + steps * wide * i / 2
        out.append(_text(place, y + 18, f"{sign}{value:.2g}", fill=MUTED, anchor="middle"))
    return out


def _colour(share: float) -> str:
    """-1 is blue, 0 white, 1 orange."""
    end = LOW if share < 0 else HIGH
    part = min(abs(share), 1.0)
    mixed = (round(m + (e - m) * part) for m, e in zip(MIDDLE, end, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _step(most: float) -> float:
    """A round number of which four to eight fit."""
    rough = most / 6
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * n for n in (1, 2, 5, 10) if power * n >= rough)


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 13,
    weight: int = 400,
    fill: str = INK,
    anchor: str = "start",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{fill}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, stroke: str, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}"{dashed}/>'
    )
