"""Comparisons of kinds on the page and as a drawing, from results of our own making."""

import dataclasses
import math
import re
import xml.etree.ElementTree as ET
from datetime import UTC, datetime

import pytest
from report_workspaces import two_tasks_and_a_merge
from test_page import HOSTILE

from lori_manager.reporting.kind_comparisons import Against, KindResult, KindsCompared
from lori_manager.reporting.kinds_plot import drawing, standalone, ticks
from lori_manager.reporting.kinds_section import kinds_section
from lori_manager.reporting.page import page

NAN = math.nan


def result(entry, value, spread=0.02, verdict=None, **changes):
    scores = (value - spread / 2, value + spread / 2)
    against = None
    if verdict:
        against = Against(value - 0.9, value - 0.93, value - 0.87, 0.004, 0.012, 2, verdict)
    made = KindResult(
        entry, ((1e-3, 0.4), (3e-3, 0.3)), (), 3e-3, True, 12.5, (0, 1),
        (f"clinc.{entry}@1", f"clinc.{entry}@2"), scores, value, value - spread, value + spread,
        against, 497_664, 934_000, 0.0213, 1_520_000_000, 9.1,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def undone(entry):
    return KindResult(entry, (), (), None, False, 0.0, (), (), (), NAN, NAN, NAN, None, None, None,
                      None, None, None)  # fmt: skip


def compared(*kinds, **changes):
    made = KindsCompared("d" * 64, "clinc#1", "exact_match", True, 500, 376, 94, 5, 3, kinds,
                         ("NVIDIA H100 80GB HBM3",), (), datetime.now(UTC))  # fmt: skip
    return dataclasses.replace(made, **changes)


@pytest.fixture
def four():
    return compared(
        result("lori", 0.9), result("lora", 0.915, verdict="ties"),
        result("ia3", 0.71, 0.04, "loses to", bytes=88_000), result("full", 0.957, 0.01, "beats"),
        undone("dora"), missing=("dora: 0 of 5 rates tried, nothing trained",),
    )  # fmt: skip


def text_of(html):
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def test_every_kind_has_its_row_verdict_and_costs(four):
    told = text_of(kinds_section([four]))
    assert "lori clinc.lori@1, clinc.lori@2 0.900 0.880 to 0.920, 2 seeds" in told
    assert "ties lori +0.015, −0.015 to +0.045, p 0.012" in told
    assert "▼ loses to lori" in told
    assert "▲ beats lori" in told
    assert "497,664 0.934 MB 21.3 ms 9.1 s 1.52 GB 0.003 at the edge of those tried" in told
    assert "dora nothing trained yet" in told
    assert "dora: 0 of 5 rates tried, nothing trained" in told
    assert "376 steps each; 5 rates of 94 steps, then at most 3 with all of them; NVIDIA" in told


def test_the_newest_comparison_stands_first(four):
    older = dataclasses.replace(four, task="older#1")
    told = kinds_section([older, four])
    assert told.index("clinc#1") < told.index("older#1")
    assert kinds_section([]) == ""


def test_the_page_has_the_part_and_the_way_to_it_only_where_kinds_were_compared(four, tmp_path):
    report = two_tasks_and_a_merge(tmp_path / "ws").opened().report()
    assert 'id="kinds"' not in page(report)
    assert 'href="#kinds"' not in page(report)
    told = page(dataclasses.replace(report, comparisons=(four,)))
    assert 'id="kinds"' in told
    assert 'href="#kinds"' in told
    assert " style=" not in told  # the page's policy would drop it


def test_marks_stand_in_the_order_of_the_scores_and_inside_the_drawing(four):
    svg = ET.fromstring(standalone(four))
    space = "{http://www.w3.org/2000/svg}"
    points = [float(c.get("cx")) for c in svg.iter(f"{space}circle") if c.get("class") == "point"]
    values = [k.value for k in four.kinds if not math.isnan(k.value)]
    assert [sorted(points).index(p) for p in points] == [sorted(values).index(v) for v in values]
    assert all(120 <= p <= 570 for p in points)
    # Equal steps of score are equal steps on the axis.
    scale = (points[3] - points[2]) / (values[3] - values[2])
    assert points[1] - points[0] == pytest.approx(scale * (values[1] - values[0]), abs=0.2)
    texts = [t.text for t in svg.iter(f"{space}text")]
    assert {"lori", "0.934 MB", "0.088 MB", "not scored"} <= set(texts)


@pytest.mark.parametrize("kinds", [(undone("lora"),), (result("lora", 0.0, 0.0),)])
def test_nothing_scored_and_no_spread_are_drawn_too(kinds):
    ET.fromstring(standalone(compared(*kinds)))


def test_an_unbounded_interval_is_not_drawn():
    svg = drawing(compared(result("lori", 0.5, low=-math.inf, high=math.inf)))
    assert "inf" not in svg
    assert "nan" not in svg


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_acts_or_hides(text):
    found = compared(result("lori", 0.9), task=text, scorer=text, devices=(text,), missing=(text,))
    for told in (kinds_section([found]), drawing(found)):
        assert "<script" not in told
        assert "\u202e" not in told
        assert "\x00" not in told


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.83, 0.97, [0.8, 0.85, 0.9, 0.95, 1.0]), (0, 1, [0, 0.5, 1]), (-2.2, 2, [-4, -2, 0, 2])],
)  # fmt: skip
def test_ticks_are_round_and_hold_what_is_shown(low, high, expected):
    assert ticks(low, high) == expected
