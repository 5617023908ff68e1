"""An audit as JSON, CSV, JUnit and Markdown, each read back by what others read it with."""

import csv
import io
import json
from importlib.resources import files
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
from audit_histories import FakeStore

from lori_manager.auditing import AuditRun, audit
from lori_manager.auditing.formats import junit, markdown
from lori_manager.auditing.formats.csv import lines
from lori_manager.auditing.formats.document import document
from lori_manager.auditing.results import FORMAT, VERSION

NASTY = '=1+1|<b>"&\x00\x1b]]>`*[x](y)\n'


@pytest.fixture
def rich(road):
    """The road with everything that a document may hold."""
    road.add_task("wiki", rows=4, scorer="perplexity")
    nll = np.array([1.0, 2.0, 3.0, 4.0])
    facts = {"higher_is_better": False}
    road.add_score("base", "wiki", nll, facts=facts)
    road.add_score("main@1", "wiki", nll + np.array([0.1, 0, 0, np.nan]), facts=facts)
    road.add_task("fresh")
    road.right("base", "sst", 3, origin=NASTY, precision="")
    road.right("support@3", "sst", 2, precision="bf16-nf4")
    again = road.add_adapter("main", parents=["clinc@1", "snips@1"], origin="merged")
    for task, n in {"clinc": 0, "snips": 8, "sst": 9}.items():
        road.right(again, task, n)
    road.alias("main@1", "production")
    return road


def written(run):
    return "".join(document(run))


@pytest.fixture(scope="module")
def schema():
    found = json.loads((files("lori_manager") / "schemas" / "audit.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


def refuse(constant):
    pytest.fail(f"{constant} is no JSON")


@pytest.mark.parametrize("ref", [None, "main", "support@2", "base"])
def test_the_document_fits_the_schema_and_is_what_to_json_says(rich, schema, ref):
    text = written(AuditRun(rich, ref, max_drop=0.1))
    found = json.loads(text, parse_constant=refuse)
    schema.validate(found)
    assert found == audit(rich, ref, max_drop=0.1).to_json()
    assert (found["format"], found["version"]) == (FORMAT, VERSION) == ("lori-audit", 1)


def test_an_empty_workspace_is_a_document_too(schema):
    found = json.loads(written(AuditRun(FakeStore())), parse_constant=refuse)
    schema.validate(found)
    assert found["tasks"] == []


def test_the_schema_knows_every_field_and_no_other(rich, schema):
    found = json.loads(written(AuditRun(rich)))
    for change in (
        lambda d: d.update(more=1),
        lambda d: d.pop("notes"),
        lambda d: d["tasks"][0]["entries"][1]["parent"].pop("low"),
        lambda d: d["tasks"][0]["entries"][1].update(value="much"),
        lambda d: d["sequences"][0]["figures"][0].update(unit="%"),
        lambda d: d.update(version=2),
    ):
        broken = json.loads(json.dumps(found))
        change(broken)
        assert not schema.is_valid(broken)


def test_every_definition_of_the_schema_is_met(rich, schema):
    """A definition that no document reaches would be held to nothing."""
    found = audit(rich, max_drop=0.1).to_json()
    tasks = found["tasks"]
    entries = [e for t in tasks for e in t["entries"]]
    assert any(t["sensitivity"] for t in tasks)
    for kind in ("parent", "previous", "best", "against"):
        assert any(e[kind] for e in entries)
    assert {s["kind"] for s in found["sequences"]} == {"sequence", "merges"}
    assert found["findings"]
    assert found["regressions"]


def test_csv_has_a_line_for_each_entry_and_runs_no_formula(rich):
    text = "".join(lines(AuditRun(rich)))
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    whole = audit(rich)
    assert len(rows) == sum(len(t.entries) for t in whole.tasks)
    by = {(r["task"], r["subject"], r["origin"]): r for r in rows}
    second = by["clinc", "support@2", "measured"]
    parent = next(e for e in whole.tasks[0].entries if e.subject == "support@2").parent
    assert second["parent_against"] == "support@1"
    assert float(second["parent_change"]) == parent.change
    assert float(second["parent_low"]) == parent.low
    assert second["parent_worse"] == "true"
    assert second["previous_change"] == ""
    assert by["sst", "main@1", "measured"]["aliases"] == "production"
    assert by["sst", "base", "'" + NASTY]["value"] == "0.3"
    assert not any(cell.startswith(("=", "@", "+")) for row in rows for cell in row.values())


def test_junit_has_a_suite_a_version_and_a_case_a_task(rich):
    root = ElementTree.fromstring(junit.text(audit(rich, "main@2", max_drop=0.2)).encode())
    (suite,) = root
    assert (suite.get("name"), root.tag, suite.tag) == ("main@2", "testsuites", "testsuite")
    cases = {case.get("name"): case for case in suite}
    assert list(cases) == ["clinc#1", "snips#1", "sst#1", "general#1", "wiki#1", "fresh#1"]
    kinds = {name: [child.tag for child in case] for name, case in cases.items()}
    assert kinds["clinc#1"] == ["failure", "failure", "system-out"]
    assert kinds["snips#1"] == ["system-out"]
    assert kinds["general#1"] == kinds["fresh#1"] == ["skipped"]
    assert [f.get("type") for f in cases["clinc#1"].findall("failure")] == [
        "regression", "drop",
    ]  # fmt: skip
    for element in (root, suite):
        told = {k: element.get(k) for k in ("tests", "failures", "errors", "skipped")}
        assert told == {"tests": "6", "failures": "1", "errors": "0", "skipped": "3"}
    assert "worse than clinc@1" in cases["clinc#1"].find("failure").get("message")
    assert cases["clinc#1"].get("classname") == "lori.audit.main@2"


def test_junit_passes_where_nothing_is_really_worse(road):
    root = ElementTree.fromstring(junit.text(audit(road)).encode())
    assert root.get("failures") == "0"
    assert root.find(".//failure") is None
    assert len(root) == 5


@pytest.mark.parametrize("render", [junit.text, markdown.text])
def test_words_from_outside_stay_words(rich, render):
    told = render(audit(rich, "base"))
    assert "\x00" not in told
    assert "\x1b" not in told
    if render is junit.text:
        ElementTree.fromstring(told.encode())
        return
    assert r'base (=1+1\|\<b\>"\& \]\]\>\`\*\[x\](y) )' in told
    assert "<b>" not in told


def test_junit_keeps_what_xml_cannot_write_out_of_messages(road):
    road.right(road.add_adapter("clinc", "clinc"), "clinc", 0, origin=NASTY)
    told = junit.text(audit(road, "clinc", max_drop=0.1))
    (failure,) = ElementTree.fromstring(told.encode()).iterfind(".//failure[@type='drop']")
    assert "]]>`*[x](y)" in failure.get("message")


def test_markdown_mentions_nobody_and_links_nothing():
    told = markdown.escape("by @user, nlu#12, user@host, https://x.y/<z>")
    assert told == r"by @<!-- -->user, nlu#<!-- -->12, user@host, https://x.y/\<z\>"


def test_markdown_says_first_what_was_judged_and_folds_the_rest(rich):
    told = markdown.text(audit(rich, "main", max_drop=0.2))
    head, *folded = told.split("<details>")
    assert "**1 real regression, 1 drop beyond 0.2.**" in head
    assert head.count("\n| clinc") == 1
    assert "regression: clinc#<!-- -->1: main@2 is at 0, 1 worse than clinc@1" in head
    assert len(folded) == told.count("</details>") == 7
    assert "main: R, every version on every task" in folded[-1]


def test_markdown_is_the_table_that_github_makes(rich):
    """Every table has one width, and a line of dashes under its heading."""
    for block in markdown.text(audit(rich)).split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("| ")]
        if rows:
            widths = {row.replace(r"\|", "").count("|") for row in rows}
            assert len(widths) == 1
            assert set(rows[1]) <= set("|-: ")
