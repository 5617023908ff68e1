"""`lori report`, on the tiny model's workspace."""

import json

import pytest


def test_report_writes_one_page_and_says_what_is_in_it(trained, tmp_path):
    told = trained("report", "-o", tmp_path / "page.html").stdout.splitlines()
    assert told[0].startswith(f"{tmp_path / 'page.html'}: ")
    assert told[1].startswith(("main@1 is really ", "No real difference between main@1 and "))
    text = (tmp_path / "page.html").read_text("utf-8")
    assert text.startswith("<!doctype html>")
    assert "colour#1" in text


def test_report_goes_to_report_html_by_default(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained("report", "main@1", "--task", "colour")
    text = (tmp_path / "report.html").read_text("utf-8")
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert [task["ref"] for task in data["tasks"]] == ["colour#1"]


def test_json_is_the_data_and_writes_nothing_unless_told(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = trained.json("report", "--rows", 1)
    assert found["focus"] == "main@1"
    assert [task["ref"] for task in found["tasks"]] == ["colour#1", "shape#1"]
    assert all(
        len([r for r in c["rows"] if r["improved"] == side]) <= 1
        for c in found["changed"]
        for side in (True, False)
    )
    assert len(found["overlap"]["masks"]) == 2
    assert not (tmp_path / "report.html").exists()
    both = trained("report", "--json", "-o", "x.html")
    json.loads(both.stdout, parse_constant=pytest.fail)
    assert (tmp_path / "x.html").exists()


def test_report_reads_and_never_writes_the_store(trained, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in (trained.folder / ".lori" / "objects").rglob("*")}
    trained("report", "-o", tmp_path / "page.html")
    after = {p: p.stat().st_mtime_ns for p in (trained.folder / ".lori" / "objects").rglob("*")}
    assert after == before


def test_report_refuses_what_is_not_there(trained, tmp_path):
    assert "no version 9" in trained.refuses("report", "main@9", "-o", tmp_path / "x.html", code=4)
    assert "none" in trained.refuses("report", "--task", "none", "-o", tmp_path / "x.html", code=4)
    assert "gone" in trained.refuses("report", "-o", tmp_path / "gone" / "x.html", code=9)
    assert not (tmp_path / "x.html").exists()
