"""Audits of small histories worked by hand."""

import json
import math
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from audit_histories import FakeStore, entry, of_task

from lori_manager.auditing import audit
from lori_manager.errors import InvalidInput, NotFound
from lori_manager.metrics.summary import summarize
from lori_manager.records import (
    Base,
    NewAdapter,
    NewScore,
    Parent,
    Split,
)
from lori_manager.refs import parse_adapter_ref
from lori_manager.store.store import Store

NAN = math.nan


def test_a_sequence_is_compared_stage_by_stage_with_its_parent_and_the_best(road):
    result = audit(road, "support")
    clinc = of_task(result, "clinc")
    assert [(e.subject, e.value) for e in clinc.entries] == [
        ("base", 0.0), ("support@1", 0.9), ("support@2", 0.4), ("support@3", 0.3),
    ]  # fmt: skip
    first, second, third = clinc.entries[1:]
    assert clinc.entries[0].parent is None
    assert clinc.entries[0].best is None
    assert (first.parent.against, first.parent.change) == ("base", pytest.approx(0.9))
    assert (first.parent.real, first.parent.worse) == (True, False)
    # 9 right before, 4 of them after: 5 lost, none gained, p = 2 / 2^5.
    assert (second.parent.against, second.parent.lost, second.parent.gained) == ("support@1", 5, 0)
    assert second.parent.change == pytest.approx(-0.5)
    assert second.parent.error == pytest.approx(math.sqrt((0.5 - 0.25) / 10))
    assert second.parent.p == pytest.approx(2 / 32)
    assert (second.parent.worse, second.parent.real) == (True, False)
    # Against its parent one row is nothing; against the best it is six, p = 2 / 2^6.
    assert (third.parent.against, third.parent.p) == ("support@2", 1.0)
    assert (third.best.against, third.best.p) == ("support@1", pytest.approx(2 / 64))
    # Beyond noise for itself alone, not among four tasks.
    assert (third.best.p_corrected, third.best.correction) == (4 * third.best.p, "bonferroni")
    assert (third.best.worse, third.best.real) == (True, False)
    alone = audit(road, "support", task="clinc")
    assert entry(alone, "clinc", "support@3").best.real
    assert clinc.best == "support@1"


def test_the_matrix_and_its_figures_of_a_sequence(road):
    (sequence,) = audit(road, "support@latest").sequences
    assert sequence.stages == ("support@1", "support@2", "support@3")
    assert sequence.tasks == ("clinc#1", "snips#1", "sst#1", "general#1")
    assert sequence.taught == 3
    assert sequence.R == ((0.9, 0.1, 0.4, 0.6), (0.4, 0.8, 0.5, 0.5), (0.3, 0.9, 0.9, 0.4))
    assert sequence.base == (0.0, 0.0, 0.5, 0.6)
    assert sequence.references == ("clinc@1", "snips@1", "sst@1")
    assert {f.symbol: f.value for f in sequence.figures} == pytest.approx(
        {
            "ACC": 0.7,
            "LA": (0.9 + 0.8 + 0.9) / 3,
            "BWT": (-0.6 + 0.1) / 2,
            "BWT_TRACE": (-0.6 + 0.1) / 3,
            "FWT": (0.1 + 0.0) / 2,
            "F": (0.6 - 0.1) / 2,
            "I": (0.1 + 0.0 + 0.0) / 3,
            "DELTA": -0.2,
        }
    )


def test_a_sequence_audited_at_an_earlier_stage_ends_there(road):
    result = audit(road, "support@2")
    (sequence,) = result.sequences
    assert sequence.stages == ("support@1", "support@2")
    # sst comes later: shown, but neither taught nor a suite outside the sequence.
    assert (sequence.tasks, sequence.taught) == (("clinc#1", "snips#1", "sst#1", "general#1"), 2)
    figures = {f.symbol: f for f in sequence.figures}
    assert figures["ACC"].value == pytest.approx((0.4 + 0.8) / 2)
    assert (figures["DELTA"].value, figures["DELTA"].denominator) == (pytest.approx(-0.1), 1)
    assert "support@3" not in [e.subject for t in result.tasks for e in t.entries]


def test_what_a_sequence_did_not_measure_is_nan_and_so_are_the_figures_that_need_it(road):
    road._scores = [s for s in road._scores if (s.subject, s.task) != ("support@1", "snips")]
    (sequence,) = audit(road, "support").sequences
    assert math.isnan(sequence.R[0][1])
    missing = {f.symbol for f in sequence.figures if math.isnan(f.value)}
    assert missing == {"FWT", "F"}


def test_a_merge_is_compared_with_the_member_of_each_task(road):
    result = audit(road, "main@1")
    against = {t.task: entry(result, t.task, "main@1").parent.against for t in result.tasks}
    assert against == {"clinc": "clinc@1", "snips": "snips@1", "sst": "sst@1", "general": "base"}
    clinc = entry(result, "clinc", "main@1").parent
    assert (clinc.change, clinc.lost, clinc.gained) == (pytest.approx(-0.4), 4, 0)
    assert [e.subject for e in of_task(result, "clinc").entries] == ["base", "clinc@1", "main@1"]
    assert result.sequences == ()


def test_a_merge_of_merges_is_compared_with_the_member_that_descends_from_the_task(road):
    road.add_task("math")
    road.right(road.add_adapter("math", "math"), "math", 7)
    again = road.add_adapter("next", parents=["main@1", "math@1"], origin="merged")
    road.right(again, "clinc", 5)
    road.right(again, "math", 7)
    result = audit(road, "next")
    assert entry(result, "clinc", again).parent.against == "main@1"
    assert entry(result, "math", again).parent.against == "math@1"


def test_of_two_members_of_one_task_the_better_one_is_compared_with():
    store = FakeStore()
    store.add_task("nlu")
    for line, n in (("weak", 5), ("strong", 9), ("other", 7)):
        store.right(store.add_adapter(line, "nlu"), "nlu", n)
    ref = store.add_adapter("m", parents=["weak@1", "strong@1", "other@1"], origin="merged")
    store.right(ref, "nlu", 6)
    assert entry(audit(store, "m"), "nlu", ref).parent.against == "strong@1"


def test_without_a_ref_every_subject_of_every_line_is_told_in_time_order(road):
    result = audit(road)
    assert [e.subject for e in of_task(result, "clinc").entries] == [
        "base", "support@1", "support@2", "support@3", "clinc@1", "main@1",
    ]  # fmt: skip
    # The best so far is over the whole scope.
    assert entry(result, "clinc", "clinc@1").best.against == "support@1"
    assert entry(result, "clinc", "main@1").best.against == "clinc@1"
    assert result.adapters == ("support@3", "clinc@1", "snips@1", "sst@1", "main@1")
    assert [s.line for s in result.sequences] == ["support"]


def test_base_is_a_ref_and_one_task_can_be_asked_for(road):
    result = audit(road, "base", task="sst", max_drop=0.0)
    (sst,) = result.tasks
    assert [e.subject for e in sst.entries] == ["base"]
    assert result.findings == ()
    assert audit(road, task="sst").sequences == ()


def test_a_drop_beyond_the_limit_is_found_on_the_latest_of_the_line(road):
    (finding,) = audit(road, "support", max_drop=0.3).findings
    assert (finding.kind, finding.subject) == ("drop", "support@3")
    assert finding.facts["task"] == "clinc"
    assert (finding.facts["best"], finding.facts["best_value"]) == ("support@1", 0.9)
    assert finding.facts["drop"] == pytest.approx(0.6)
    assert finding.message == (
        "clinc#1: support@3 is at 0.3, 0.6 worse than the best, support@1 at 0.9 "
        "(paired p = 0.031 on 10 rows; allowed 0.3)"
    )


def test_a_drop_of_exactly_the_limit_is_allowed(road):
    # .6 - .4 is 0.2 less a rounding error, .9 - .3 is 0.6 and more.
    assert [f.facts["task"] for f in audit(road, "support", max_drop=0.2).findings] == ["clinc"]
    assert audit(road, "support", max_drop=0.6).findings == ()
    assert len(audit(road, "support", max_drop=0.0).findings) == 2


def test_a_merge_drops_from_its_members_and_a_stage_from_what_came_before_it(road):
    (finding,) = audit(road, "main", max_drop=0.1).findings
    assert (finding.facts["best"], finding.facts["now"]) == ("clinc@1", "main@1")
    assert audit(road, "support@1", max_drop=0.1).findings == ()
    everywhere = audit(road, max_drop=0.15).findings
    assert [(f.facts["line"], f.facts["task"]) for f in everywhere] == [
        ("support", "clinc"), ("main", "clinc"), ("support", "general"),
    ]  # fmt: skip


def test_a_task_that_the_judged_adapter_was_not_scored_on_is_told(road):
    road.add_adapter("support", "sst", parents=["support@3"], sequence=True)
    result = audit(road, "support", max_drop=0.1)
    assert result.findings == ()
    assert result.notes == tuple(
        f"support@4 was never scored on {t}, so a drop there cannot be seen"
        for t in ("clinc", "snips", "sst", "general")
    )
    assert audit(road, "support").notes == ()


def test_a_score_without_a_measured_row_passes_no_limit_in_silence():
    store = FakeStore()
    store.add_task("nlu")
    one, two = store.add_adapter("nlu", "nlu"), store.add_adapter("nlu", "nlu")
    store.right(one, "nlu", 9)
    store.add_score(two, "nlu", [NAN] * 10)
    result = audit(store, "nlu", max_drop=0.1)
    assert result.findings == ()
    assert result.notes == ("nlu@2 was never scored on nlu, so a drop there cannot be seen",)
    assert of_task(result, "nlu").best == one


def test_the_matrix_takes_what_was_measured_here_before_what_was_imported(road):
    road.right("support@1", "clinc", 2, origin="elsewhere")
    assert audit(road, "support").sequences[0].R[0][0] == 0.9


def test_a_suite_stands_in_the_matrix_at_the_newest_revision_that_a_stage_was_scored_on(road):
    road.add_task("general")
    assert audit(road, "support").sequences[0].tasks[-1] == "general#1"
    road.right("support@3", "general", 5)
    sequence = audit(road, "support").sequences[0]
    assert sequence.tasks[-1] == "general#2"
    assert sequence.R[2][3] == 0.5
    assert math.isnan(sequence.R[1][3])


def test_revisions_stand_apart_and_are_never_compared():
    store = FakeStore()
    store.add_task("nlu")
    one = store.add_adapter("nlu", "nlu")
    store.right("base", "nlu", 1)
    store.right(one, "nlu", 9)
    store.add_task("nlu")  # new rows
    two = store.add_adapter("nlu", "nlu", parents=[one])
    store.right("base", "nlu", 2)
    store.right(two, "nlu", 5)
    result = audit(store, "nlu", max_drop=0.1)
    new, old = result.tasks
    assert (new.ref, new.latest, new.note) == ("nlu#2", True, "")
    assert (old.ref, old.latest) == ("nlu#1", False)
    assert old.note == "nlu#2 is the latest revision; scores on the two are not compared"
    assert [e.subject for e in new.entries] == ["base", two]
    assert [e.subject for e in old.entries] == ["base", one]
    missing = new.entries[1].parent
    assert (missing.against, missing.note) == (one, "nlu@1 was not scored on nlu#2")
    assert math.isnan(missing.change)
    assert not missing.real
    assert new.entries[1].best.against == "base"
    # .9 on the old rows and .5 on the new ones is no drop.
    assert result.findings == ()


def test_a_drop_is_judged_on_the_newest_revision_that_was_scored_and_told():
    store = FakeStore()
    store.add_task("nlu")
    one, two = store.add_adapter("nlu", "nlu"), store.add_adapter("nlu", "nlu")
    store.right(one, "nlu", 9)
    store.right(two, "nlu", 5)
    store.add_task("nlu")
    result = audit(store, "nlu", max_drop=0.1)
    assert [f.facts["revision"] for f in result.findings] == [1]
    assert result.notes == ("nlu@2 is judged on nlu#1, for want of a score on nlu#2",)


def test_versions_of_a_scorer_are_never_compared():
    store = FakeStore()
    store.add_task("nlu")
    ref = store.add_adapter("nlu", "nlu")
    store.right("base", "nlu", 3, scorer_version="0")
    store.right(ref, "nlu", 9)
    new, old = audit(store).tasks
    assert [e.subject for e in new.entries] == [ref]
    assert "base was not scored" in new.entries[0].parent.note
    assert "scored by exact_match version 0, now it is exact_match version 1" in old.note


def test_outcomes_measured_elsewhere_are_marked_and_compared_row_by_row():
    store = FakeStore()
    store.add_task("safety")
    ref = store.add_adapter("safety", "safety")
    store.right("base", "safety", 2)
    some = [1, 1, 0, 1, 1, NAN, NAN, NAN, NAN, NAN]
    store.add_score(ref, "safety", some, origin="vendor run 7", precision="")
    e = entry(audit(store), "safety", ref)
    assert (e.origin, e.imported, e.rows, e.value) == ("vendor run 7", True, 5, 0.8)
    # On the five common rows the base has 2 of 5, not 2 of 10.
    assert e.parent.change == pytest.approx(0.8 - 0.4)
    assert (e.parent.rows, e.parent.rows_only_before, e.parent.rows_only_after) == (5, 5, 0)
    assert e.parent.note == "vendor run 7, base measured"


def test_a_best_on_a_few_easy_rows_does_not_displace_a_full_one_and_hides_no_drop():
    store = FakeStore()
    store.add_task("safety")
    full, easy, now = (store.add_adapter("safety", "safety") for _ in range(3))
    store.right(full, "safety", 9)
    store.add_score(easy, "safety", [1, 1, 1] + [NAN] * 7, origin="elsewhere")
    store.right(now, "safety", 6)
    result = audit(store, "safety", max_drop=0.1)
    assert entry(result, "safety", now).best.against == full
    assert [f.facts["best"] for f in result.findings] == [full]


def test_a_drop_on_rows_that_were_both_measured_is_found_whatever_the_plain_values_say():
    store = FakeStore()
    store.add_task("safety")
    then, now = (store.add_adapter("safety", "safety") for _ in range(2))
    store.add_score(then, "safety", [NAN] * 5 + [1, 1, 0, 0, 0])  # .4 on the hard half
    store.add_score(now, "safety", [1] * 5 + [0] * 5)  # .5 of all, but none of those
    (finding,) = audit(store, "safety", max_drop=0.1).findings
    assert finding.facts["drop"] == pytest.approx(0.4)
    assert finding.facts["rows"] == 5


def test_no_row_in_common_is_told_and_judged_by_the_plain_values():
    store = FakeStore()
    store.add_task("safety")
    then, now = (store.add_adapter("safety", "safety") for _ in range(2))
    store.add_score(then, "safety", [1] * 5 + [NAN] * 5)
    store.add_score(now, "safety", [NAN] * 5 + [0] * 5)
    result = audit(store, "safety", max_drop=0.1)
    best = entry(result, "safety", now).best
    assert best.note == "no row was measured in both"
    assert math.isnan(best.p)
    assert not best.real
    assert "no row was measured in both" in result.findings[0].message


def test_perplexity_is_compared_per_token_and_lower_is_better():
    store = FakeStore()
    store.add_task("wiki", rows=3, scorer="perplexity")
    tokens = np.array([1.0, 2.0, 7.0], dtype=np.float32)
    lower = {"facts": {"higher_is_better": False}}
    refs = [store.add_adapter("wiki", "wiki")]
    refs.append(store.add_adapter("wiki", "wiki", parents=refs))
    nll = [[3.0, 3.0, 3.0], [2.0, 2.0, 2.0], [2.0, 2.0, 3.0]]
    for subject, row in zip(["base", *refs], nll, strict=True):
        store.add_score(subject, "wiki", row, tokens, **lower)
    result = audit(store, "wiki", max_drop=0.5)
    wiki = of_task(result, "wiki")
    assert wiki.higher_is_better is False
    assert [e.value for e in wiki.entries] == pytest.approx([3.0, 2.0, 2.7])
    assert [e.parent.worse for e in wiki.entries[1:]] == [False, True]
    assert wiki.entries[2].parent.change == pytest.approx(0.7)
    assert wiki.entries[2].parent.gained is None
    assert wiki.best == refs[0]
    assert [f.facts["drop"] for f in result.findings] == [pytest.approx(0.7)]


def test_rows_that_are_weighted_differently_are_not_compared():
    store = FakeStore()
    store.add_task("wiki", rows=2, scorer="perplexity")
    ref = store.add_adapter("wiki", "wiki")
    store.add_score("base", "wiki", [3.0, 2.0], np.array([1.0, 5.0]))
    store.add_score(ref, "wiki", [2.0, 1.0], np.array([1.0, 6.0]))
    parent = entry(audit(store), "wiki", ref).parent
    assert "weighted differently" in parent.note
    assert math.isnan(parent.change)


def test_a_sequence_of_perplexities_keeps_its_signs_and_a_mixed_one_has_no_figures():
    store = FakeStore()
    lower = {"facts": {"higher_is_better": False}}
    for name in ("wiki", "code", "nlu"):
        store.add_task(name, rows=1)
    first = store.add_adapter("s", "wiki", sequence=True)
    second = store.add_adapter("s", "code", parents=[first], sequence=True)
    for subject, wiki, code in (("base", 4.0, 4.0), (first, 2.0, 3.0), (second, 3.0, 1.0)):
        store.add_score(subject, "wiki", [wiki], **lower)
        store.add_score(subject, "code", [code], **lower)
    (sequence,) = audit(store, "s").sequences
    figures = {f.symbol: f.value for f in sequence.figures}
    assert (figures["ACC"], figures["BWT"], figures["F"], figures["FWT"]) == (2.0, -1.0, 1.0, 1.0)
    third = store.add_adapter("s", "nlu", parents=[second], sequence=True)
    store.add_score(third, "nlu", [1.0])
    (sequence,) = audit(store, "s").sequences
    assert sequence.figures == ()
    assert "point in different ways" in sequence.note
    assert sequence.R[2][2] == 1.0


def test_a_subject_scored_twice_is_compared_like_with_like_and_never_with_itself():
    store = FakeStore()
    store.add_task("nlu")
    one = store.add_adapter("nlu", "nlu")
    two = store.add_adapter("nlu", "nlu", parents=[one])
    for ref, n in ((one, 6), (two, 8)):
        store.right(ref, "nlu", n)
        store.right(ref, "nlu", n - 1, precision="bf16")
    entries = of_task(audit(store), "nlu").entries
    assert [(e.subject, e.precision) for e in entries] == [
        (one, "fp32"), (one, "bf16"), (two, "fp32"), (two, "bf16"),
    ]  # fmt: skip
    assert [e.best for e in entries[:2]] == [None, None]
    assert [e.parent.change for e in entries[2:]] == pytest.approx([0.2, 0.2])
    assert [e.parent.note for e in entries[2:]] == ["", ""]
    assert [(e.best.precision, e.best.change) for e in entries[2:]] == [
        ("fp32", pytest.approx(0.2)), ("bf16", pytest.approx(0.2)),
    ]  # fmt: skip
    assert of_task(audit(store), "nlu").precisions == ("bf16", "fp32")


def test_scores_at_other_precisions_are_compared_for_want_of_better_and_never_in_silence():
    store = FakeStore()
    store.add_task("nlu")
    one = store.add_adapter("nlu", "nlu")
    two = store.add_adapter("nlu", "nlu", parents=[one])
    store.right(one, "nlu", 6)
    store.right(two, "nlu", 7, precision="bf16-nf4")
    e = entry(audit(store), "nlu", two)
    assert (e.precision, e.parent.precision) == ("bf16-nf4", "fp32")
    assert e.parent.note == e.best.note == "in bf16-nf4, nlu@1 in fp32"


def test_scores_on_rows_cut_in_another_way_are_compared_for_want_of_better_and_that_is_told():
    store = FakeStore()
    store.add_task("nlu")
    one = store.add_adapter("nlu", "nlu")
    two = store.add_adapter("nlu", "nlu", parents=[one])
    store.right(one, "nlu", 6, encoding="old")
    store.right(two, "nlu", 7, encoding="new")
    parent = entry(audit(store), "nlu", two).parent
    assert parent.note == "nlu@1's rows were cut or made into tokens in another way"
    store.right(one, "nlu", 5, encoding="new")
    store.right(one, "nlu", 6, encoding="")
    assert entry(audit(store), "nlu", two).parent.change == pytest.approx(0.2)


def test_a_drop_is_measured_at_the_same_precision_where_there_is_one():
    store = FakeStore()
    store.add_task("nlu")
    one, two = (store.add_adapter("nlu", "nlu") for _ in range(2))
    store.right(one, "nlu", 9)
    store.right(one, "nlu", 6, precision="fp8")
    store.right(two, "nlu", 6, precision="fp8")
    assert audit(store, "nlu", max_drop=0.1).findings == ()
    store.right(two, "nlu", 6)
    (finding,) = audit(store, "nlu", max_drop=0.1).findings
    assert finding.facts["drop"] == pytest.approx(0.3)


def test_adapters_of_equal_weights_share_a_score_and_keep_their_own_names():
    store = FakeStore()
    store.add_task("nlu")
    one, same = store.add_adapter("nlu", "nlu"), store.add_adapter("copy", "nlu")
    merged = store.add_adapter("m", parents=[same], origin="merged")
    store.right(one, "nlu", 9)
    store._scores.append(replace(store._scores[0], subject=same))
    store.right(merged, "nlu", 8)
    result = audit(store)
    assert entry(result, "nlu", merged).best.against == one
    assert entry(result, "nlu", merged).parent.against == same
    best = entry(result, "nlu", same).best
    assert (best.against, best.change, best.p) == (one, 0.0, 1.0)


def test_a_task_that_nothing_was_scored_on_is_told(road):
    road.add_task("fresh")
    fresh = of_task(audit(road), "fresh")
    assert (fresh.entries, fresh.best) == ((), None)
    assert fresh.note == "nothing in scope was scored on it"


def test_a_tasks_own_adapter_is_its_champion_else_the_latest_trained_on_it_alone(road):
    again = road.add_adapter("clinc", "clinc", parents=["clinc@1"])
    road.add_adapter("clinc", "snips", parents=[again])
    road.right(again, "clinc", 9)
    assert audit(road, "support").sequences[0].references[0] == "clinc@2"
    road._aliases["clinc"] = {"champion": 1}
    assert audit(road, "support").sequences[0].references[0] == "clinc@1"


def test_an_alias_is_a_ref(road):
    road._aliases["support"] = {"production": 2}
    result = audit(road, "support@production")
    assert (result.ref, result.adapters) == ("support@production", ("support@2",))


def test_json_is_plain_and_has_no_nan(road):
    road._scores = [s for s in road._scores if (s.subject, s.task) != ("support@1", "snips")]
    text = json.dumps(audit(road, max_drop=0.1).to_json(), allow_nan=False)
    back = json.loads(text)
    assert back["sequences"][0]["R"][0][1] is None
    assert back["tasks"][0]["entries"][0]["parent"] is None
    assert back["tasks"][0]["entries"][1]["created_at"].startswith("2025-01-01T")
    assert back["findings"][0]["kind"] == "drop"


@pytest.mark.parametrize("bad", [-0.1, NAN, math.inf])
def test_a_limit_that_is_none_is_refused(road, bad):
    with pytest.raises(InvalidInput, match="`max_drop` must be a number of at least 0"):
        audit(road, max_drop=bad)


def test_what_does_not_exist_is_not_found(road):
    for call in ({"ref": "nobody"}, {"ref": "support@9"}, {"task": "nothing"}):
        with pytest.raises(NotFound):
            audit(road, **call)
    with pytest.raises(InvalidInput):
        audit(road, "support@")


def test_outcomes_are_read_in_bulk_and_only_in_scope(road):
    audit(road, "main", max_drop=0.0)
    # Once for the task's table, and the judged one's with its counterparts for Holm.
    assert all(road.loaded.count(key) <= 2 for key in road.loaded)
    assert not any(subject.startswith("support") for subject, *_ in road.loaded)
    assert road.readings <= 5


def test_a_long_history_is_read_once_and_all_of_it_told():
    store = FakeStore()
    random = np.random.default_rng(0)
    store.add_task("nlu", rows=200)
    previous = ()
    for _ in range(300):
        previous = (store.add_adapter("nlu", "nlu", parents=previous),)
        store.add_score(previous[0], "nlu", (random.random(200) < 0.7).astype(np.float32))
    result = audit(store, "nlu", max_drop=0.5)
    assert len(store.loaded) == 300
    assert store.readings <= 3
    assert len(result.tasks[0].entries) == 300
    assert result.tasks[0].omitted == 0


def test_the_fake_store_reads_refs_as_the_real_one_does(road):
    assert road.adapter(parse_adapter_ref("support")).ref == "support@3"


def test_the_real_store_gives_what_an_audit_reads(tmp_path):
    store = Store.create(tmp_path / ".lori")
    store.set_base(Base("f" * 64, "here", None, "here", "llama", datetime.now(UTC)))
    digest = store.objects.put(b"{}\n" * 4)
    split = {"eval": Split(digest, 4), "train": Split(digest, 4)}
    store.add_task(
        "wiki", scorer="perplexity", scorer_version="1", description="", splits=split, options={},
    )  # fmt: skip

    def adapter(line, blob, task, parents=(), origin="trained"):
        new = NewAdapter(
            line, origin, task, 1 if task else None, None,
            [Parent(p.ref, p.digest) for p in parents], "lori-s", 8, None, "f" * 64,
        )  # fmt: skip
        return store.add_adapter(new, blob)

    one = adapter("wiki", b"one", "wiki")
    two = adapter("wiki", b"two", "wiki", [one])
    merged = adapter("m", b"merged", None, [one], "merged")
    tokens = np.array([1, 1, 1, 7], dtype=np.float32)
    subjects = [("base", "f" * 64), *((a.ref, a.digest) for a in (one, two, merged))]
    for i, (subject, of) in enumerate(subjects):
        outcomes = np.array([3 - i, 3, 3, NAN if subject == merged.ref else 3], dtype=np.float32)
        value, error, rows = summarize(outcomes, tokens)
        facts = {"higher_is_better": False}
        store.add_score(
            NewScore(
                subject, of, "wiki", 1, "perplexity", "1", "fp32", value, error, rows, facts=facts
            ),
            outcomes,
            tokens,
        )
    wiki = of_task(audit(store, max_drop=0.1), "wiki")
    assert [e.subject for e in wiki.entries] == ["base", "wiki@1", "wiki@2", "m@1"]
    assert [e.parent.against for e in wiki.entries[1:]] == ["base", "wiki@1", "wiki@1"]
    assert wiki.entries[2].parent.change == pytest.approx(-0.1)
    assert (wiki.entries[3].parent.rows, wiki.entries[3].parent.rows_only_before) == (3, 1)
    assert wiki.entries[3].parent.change == pytest.approx(-2 / 3)
    assert audit(store, "m", max_drop=0.1).findings == ()
