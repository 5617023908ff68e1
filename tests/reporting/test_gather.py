"""What the report says of histories worked by hand."""

import json

import numpy as np
import pytest
from report_workspaces import FINGERPRINT, History, two_tasks_and_a_merge

from lori_manager.cli.output import plain
from lori_manager.errors import NotFound
from lori_manager.records import NewAdapter
from lori_manager.reporting.changed_rows import LONGEST, shortened
from lori_manager.reporting.gather import MOST_TEXT


@pytest.fixture
def merged(tmp_path):
    return two_tasks_and_a_merge(tmp_path / "ws").opened()


def unscored(line):
    return NewAdapter(line, "trained", None, None, None, (), "lori-s", 8, None, FINGERPRINT)


def told(report, kind):
    return [s.text for s in report.headline.statements if s.kind == kind]


def test_every_version_and_score_is_there_in_time_order(merged):
    report = merged.report()
    assert [v.ref for v in report.versions] == ["base", "nlu@1", "code@1", "main@1", "main@2"]
    nlu = report.tasks[0]
    assert [(c.version, c.value) for c in nlu.cells] == [
        ("base", 0.1), ("nlu@1", 0.9), ("main@1", 0.85), ("main@2", 0.6),
    ]  # fmt: skip
    assert report.newest == report.focus == "main@2"
    assert report.version("main@1").aliases == ("production",)
    assert report.base == "tiny"  # not where it lies


def test_a_merge_is_compared_with_each_tasks_own_adapter(merged):
    change = merged.report().tasks[0].cell("main@2").parent
    assert (change.against, change.lost, change.gained, change.verdict) == ("nlu@1", 30, 0, "worse")
    assert change.change == pytest.approx(-0.3)
    assert change.low < -0.3 < change.high < 0
    assert merged.report().tasks[1].cell("main@2").parent.verdict == ""


def test_the_title_is_about_what_is_in_use(merged):
    report = merged.report()
    assert report.headline.title == (
        "main@2 is really worse than production (main@1) on 1 of 2 tasks, better on 1"
    )
    assert told(report, "in use")[0].startswith("main@production means main@1 since ")
    assert "its line is 1 version further" in told(report, "in use")[0]
    assert any("nlu 0.900 to 0.600 (−0.300" in text for text in told(report, "worse"))
    assert any("test set allows a drop of up to" in text for text in told(report, "open"))
    assert any("Read the rows that were lost on nlu" in text for text in told(report, "next"))


def test_without_an_alias_the_title_is_about_what_it_was_made_from(merged):
    merged.store.remove_alias("main", "production")
    report = merged.report()
    assert (
        report.headline.title == "main@2 is really worse than what it was made from on 1 of 2 tasks"
    )
    assert "No alias" in told(report, "in use")[0]


def test_an_alias_that_moved_here_is_compared_with_what_it_meant_before(merged):
    merged.store.set_alias("main", "production", 2)
    report = merged.report()
    assert {c.pair for c in report.changed} == {"parent", "production before"}
    assert report.headline.title.startswith(
        "main@2 is really worse than what production meant before (main@1)"
    )
    back = [s.command for s in report.headline.statements if s.command]
    assert "lori rollback main@production" in back


def test_no_loss_suggests_to_move_the_alias_and_never_says_that_nothing_changed(tmp_path):
    history = History(tmp_path).task("nlu", 100)
    for rows in (80, 81):
        history.right(history.adapter("main"), "nlu", rows)
    history.store.set_alias("main", "production", 1)
    report = history.opened().report()
    assert report.headline.title == (
        "No real difference between main@2 and production (main@1) is shown on 1 task"
    )
    assert "lori promote main@2 production" in [s.command for s in report.headline.statements]
    assert "drops of up to 0.0" in told(report, "open")[0]


def test_twenty_equal_tasks_with_one_small_p_are_not_really_worse(tmp_path):
    history = History(tmp_path)
    for i in range(20):
        history.task(f"t{i}", 100)
    before = history.adapter("main")
    for i in range(20):
        history.right(before, f"t{i}", 50)
    after = history.adapter("main", before)
    for i in range(20):
        history.right(after, f"t{i}", 44 if i == 0 else 50)  # 6 lost of 6: p = .03
    report = history.opened().report()
    assert report.tasks[0].cell(after).parent.p == pytest.approx(0.03125)
    assert report.tasks[0].cell(after).parent.verdict == ""
    alone = history.opened().report(tasks=["t0"])
    assert alone.tasks[0].cell(after).parent.verdict == "worse"


def test_the_rows_that_changed_come_with_their_text_and_answers(merged):
    asked = []

    def answers(row):
        asked.append(row)
        return ("yes", "no") if row.index % 2 else None

    report = merged.report(rows=3, answers=answers)
    nlu = next(c for c in report.changed if c.task == "nlu#1" and c.pair == "parent")
    assert (nlu.before, nlu.after, nlu.worsened, nlu.improved) == ("nlu@1", "main@2", 30, 0)
    assert [(r.index, r.improved) for r in nlu.rows] == [(60, False), (61, False), (62, False)]
    row = nlu.rows[1]
    assert (row.prompt, row.expected) == ("nlu question 61", " answer 61")
    assert (row.answer_before, row.answer_after) == ("yes", "no")
    assert nlu.rows[0].answer_before is None
    assert ("nlu#1", 61, "nlu@1", "main@2") in [(a.task, a.index, a.before, a.after) for a in asked]


def test_scores_where_less_is_better_turn_round_what_worse_means(tmp_path):
    rng = np.random.default_rng(0)
    history = History(tmp_path).task("text", 50, scorer="perplexity")
    first = rng.random(50) + 2
    lower = {"facts": {"higher_is_better": False}}
    weights = rng.integers(1, 9, 50)
    history.score(history.adapter("main"), "text", first, weights, **lower)
    second = history.adapter("main", "main@1")
    history.score(second, "text", first + 0.2, weights, **lower)
    report = history.opened().report()
    cell = report.tasks[0].cell(second)
    assert report.tasks[0].higher_is_better is False
    assert cell.parent.note or cell.parent.verdict == "worse"
    worst = report.changed[0]
    assert worst.worsened == 50
    assert not any(row.improved for row in worst.rows)
    assert worst.change.lost is None


def test_rows_scored_on_one_side_alone_are_told(tmp_path):
    history = History(tmp_path).task("nlu", 10)
    history.score(history.adapter("main"), "nlu", [1] * 10)
    history.score(history.adapter("main", "main@1"), "nlu", [1] * 4 + [float("nan")] * 6)
    change = history.opened().report().tasks[0].cell("main@2").parent
    assert (change.rows, change.rows_only_before) == (4, 6)


def test_the_newest_measured_score_of_a_version_stands(tmp_path):
    history = History(tmp_path).task("nlu", 10)
    ref = history.adapter("main")
    history.right(ref, "nlu", 5, 10)
    history.score(ref, "nlu", [1] * 7 + [0] * 3, precision="bf16")
    history.score(ref, "nlu", [1] * 10, precision="", origin="somewhere else")
    cell = history.opened().report().tasks[0].cell(ref)
    assert (cell.value, cell.precision, cell.others) == (pytest.approx(0.7), "bf16", 2)


def test_a_ref_narrows_the_report_to_its_lines_history(merged):
    report = merged.report("main@1")
    assert (report.newest, report.focus, report.scope) == ("main@1", "main@1", "main@1")
    assert [v.ref for v in report.versions] == ["base", "nlu@1", "code@1", "main@1"]
    assert merged.report("nlu").focus == "nlu@1"
    assert [v.ref for v in merged.report("nlu").versions] == ["base", "nlu@1"]
    assert merged.report("base").headline.title == "The base, before any adapter"
    with pytest.raises(NotFound):
        merged.report("main@9")
    with pytest.raises(NotFound):
        merged.report(tasks=["none"])


def test_tasks_narrow_it_too(merged):
    report = merged.report(tasks=["code"])
    assert [task.name for task in report.tasks] == ["code"]
    assert report.sequences == ()


def test_a_version_without_scores_is_told_and_the_one_before_it_reported(merged):
    merged.store.add_adapter(unscored("main"), b"new")
    report = merged.report()
    assert (report.newest, report.focus) == ("main@3", "main@2")
    assert any("main@3 is newer" in text for text in told(report, "open"))
    assert "lori score main@3" in [s.command for s in report.headline.statements]
    assert merged.report("main@3").headline.title == "main@3 was not scored on any task"


def test_tasks_without_a_score_of_the_newest_version_are_told(tmp_path):
    history = History(tmp_path).task("nlu", 10).task("code", 10)
    history.right(history.adapter("main"), "nlu", 5, 10)
    statements = history.opened().report().headline.statements
    assert "lori score main@1 --tasks code" in [s.command for s in statements]


def test_a_loss_that_an_earlier_version_is_guilty_of_is_told_with_its_version(tmp_path):
    history = History(tmp_path).task("nlu", 200)
    ref = None
    for rows in (180, 100, 101, 100):
        ref = history.adapter("main", *([ref] if ref else []))
        history.right(ref, "nlu", rows, 200)
    report = history.opened().report()
    assert told(report, "worse") == []
    assert told(report, "lost before") == [
        "Not this change's doing, but really below the best: "
        "nlu −0.400 against main@1, since main@2."
    ]


def test_empty_workspaces_have_a_report(tmp_path):
    history = History(tmp_path)
    assert history.opened().report().headline.title == "Nothing is trained yet"
    history.task("nlu", 10)
    report = history.opened().report()
    assert [s.command for s in report.headline.statements] == ["lori train nlu"]
    history.adapter("nlu")
    assert history.opened().report().headline.title == "nlu@1 was not scored on any task"


def test_masks_overlap_as_the_engine_says(tmp_path):
    import torch

    from lori_manager.engine.codec import encode_mask
    from lori_manager.engine.mask import overlap

    history = History(tmp_path)
    generator = torch.Generator().manual_seed(0)
    masks = []
    for name, share in (("a", 0.3), ("b", 0.1), ("c", 0.5)):
        history.task(name, 2)
        mask = {m: torch.rand(13, 5, generator=generator) < share for m in ("x", "y")}
        masks.append(mask)
        _add_mask(history.store, name, encode_mask(mask, {}), mask)
    found = history.opened().report().overlap
    assert [m.ref for m in found.masks] == ["a%1", "b%1", "c%1"]
    for i in range(3):
        for j in range(3):
            if i != j:
                assert found.shares[i][j] == pytest.approx(overlap(masks[i], masks[j]))
    odd = {"x": torch.ones(2, 2, dtype=torch.bool)}
    history.task("d", 2)
    _add_mask(history.store, "d", encode_mask(odd, {}), odd)
    assert history.opened().report().overlap.shares[3][:3] == (None, None, None)


def _add_mask(store, task, blob, mask):
    store.add_mask(
        task=store.task(task), blob=blob, projection="a" * 64, sparsity=0.5, scope="model",
        kept=sum(int(m.sum()) for m in mask.values()), total=sum(m.numel() for m in mask.values()),
        config={},
    )  # fmt: skip


def test_no_masks_no_torch(tmp_path):
    import subprocess
    import sys

    two_tasks_and_a_merge(tmp_path / "ws")
    code = (
        "import sys; from lori_manager.workspace import Workspace\n"
        f"assert Workspace.open({str(tmp_path / 'ws')!r}).report().overlap is None\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_long_texts_lose_their_middle_and_say_so():
    text = "".join(chr(97 + i % 26) for i in range(5000))
    cut = shortened(text)
    assert len(cut) < LONGEST + 60
    assert cut.startswith(text[:300])
    assert cut.endswith(text[-200:])
    assert "[... 4,400 characters left out ...]" in cut
    assert shortened("short") == "short"


def test_the_text_of_rows_is_limited_in_all(tmp_path, monkeypatch):
    monkeypatch.setattr("lori_manager.reporting.gather.MOST_TEXT", 1500)
    report = two_tasks_and_a_merge(tmp_path / "ws").opened().report()
    assert MOST_TEXT > 1500
    assert 0 < sum(len(c.rows) for c in report.changed) < 15
    assert all(c.worsened + c.improved for c in report.changed if c.rows)


def test_all_of_it_is_plain_json(merged):
    document = json.loads(json.dumps(plain(merged.report()), allow_nan=False))
    assert document["headline"]["title"]
    assert document["tasks"][0]["cells"][-1]["parent"]["lost"] == 30
