"""The page in Chromium: drawn, clicked, typed at, printed, without script, and on a phone.

Skipped where there is no Chromium: `apt-get install chromium`, or set $CHROMIUM.
"""

import json
import warnings
from pathlib import Path

import pytest
from chromium import Chromium, find_chromium
from report_workspaces import History, two_tasks_and_a_merge
from test_page import HOSTILE

from lori_manager.reporting.page import write_page

CHROMIUM = find_chromium()
WITHOUT = (
    "no Chromium here: the report's page is NOT TESTED in a browser; install it, or set $CHROMIUM"
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WITHOUT)
if CHROMIUM is None:
    warnings.warn(WITHOUT, stacklevel=1)  # a skip's reason is seldom shown, a warning is
PROBES = Path(__file__).with_name("probes.js").read_text("utf-8") + ";0"
COMPLETE = "document.documentElement.classList.contains('complete')"
MANY = 30


@pytest.fixture(scope="module")
def browser():
    with Chromium(CHROMIUM) as chromium:
        yield chromium


@pytest.fixture
def fresh(browser):
    """The browser with a wide window, in light, with script, its page to be opened."""
    browser.window(1200)
    browser.scheme("light")
    browser.scripting(True)
    yield browser
    assert browser.console == []
    assert [url for url in browser.requests if not url.startswith("file:")] == []


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    write_page(two_tasks_and_a_merge(folder / "ws").opened().report(), folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """More tasks and versions than one window of the matrix holds, and a task of long text."""
    folder = tmp_path_factory.mktemp("many")
    history = History(folder / "ws")
    for t in range(MANY):
        history.task(f"task-{t:02d}", 20)
    ref = None
    for v in range(40):
        ref = history.adapter("main", *([ref] if ref else []))
        for t in range(MANY if v >= 38 else 1):
            rows = 4 if (t, v) == (17, 39) else min(20, 5 + v // 3)
            history.right(ref, f"task-{t:02d}", rows, 20)
    write_page(history.opened().report(), folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    history = History(folder / "ws<script>alert(0)")
    n = len(HOSTILE)
    history.task("n" * 64, [(text, text) for text in HOSTILE])
    history.score(history.adapter("m" * 64), "n" * 64, [1] * n, origin=HOSTILE[0])
    history.score(history.adapter("m" * 64, "m" * 64 + "@1"), "n" * 64, [0] * n, origin=HOSTILE[0])
    report = history.opened().report(answers=lambda row: (HOSTILE[row.index], HOSTILE[row.index]))
    write_page(report, folder / "report.html")
    return folder / "report.html"


def opened(browser, path):
    browser.open(path)
    browser.wait(COMPLETE)
    browser.run(PROBES)
    return browser


def ask(browser, probe, *arguments):
    """The answer of one of the functions in probes.js."""
    return browser.run(f"probes.{probe}({', '.join(map(json.dumps, arguments))})")


def texts(browser, selector):
    """Of all elements that fit and can be seen."""
    return ask(browser, "texts", selector)


def test_every_part_is_drawn_and_nothing_is_asked_of_the_network(fresh, small):
    opened(fresh, small)
    parts = texts(fresh, "main h2")
    assert parts == [
        "What main@2 did to every task", "All versions on all tasks",
        "Each task over its versions", "Before and after a merge", "Rows that changed",
        "Sizes of all versions", "Sequences and merges in figures", "How to read this",
    ]  # fmt: skip
    assert len(texts(fresh, "nav a")) == 7  # no masks, so no way to them
    assert fresh.requests == [small.as_uri()]


def test_the_matrix_shows_numbers_and_marks_the_newest_on_top(fresh, small):
    opened(fresh, small)
    rows = texts(fresh, "#matrix tbody tr")
    assert rows[0].startswith("main@2")
    assert "0.600▼" in rows[0].replace("\n", "")
    assert "production" in rows[1]
    assert rows[-1].startswith("base")


def test_the_matrix_switches_to_changes(fresh, small):
    opened(fresh, small)
    fresh.click("#matrix input[value=parent]")
    assert "−0.300▼" in texts(fresh, "#matrix tbody tr")[0].replace("\n", "")
    assert fresh.run("document.querySelector('#matrix tbody td').className") == "w3"
    fresh.click("#matrix input[value=best]")
    assert "Change from the best" in texts(fresh, "#matrix caption")[0]


def test_a_choice_is_made_by_keyboard_too(fresh, small):
    opened(fresh, small)
    fresh.run("document.querySelector('#matrix input[value=score]').focus()")
    fresh.press("ArrowRight")
    assert fresh.run("document.querySelector('#matrix input:checked').value") == "parent"
    assert "Change from the parent" in texts(fresh, "#matrix caption")[0]


def test_a_line_is_chosen(fresh, small):
    opened(fresh, small)
    ask(fresh, "choose", "#matrix select", "nlu")
    shown = [row.split()[0] for row in texts(fresh, "#matrix tbody tr")]
    assert shown == ["nlu@1", "base"]


def test_points_tell_of_themselves_on_hover_and_by_keyboard(fresh, small):
    opened(fresh, small)
    assert texts(fresh, ".tip") == []
    fresh.run("document.querySelector('.chart .point[tabindex=\"0\"]').focus()")
    assert texts(fresh, ".tip")[0].startswith("main@2\n0.600, 95% 0.")
    fresh.press("ArrowLeft")
    assert texts(fresh, ".tip")[0].startswith("main@1 (production)")
    fresh.press("Home")
    assert texts(fresh, ".tip")[0].startswith("base")
    assert fresh.run("document.activeElement.getAttribute('aria-label')").startswith("base; 0.100")
    fresh.press("Escape")
    assert texts(fresh, ".tip") == []
    box = ask(fresh, "corner", ".chart svg")
    fresh.call("Input.dispatchMouseEvent", type="mouseMoved", x=box["right"] - 30, y=box["middle"])
    assert texts(fresh, ".tip")[0].startswith("main@2")


def test_a_chart_is_one_stop_for_the_tab_key(fresh, small):
    opened(fresh, small)
    stops = "document.querySelectorAll('.chart:first-child .point[tabindex=\"0\"]').length"
    assert fresh.run(stops) == 1


def test_the_intervals_lie_where_their_numbers_say(fresh, small):
    opened(fresh, small)
    found = ask(fresh, "chart")
    (a, ya), (b, yb) = found["ticks"][0], found["ticks"][-1]
    values = sorted(a + (y - ya) * (b - a) / (yb - ya) for y in found["ends"])
    low, high = found["label"].split("95% ")[1].split(",")[0].split(" to ")
    assert values == pytest.approx([float(low), float(high)], abs=2e-3)


def test_the_numbers_of_a_chart_unfold(fresh, small):
    opened(fresh, small)
    fresh.click(".chart details summary")
    fresh.wait("document.querySelector('.chart table')")
    assert texts(fresh, ".chart tbody tr")[0].startswith("main@2")
    assert "from nlu@1" in texts(fresh, ".chart tbody tr")[0]


def test_another_merge_is_chosen(fresh, small):
    opened(fresh, small)
    assert "79.9%" not in texts(fresh, "#merges")[0]
    before = texts(fresh, "#merges tbody tr")
    ask(fresh, "choose", "#merges select", 1)
    after = texts(fresh, "#merges tbody tr")
    assert "0.600" in before[0]
    assert "0.850" in after[0]
    # (.85 / .9 + .5 / .8) / 2
    assert "keeps 78.5%" in texts(fresh, "#merges")[0]


def test_changed_rows_unfold_and_switch(fresh, small):
    opened(fresh, small)
    assert texts(fresh, ".changed-rows li") == []
    fresh.click("#changed details summary")
    fresh.wait("document.querySelector('.changed-rows li')")
    assert texts(fresh, "#changed h3") == ["Right before, wrong now (20 of 30)"]
    first = texts(fresh, ".changed-rows li")[0]
    assert "nlu question 60" in first
    assert "answer 60" in first
    fresh.click("#changed input[value=production]")
    assert "main@2 against production: 25 rows lost and 29 gained" in texts(fresh, "#changed p")[0]


def test_hostile_text_is_shown_and_does_nothing(fresh, hostile):
    fresh.call(
        "Page.addScriptToEvaluateOnNewDocument", source="window.alert = () => { window.hit = 1; };"
    )
    opened(fresh, hostile)
    fresh.click("#changed details summary")
    fresh.wait("document.querySelector('.changed-rows li')")
    shown = fresh.run(
        "[...document.querySelectorAll('.changed-rows li pre')].map((e) => e.textContent)"
    )
    assert shown[:4] == [HOSTILE[0]] * 4  # prompt, expected and both answers
    assert "␀" in "".join(shown)
    assert not fresh.run("window.hit")
    assert fresh.run("document.querySelectorAll('script').length") == 2
    assert fresh.run("document.querySelectorAll('img, iframe').length") == 0
    for width in (360, 1200):
        fresh.window(width)
        assert not ask(fresh, "wider")


@pytest.mark.parametrize("page", ["small", "many", "hostile"])
def test_a_phone_needs_no_scrolling_sideways(fresh, page, request):
    fresh.window(360, 740)
    opened(fresh, request.getfixturevalue(page))
    fresh.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert not ask(fresh, "wider")
    used = "main button:not(.link):not(.sort), main select, main input[type=search]"
    assert min(ask(fresh, "heights", used)) >= 24  # a finger's target, WCAG 2.5.8


def test_stacked_tables_stay_tables_to_a_screen_reader(fresh, small):
    fresh.window(360, 740)
    opened(fresh, small)
    roles = [
        n["role"]["value"] for n in fresh.accessible_tree() if "role" in n and not n["ignored"]
    ]
    assert roles.count("table") == 5  # summary, matrix, merge, sizes, figures
    assert roles.count("rowheader") >= 2 + 5 + 2 + 4
    assert "columnheader" in roles
    # Not every browser keeps the roles of a table that is laid out as blocks.
    parts = "[...document.querySelectorAll('.stack tr, .stack td, .stack th')]"
    assert fresh.run(f"{parts}.every((e) => e.hasAttribute('role'))")
    for part in ("summary", "merges"):
        inside = f"document.querySelector('#{part} .scroll')"
        assert fresh.run(f"{inside}.scrollWidth <= {inside}.clientWidth"), part


def test_everything_that_can_be_used_has_a_name(fresh, many):
    opened(fresh, many)
    used = {"button", "link", "combobox", "searchbox", "radio", "table", "image", "img", "region"}
    nodes = [n for n in fresh.accessible_tree() if not n["ignored"]]
    named = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes]
    nameless = [role for role, name in named if role in used and not name.strip()]
    assert nameless == []


def test_the_first_tab_leads_past_the_navigation_and_focus_is_seen(fresh, small):
    opened(fresh, small)
    fresh.press("Tab")
    assert fresh.run("document.activeElement.textContent") == "Skip to the report"
    assert fresh.run("document.activeElement.getBoundingClientRect().left") >= 0
    fresh.press("Enter")
    assert fresh.run("document.activeElement.id") == "main"
    for _ in range(3):
        fresh.press("Tab")
        assert fresh.run("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_the_summary_sorts_and_leads_to_a_task(fresh, many):
    opened(fresh, many)
    first = texts(fresh, "#summary tbody tr")[0]
    assert first.startswith("task-17")  # the worst first
    fresh.click("#summary thead th:first-child button")
    assert texts(fresh, "#summary tbody tr")[0].startswith("task-00")
    assert fresh.run("document.querySelector('#summary thead th').ariaSort") == "ascending"
    fresh.click("#summary thead th:first-child button")
    assert texts(fresh, "#summary tbody tr")[0].startswith("task-29")
    fresh.click("#summary tbody tr:nth-child(5) .link")
    assert texts(fresh, ".chart h3") == ["task-25#1"]


def test_a_task_is_searched(fresh, many):
    opened(fresh, many)
    fresh.run("document.querySelector('#summary input').focus()")
    fresh.write("task-2")
    assert len(texts(fresh, "#summary tbody tr")) == 10
    assert fresh.run("document.getElementById('said').textContent") == "10 tasks of 30"
    fresh.run("document.querySelector('#histories input').focus()")
    fresh.write("-08")
    assert texts(fresh, ".chart h3") == ["task-08#1"]


def test_a_large_matrix_is_shown_in_windows_beside_an_overview(fresh, many):
    opened(fresh, many)
    assert texts(fresh, "#matrix caption") == ["Score: versions 1 to 30 of 40, tasks 1 to 24 of 30"]
    size = [fresh.run(f"document.querySelector('canvas').{side}") for side in ("width", "height")]
    assert size == [30, 40]
    ask(fresh, "press", "Older versions")
    ask(fresh, "press", "Tasks after")
    assert texts(fresh, "#matrix caption") == [
        "Score: versions 11 to 40 of 40, tasks 7 to 30 of 30"
    ]
    assert fresh.run("document.activeElement.tagName") == "BUTTON"
    ask(fresh, "corner", "canvas")  # brings it into view, and what is near it is drawn
    fresh.run("new Promise((done) => setTimeout(done, 300))")
    box = ask(fresh, "corner", "canvas")
    for kind in ("mousePressed", "mouseReleased"):
        fresh.call("Input.dispatchMouseEvent", type=kind, x=box["left"] + 3, y=box["top"] + 3,
                   button="left", clickCount=1)  # fmt: skip
    assert texts(fresh, "#matrix caption") == ["Score: versions 1 to 30 of 40, tasks 1 to 24 of 30"]


def test_the_overview_has_the_colours_of_the_table(fresh, many):
    opened(fresh, many)
    for scheme in ("light", "dark"):
        fresh.scheme(scheme)
        fresh.wait("probes.sameColour(17)", seconds=5)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("mode", ["score", "parent"])
def test_text_as_drawn_has_the_contrast_that_wcag_aa_asks(fresh, small, scheme, mode):
    fresh.scheme(scheme)
    opened(fresh, small)
    fresh.click(f"#matrix input[value={mode}]")
    fresh.click("#changed details summary")
    fresh.wait("document.querySelector('.changed-rows li')")
    found = ask(fresh, "contrast")
    assert found["count"] > 200
    assert found["poor"] == []


def test_in_print_the_rows_are_unfolded_and_nothing_is_cut(fresh, small):
    opened(fresh, small)
    pdf = fresh.print_()
    assert pdf.startswith(b"%PDF")
    assert fresh.run("document.querySelectorAll('.changed-rows li').length") > 20
    fresh.call("Emulation.setEmulatedMedia", media="print")
    fresh.window(700)
    assert texts(fresh, "nav") == []
    assert texts(fresh, ".controls") == []
    fresh.call("Emulation.setEmulatedMedia", media="")


def test_print_is_on_white_whatever_the_screen(fresh, small):
    feature = {"name": "prefers-color-scheme", "value": "dark"}
    fresh.call("Emulation.setEmulatedMedia", media="print", features=[feature])
    opened(fresh, small)
    assert fresh.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    fresh.call("Emulation.setEmulatedMedia", media="")


def test_without_script_headline_and_summary_are_there(fresh, small):
    fresh.scripting(False)
    fresh.call("Page.navigate", url=small.as_uri())
    fresh.wait("document.readyState === 'complete' && document.querySelector('h1')")
    fresh.run(PROBES)
    assert texts(fresh, "h1")[0].startswith("main@2 is really worse than production")
    assert len(texts(fresh, "#summary tbody tr")) == 2
    assert texts(fresh, "#matrix") == []
    assert "need JavaScript" in texts(fresh, "noscript")[0]
    assert len(texts(fresh, "nav a")) == 2


def test_a_workspace_without_anything_has_a_page(fresh, tmp_path):
    write_page(History(tmp_path / "ws").opened().report(), tmp_path / "report.html")
    opened(fresh, tmp_path / "report.html")
    assert texts(fresh, "h1") == ["Nothing is trained yet"]
    assert texts(fresh, "main h2") == ["Every task", "How to read this"]
