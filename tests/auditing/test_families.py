"""What is looked at together is corrected together."""

import numpy as np
import pytest
from audit_histories import FakeStore, entry

from lori_manager.auditing import audit


@pytest.fixture
def line():
    """Two versions on four tasks of 20 rows; rows lost by the second: 9, 7, 6 and 0."""
    store = FakeStore()
    for name in "abcd":
        store.add_task(name, rows=20)
    one = store.add_adapter("main", "a")
    two = store.add_adapter("main", "a", parents=[one])
    for name, lost in zip("abcd", (9, 7, 6, 0), strict=True):
        store.right(one, name, 20, of=20)
        store.right(two, name, 20 - lost, of=20)
    return store


def test_a_judged_version_is_corrected_by_holm_over_its_tasks(line):
    result = audit(line)
    told = [entry(result, name, "main@2").parent for name in "abcd"]
    assert [c.p for c in told] == [2 / 2**9, 2 / 2**7, 2 / 2**6, 1.0]
    assert [c.p_corrected for c in told] == pytest.approx(
        [4 * 2 / 2**9, 3 * 2 / 2**7, 2 * 2 / 2**6, 1.0]
    )
    assert {(c.correction, c.family) for c in told} == {("holm", 4)}
    assert [c.real for c in told] == [True, True, False, False]
    assert [(f.subject, f.facts["task"]) for f in result.regressions] == [
        ("main@2", "a"), ("main@2", "b"),
    ]  # fmt: skip
    assert "0.016 by Holm over 4" in result.regressions[0].message


def test_versions_before_it_and_the_best_are_multiplied_by_the_tasks(line):
    three = line.add_adapter("main", "a", parents=["main@2"])
    for name in "abcd":
        line.right(three, name, 20, of=20)
    result = audit(line)
    second = entry(result, "b", "main@2")
    assert (second.parent.correction, second.parent.family) == ("bonferroni", 4)
    assert second.parent.p_corrected == pytest.approx(4 * 2 / 2**7)
    assert not second.parent.real
    assert second.best.correction == "bonferroni"
    third = entry(result, "b", three)
    assert (third.parent.correction, third.parent.worse) == ("holm", False)
    assert third.parent.real
    assert result.regressions == ()


def test_chosen_tasks_are_the_family(line):
    result = audit(line, task=["b", "c"])
    told = [entry(result, name, "main@2").parent for name in "bc"]
    assert [c.p_corrected for c in told] == pytest.approx([2 * 2 / 2**7, 2 / 2**6])
    assert [c.real for c in told] == [True, True]
    alone = entry(audit(line, task="c"), "c", "main@2").parent
    assert (alone.p_corrected, alone.correction, alone.family) == (2 / 2**6, "", 1)


def test_a_comparison_that_cannot_be_made_is_no_member(line):
    line.add_score("main@2", "d", [1] * 20, revision=1, scorer_version="7")
    line._scores = [s for s in line._scores if (s.subject, s.task) != ("main@1", "d")]
    result = audit(line)
    assert entry(result, "c", "main@2").parent.family == 3
    assert entry(result, "d", "main@2").parent.note == "main@1 was not scored on d#1"


def test_the_same_history_says_the_same_whichever_line_is_asked(line):
    other = line.add_adapter("other", "a")
    line.right(other, "a", 3, of=20)
    for ref in (None, "main", "main@2"):
        told = entry(audit(line, ref), "b", "main@2").parent
        assert (told.correction, told.p_corrected) == ("holm", pytest.approx(3 * 2 / 2**7))


def test_equal_models_are_rarely_said_to_have_regressed_anywhere():
    random = np.random.default_rng(5)
    alarms = 0
    for _ in range(200):
        store = FakeStore()
        names = [f"t{i}" for i in range(6)]
        one, two = [store.add_adapter("m") for _ in range(2)]
        for name in names:
            store.add_task(name, rows=60)
            for ref in (one, two):
                store.add_score(ref, name, (random.random(60) < 0.7).astype(np.float32))
        alarms += bool(audit(store, against=one).regressions)
    assert alarms <= 0.05 * 200  # one-sided, so about half of it
