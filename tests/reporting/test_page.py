"""The page as text: whole, harmless, small, and asking for nothing."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from report_workspaces import History, two_tasks_and_a_merge

from lori_manager.errors import StorageFailed
from lori_manager.reporting.compact import compact
from lori_manager.reporting.harmless import as_script, visible
from lori_manager.reporting.page import SCRIPTS, STYLE, page, write_page

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "\"'><svg onload=alert(1)>",
    "x" * 3000,
    "שלום עולם مرحبا",
    "\u202egnp.exe",
    "a\x00b\x1b[31m\x7f\x85",
    "\u2028\u2029\ufeff",
    "]]>&amp;&lt;",
    "{{constructor.constructor('alert(1)')()}}",
]


class Reader(HTMLParser):
    """Elements with their attributes, and the text of scripts and of all else."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.scripts, self.styles, self.words, self.open = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        where = {"script": self.scripts, "style": self.styles}
        where.get(self.open[-1] if self.open else "", self.words).append(data)


@pytest.fixture
def hostile(tmp_path):
    """Rows, answers, descriptions of origins and a base that try to get out."""
    history = History(tmp_path / "<script>alert(0)")
    rows = [(text, text) for text in HOSTILE]
    history.task("nlu", rows)
    n = len(rows)
    history.score(history.adapter("main"), "nlu", [1] * n, origin=HOSTILE[0])
    history.score(history.adapter("main", "main@1"), "nlu", [0] * n, origin=HOSTILE[0])
    return history.opened().report(answers=lambda row: (HOSTILE[row.index], HOSTILE[row.index]))


def test_hostile_text_stays_text(hostile):
    read = Reader(page(hostile))
    assert [tag for tag, _ in read.elements].count("script") == 2
    assert not [tag for tag, _ in read.elements if tag in ("img", "iframe", "object", "embed")]
    assert not [a for _, attrs in read.elements for a in attrs if a.startswith("on")]
    assert "<script>alert(0)" in "".join(read.words)
    data = json.loads(read.scripts[0])
    shown = data["changed"][0]["rows"]
    assert [row["prompt"] for row in shown[:4]] == HOSTILE[:4]
    assert shown[0]["answer_after"] == HOSTILE[0]
    assert shown[6]["prompt"] == "[U+202E]gnp.exe"
    assert shown[7]["prompt"] == "a␀b␛[31m␡[U+0085]"


def test_no_text_in_the_page_can_end_its_script(hostile):
    text = page(hostile)
    data = text[text.index('id="data">') + len('id="data">') :]
    data = data[: data.index("</script>")]
    assert not set("<>&\u2028\u2029\x00") & set(data)
    json.loads(data)


@pytest.mark.parametrize("code", [*range(32), *range(127, 160), 0x202E, 0x2066, 0xD800, 0xFFFE])
def test_what_cannot_be_seen_is_made_visible(code):
    shown = visible(f"a{chr(code)}b")
    if code in (9, 10):
        assert shown == f"a{chr(code)}b"
    elif code == 13:
        assert shown == "a\nb"
    else:
        assert shown != f"a{chr(code)}b"
        assert shown.isprintable()
        shown.encode()


def test_numbers_that_json_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="JSON"):
        as_script({"x": float("nan")})


def test_the_page_asks_for_nothing(hostile):
    text = page(hostile)
    read = Reader(text)
    for _, attributes in read.elements:
        assert not {"src", "srcset", "action", "data", "poster", "ping"} & attributes.keys()
        assert attributes.get("href", "#").startswith("#")
    style = "".join(read.styles)
    assert "url(" not in style
    assert "@import" not in style
    script = read.scripts[1]
    for way in (
        "fetch(",
        "XMLHttpRequest",
        "WebSocket",
        "sendBeacon",
        "import(",
        "http:",
        "https:",
    ):
        assert way not in script.replace("http://www.w3.org/2000/svg", "")


def test_the_script_never_makes_markup_of_text():
    for name in SCRIPTS:
        text = (files("lori_manager.reporting") / "page" / name).read_text("utf-8")
        for way in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "Function(",
        ):
            assert way not in text, name


def test_only_this_script_and_this_style_may_act(hostile):
    read = Reader(page(hostile))
    policy = next(a["content"] for _, a in read.elements if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; ")
    for kind, content in (("script", read.scripts[1]), ("style", "".join(read.styles))):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert not [tag for tag, attributes in read.elements if "style" in attributes]


def test_headline_and_summary_are_plain_html(tmp_path):
    text = page(two_tasks_and_a_merge(tmp_path / "ws").opened().report())
    words = " ".join(" ".join(Reader(text).words).split())
    assert "main@2 is really worse than production (main@1) on 1 of 2 tasks, better on 1" in words
    assert "main@production means main@1" in words
    assert "nlu#1" in words
    assert "−0.300" in words
    assert "30 rows lost, 0 gained" in words
    assert "▼ really worse" in words


def test_tables_of_plain_html_say_what_heads_what(tmp_path):
    read = Reader(page(two_tasks_and_a_merge(tmp_path / "ws").opened().report()))
    tags = [tag for tag, _ in read.elements]
    assert tags.count("table") == tags.count("caption") >= 1
    assert all(a.get("scope") in ("row", "col") for tag, a in read.elements if tag == "th")
    identifiers = [a["id"] for _, a in read.elements if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    named = {a[k] for _, a in read.elements for k in ("aria-labelledby",) if k in a}
    assert named <= set(identifiers)
    assert {a["href"][1:] for tag, a in read.elements if tag == "a"} <= set(identifiers)


def test_cells_come_back_from_their_columns_as_they_were(tmp_path):
    report = two_tasks_and_a_merge(tmp_path / "ws").opened().report()
    packed = compact(report)
    task = packed["tasks"][0]
    cells = task["cells"]

    def at(column, i):
        return column[i] if isinstance(column, list) else column

    for i, cell in enumerate(report.tasks[0].cells):
        assert packed["versions"]["ref"][cells["i"][i]] == cell.version
        for name, value in (("v", cell.value), ("l", cell.low), ("h", cell.high)):
            assert cells[name][i] / task["scale"] == pytest.approx(value, abs=1e-4)
        if cell.parent is not None:
            if cell.parent.rows:
                assert at(cells["pc"], i) / task["scale"] == pytest.approx(
                    cell.parent.change, abs=1e-4
                )
            mark = {"worse": -1, "better": 1, "": 0}[cell.parent.verdict]
            assert (at(cells["px"], i), at(cells["pm"], i)) == (cell.parent.lost, mark)


@pytest.mark.parametrize("size", [1e-6, 0.02, 1.0, 37.0, 123456.0])
def test_four_digits_of_a_score_survive_whatever_its_size(tmp_path, size):
    history = History(tmp_path).task("x", 3)
    history.score(history.adapter("main"), "x", [size * 1.2345, size * 1.2345, size * 1.2345])
    task = compact(history.opened().report())["tasks"][0]
    assert task["cells"]["v"][0] / task["scale"] == pytest.approx(size * 1.2345, rel=1e-3)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    report = two_tasks_and_a_merge(tmp_path / "ws").opened().report()
    with pytest.raises(StorageFailed, match="none"):
        write_page(report, tmp_path / "none" / "report.html")
    size = write_page(report, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size == size < 150_000


# contrast, of the colours as they stand in the style sheet


def themes():
    """Theme -> name of a colour -> its value; the dark one takes the rest from the light."""
    style = (files("lori_manager.reporting") / "page" / STYLE).read_text("utf-8")
    light, dark = re.findall(r":root \{([^}]*--page[^}]*)\}", style)
    found = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light))
    return {"light": found, "dark": found | dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", dark))}


def luminance(colour):
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a, b):
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_computed_as_wcag_does():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_has_the_contrast_that_wcag_aa_asks(theme):
    colours = themes()[theme]
    pairs = [
        (colours[name[3:]], value) for name, value in colours.items() if name.startswith("on-")
    ]
    assert len(pairs) == 17
    for text in ("text", "muted", "link", "worse", "better"):
        pairs += [(colours[text], colours["page"]), (colours[text], colours["panel"])]
    poor = [(a, b, round(contrast(a, b), 2)) for a, b in pairs if contrast(a, b) < 4.5]
    assert not poor


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_points_and_focus_have_the_contrast_of_graphics(theme):
    colours = themes()[theme]
    for name in ("line", "point", "worse", "better", "focus"):
        assert contrast(colours[name], colours["page"]) >= 3, name


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_scale_of_scores_goes_one_way_in_lightness(theme):
    colours = themes()[theme]
    steps = [luminance(colours[f"s{i}"]) for i in range(9)]
    assert steps == sorted(steps, reverse=theme == "light")
    assert len(set(steps)) == 9


def simulated(colour, kind):
    """How the colour looks with one kind of cone missing: Viénot, Brettel and Mollon 1999."""
    linear = [(int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]
    mix = {"protan": (0.11238, 0.88762, 0.00401, -0.00401),
           "deutan": (0.29275, 0.70725, -0.02234, 0.02234)}[kind]  # fmt: skip
    r, g, b = linear
    return mix[0] * r + mix[1] * g, mix[2] * r + mix[3] * g + b


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["protan", "deutan"])
def test_worse_and_better_differ_to_the_colour_blind(theme, kind):
    colours = themes()[theme]
    for worse, better in (("w3", "b3"), ("w2", "b2"), ("worse", "better")):
        a, b = simulated(colours[worse], kind), simulated(colours[better], kind)
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) > 0.1, (worse, better)
