"""Every version against the one before it and against what stands under an alias."""

import pytest
from audit_histories import FakeStore, entry, of_task

from lori_manager.auditing import audit
from lori_manager.errors import InvalidInput, NotFound


@pytest.fixture
def merges():
    """Three merges on a line: of a and b, of all three, and with other weights."""
    store = FakeStore()
    for name in "abc":
        store.add_task(name, rows=40)
        store.right(store.add_adapter(name, name), name, 36, of=40)
        store.right("base", name, 4, of=40)
    for members, right in (
        (("a@1", "b@1"), {"a": 34, "b": 33, "c": 5}),
        (("a@1", "b@1", "c@1"), {"a": 33, "b": 20, "c": 35}),
        (("a@1", "b@1", "c@1"), {"a": 34, "b": 21, "c": 34}),
    ):
        ref = store.add_adapter("main", parents=members, origin="merged")
        for name, n in right.items():
            store.right(ref, name, n, of=40)
    return store


def test_a_merge_is_held_against_its_members_and_the_version_before_it(merges):
    result = audit(merges, "main")
    second = entry(result, "b", "main@2")
    assert (second.parent.against, second.parent.lost) == ("b@1", 16)
    assert (second.previous.against, second.previous.lost) == ("main@1", 13)
    assert second.previous.real
    assert second.previous.worse
    assert entry(result, "b", "main@1").previous is None
    third = entry(result, "b", "main@3")
    assert (third.previous.against, third.previous.gained) == ("main@2", 1)


def test_a_version_continued_from_the_one_before_it_is_compared_once(road):
    assert entry(audit(road), "clinc", "support@2").previous is None
    again = road.add_adapter("clinc", "clinc")  # from the base, a second time
    road.right(again, "clinc", 8)
    told = entry(audit(road), "clinc", again)
    assert (told.parent.against, told.previous.against) == ("base", "clinc@1")


def test_only_the_judged_versions_regressions_are_findings(merges):
    result = audit(merges, "main")
    assert [(f.facts["task"], f.facts["kind"], f.facts["against"]) for f in result.regressions] == [
        ("b", "parent", "b@1")
    ]
    assert [f.subject for f in audit(merges, "main@2").regressions] == ["main@2", "main@2"]
    assert audit(merges, "main@2").regressions[1].message == (
        "b#1: main@2 is at 0.5, 0.325 worse than main@1 (95% from -0.4924 to -0.1871; "
        "p = 0.00024, 0.00049 by Holm over 3; 40 rows)"
    )


def test_production_comes_before_champion_and_stands_for_its_own_line(merges):
    assert audit(merges).against == ()
    assert entry(audit(merges), "b", "main@3").against is None
    merges.alias("main@2", "champion")
    assert entry(audit(merges), "b", "main@3").against.against == "main@2"
    merges.alias("main@1", "production")
    result = audit(merges)
    assert result.against == ("main@1",)
    told = {e.subject: e.against for e in of_task(result, "b").entries}
    assert (told["base"], told["b@1"], told["main@1"]) == (None, None, None)
    assert told["main@2"].real
    assert (told["main@3"].against, told["main@3"].lost) == ("main@1", 12)
    assert {f.facts["kind"] for f in result.regressions} == {"parent", "against"}


def test_a_ref_is_for_all_and_an_alias_for_each_line_that_has_it(merges):
    fixed = {e.subject: e.against for e in of_task(audit(merges, against="main@2"), "b").entries}
    assert fixed["b@1"].against == "main@2"
    assert fixed["base"] is None
    assert fixed["main@2"] is None
    based = audit(merges, against="base")
    assert entry(based, "b", "main@3").against.change == pytest.approx(17 / 40)
    merges.alias("b@1", "good")
    merges.alias("main@1", "good")
    good = audit(merges, against="good")
    assert good.against == ("b@1", "main@1")
    assert entry(good, "b", "main@3").against.against == "main@1"
    assert audit(merges, against="main@good").against == ("main@1",)


def test_what_it_is_held_against_may_lie_outside_the_scope_or_be_unscored(merges):
    merges.alias("main@3", "production")
    told = entry(audit(merges, "main@1"), "b", "main@1")
    assert (told.against.against, told.against.gained) == ("main@3", 12)
    merges._scores = [s for s in merges._scores if (s.subject, s.task) != ("main@3", "b")]
    told = entry(audit(merges, "main@1"), "b", "main@1")
    assert told.against.note == "main@3 was not scored on b#1"


def test_an_alias_or_a_ref_that_is_none_is_refused(merges):
    with pytest.raises(NotFound, match="no line has the alias 'release': there are no aliases"):
        audit(merges, against="release")
    merges.alias("main@1", "production")
    with pytest.raises(NotFound, match="there are production"):
        audit(merges, against="release")
    with pytest.raises(NotFound):
        audit(merges, against="main@9")
    with pytest.raises(InvalidInput):
        audit(merges, against="no alias")


def test_the_matrix_of_a_line_of_merges(merges):
    (found,) = audit(merges, "main").sequences
    assert (found.kind, found.line) == ("merges", "main")
    assert found.stages == ("main@1", "main@2", "main@3")
    assert found.tasks == ("a#1", "b#1", "c#1")
    assert (found.taught, found.introduced, found.outside) == (3, (0, 0, 1), ())
    assert found.R[1] == (33 / 40, 20 / 40, 35 / 40)
    assert found.references == ("a@1", "b@1", "c@1")
    figures = {f.symbol: f.value for f in found.figures}
    assert figures["BWT"] == pytest.approx((0 - 12 - 1) / 40 / 3)
    assert figures["FWT"] == pytest.approx((5 - 4) / 40)
    assert figures["I"] == pytest.approx((2 + 3 + 1) / 40 / 3)


def test_a_task_that_was_dropped_and_one_that_was_never_held_are_only_scored(merges):
    merges.add_task("general", rows=40)
    ref = merges.add_adapter("main", parents=["a@1", "c@1"], origin="merged")
    for name, n in (("a", 34), ("b", 6), ("c", 35), ("general", 10)):
        merges.right(ref, name, n, of=40)
    merges.right("base", "general", 12, of=40)
    (found,) = audit(merges, "main").sequences
    assert found.tasks == ("a#1", "c#1", "b#1", "general#1")
    assert (found.taught, found.outside) == (2, ("b#1", "general#1"))
    delta = next(f for f in found.figures if f.symbol == "DELTA")
    assert delta.value == pytest.approx((2 - 2) / 40 / 2)


def test_a_single_merge_has_no_matrix_and_merges_of_merges_keep_their_order(merges):
    assert audit(merges, "main@1").sequences == ()
    merges.add_adapter("x", parents=["c@1"], origin="merged")
    ref = merges.add_adapter("x", parents=["x@1", "main@1"], origin="merged")
    for name in "abc":
        merges.right(ref, name, 30, of=40)
    (found,) = audit(merges, "x").sequences
    assert found.tasks == ("c#1", "a#1", "b#1")
    assert found.introduced == (0, 1, 1)


def test_a_version_before_that_is_a_member_too_is_no_second_comparison(merges):
    ref = merges.add_adapter("main", parents=["main@3", "c@1"], origin="merged")
    for name, n in (("a", 20), ("b", 8), ("c", 20)):
        merges.right(ref, name, n, of=40)
    result = audit(merges, "main")
    assert [entry(result, n, ref).previous for n in "ab"] == [None, None]
    # Only c has another member, so only c is held against main@3 as what was before.
    c = entry(result, "c", ref)
    assert (c.parent.against, c.previous.against) == ("c@1", "main@3")
    assert (c.parent.family, c.previous.family) == (3, 1)


def test_one_regression_is_told_once_though_parent_and_production_are_one(road):
    road.right(road.add_adapter("clinc", "clinc", parents=["clinc@1"]), "clinc", 0)
    road.alias("clinc@1", "production")
    result = audit(road, "clinc", task="clinc")
    assert entry(result, "clinc", "clinc@2").against.real
    assert [f.facts["kind"] for f in result.regressions] == ["parent"]
