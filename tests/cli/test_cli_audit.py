"""`lori audit` on a workspace whose scores were stored without any model."""

import csv
import io
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest

from lori_manager.metrics.summary import summarize
from lori_manager.records import Base, NewAdapter, NewScore, Parent, Split
from lori_manager.store.store import Store

MARK = "f" * 64
NAMES = ("nlu", "safety")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Two tasks of 50 rows, their adapters, and `versions` merges that lose on `safety`."""
    folder = tmp_path_factory.mktemp("audited")
    with Store.create(folder / ".lori") as store:
        store.set_base(Base(MARK, "none", None, str(folder), "llama", datetime.now(UTC)))
        split = {"eval": Split(store.objects.put(b"{}\n" * 50), 50)}
        for name in NAMES:
            store.add_task(
                name, scorer="exact_match", scorer_version="1", description="", splits=split,
                options={},
            )  # fmt: skip

        def adapter(line, task, parents=()):
            new = NewAdapter(
                line, "trained" if task else "merged", task, 1 if task else None, None, parents,
                "none", 8, None, MARK,
            )  # fmt: skip
            made = store.add_adapter(new, f"{line}{len(store.adapters())}".encode())
            return Parent(made.ref, made.digest, 1.0)

        def score(who, right, precision="fp32"):
            for name, n in right.items():
                x = (np.arange(50) < n).astype(np.float32)
                value, error, rows = summarize(x)
                new = NewScore(who.ref, who.digest, name, 1, "exact_match", "1", precision, value,
                               error, rows)  # fmt: skip
                store.add_score(new, x)

        own = {name: adapter(name, name) for name in NAMES}
        score(Parent("base", MARK), {"nlu": 5, "safety": 5})
        for name in NAMES:
            score(own[name], {name: 48})
        for v in range(40):
            merged = adapter("main", None, list(own.values()))
            score(merged, {"nlu": 47, "safety": 46 if v < 30 else 25})
        score(merged, {"nlu": 46}, "bf16-nf4")
        store.set_alias("main", "production", 20)
    return folder


@pytest.fixture
def audited(empty, stored):
    empty.folder = stored
    return empty


def test_every_task_is_told_with_what_matters_of_a_long_line(audited):
    told = audited("audit").stdout
    nlu, safety, rest = told.split("\n\n")[0:3]
    assert nlu.strip().startswith("nlu#1: exact_match, 50 rows, best nlu@1")
    assert "bf16-nf4" in nlu
    assert "main@40 to main@39: in bf16-nf4, main@39 in fp32" in nlu
    heading = safety.splitlines()[1]
    assert "change [95%]" in heading
    assert "to previous [95%]" in heading
    assert "to main@20 [95%]" in heading
    first = next(line for line in safety.splitlines() if line.startswith("main@31 "))
    assert "worse" in first
    assert "more scores; these" in safety
    assert "smallest drop that could have been shown with power 0.8 at p < 0.025" in safety
    assert rest.startswith("main: R, every version on every task")
    assert "1 real regression" not in rest
    assert "regression: safety#1: main@40 is at 0.5, 0.46 worse than safety@1" in told
    assert "2 real regressions" in told
    assert "corrected by Holm over the tasks of one version (nlu@1, safety@1, main@40)" in told


def test_all_shows_every_version_and_every_figure(audited):
    told = audited("audit", "--all").stdout
    assert all(f"main@{v} " in told for v in range(1, 41))
    assert "more scores" not in told


def test_filters_reach_the_audit(audited):
    told = audited.json("audit", "main@35", "--task", "safety", "--alias", "production")
    (task,) = told["tasks"]
    assert task["task"] == "safety"
    assert [e["subject"] for e in task["entries"]] == ["base", "main@20"]
    both = audited.json("audit", "--task", "safety,nlu", "--task", "safety")
    assert [t["task"] for t in both["tasks"]] == ["safety", "nlu"]
    past = audited.json("audit", "--until", "2000-01-31", "--against", "safety@1")
    assert [e["subject"] for e in past["tasks"][0]["entries"]] == ["base"]
    assert past["asked"]["until"].startswith("2000-01-31T23:59:59")
    assert past["against"] == ["safety@1"]
    now = audited.json("audit", "--since", "2000-01-31T10:00:00+00:00")
    assert len(now["tasks"][0]["entries"]) == 43
    assert now["asked"]["since"] == "2000-01-31T10:00:00+00:00"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--since", "yesterday"), 2),
        (("--until", "2026-13-01"), 2),
        (("--format", "junit", "--json"), 2),
        (("--against", "nothing"), 4),
        (("--against", "main@99"), 4),
        (("--task", "nlu,nothing"), 4),
    ],
)
def test_what_cannot_be_meant_is_refused(audited, words, code):
    audited.refuses("audit", *words, code=code)


def test_a_format_that_there_is_not_is_a_usage_error(audited):
    assert "junit" in audited("audit", "--format", "yaml", code=2).stderr


def test_json_holds_all_and_fits_the_schema_that_is_shipped(audited):
    found = audited.json("audit", "--max-drop", "0.9")
    schema = json.loads((files("lori_manager") / "schemas" / "audit.json").read_text("utf-8"))
    jsonschema.Draft202012Validator(schema).validate(found)
    assert [t["omitted"] for t in found["tasks"]] == [0, 0]
    assert len(found["tasks"][1]["entries"]) == 42


def test_json_csv_junit_and_markdown_end_with_3_beyond_max_drop_and_print_everything(audited):
    told = {
        name: audited("audit", "main", "--max-drop", "0.1", *words, code=3).stdout
        for name, words in {
            "json": ["--json"],
            **{name: ["--format", name] for name in ("csv", "junit", "markdown", "table")},
        }.items()
    }
    assert [f["kind"] for f in json.loads(told["json"])["findings"]] == ["drop"]
    rows = list(csv.DictReader(io.StringIO(told["csv"], newline="")))
    assert {r["task"] for r in rows} == {"nlu", "safety"}
    assert sum(r["parent_real"] == "true" and r["parent_worse"] == "true" for r in rows) == 10
    root = ElementTree.fromstring(told["junit"].encode())
    assert [c.get("name") for c in root.iter("testcase") if c.find("failure") is not None] == [
        "safety#1"
    ]
    assert told["markdown"].startswith("### lori audit of main\n")
    assert "**2 real regressions, 1 drop beyond 0.1.**" in told["markdown"]


def test_the_first_task_is_there_before_the_last_is_read(stored):
    """Whoever reads may have enough: what follows is then never looked at."""
    code = (
        "import lori_manager.auditing.run as run\n"
        "from lori_manager.workspace import Workspace\n"
        "asked = []\n"
        "with Workspace.open('.') as ws:\n"
        "    scores = ws.store.scores\n"
        "    ws.store.scores = lambda **k: asked.append(k['task']) or scores(**k)\n"
        "    first = next(ws.audit_run(most=24).tasks())\n"
        "assert (first.task, asked) == ('nlu', ['nlu']), asked\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=stored, check=True)


@pytest.mark.parametrize("words", [[], ["--json"], ["--format", "markdown"]])
def test_a_scored_history_is_audited_without_torch(stored, words):
    env = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lori_manager", "audit", *words],
        cwd=stored, capture_output=True, text=True, check=True, env=env,
    )  # fmt: skip
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "lori_manager.auditing.run" in loaded
    assert not {"torch", "transformers", "peft", "safetensors"} & loaded


def test_the_document_that_explains_the_json_names_its_version():
    text = (Path(__file__).parents[2] / "docs" / "json.md").read_text("utf-8")
    assert "`lori-audit`" in text
    assert "lori_manager/schemas/audit.json" in text
