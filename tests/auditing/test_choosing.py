"""What of a history is told: by date, by alias, and where it is long."""

from datetime import timedelta

import numpy as np
import pytest
from audit_histories import FakeStore, entry, of_task

from lori_manager.auditing import audit
from lori_manager.errors import NotFound


def subjects(result, task="nlu"):
    return [e.subject for e in of_task(result, task).entries]


@pytest.fixture
def long():
    """Sixty versions on one task; the 30th loses 40 of 100 rows, the 40th half of what is left."""
    store = FakeStore()
    store.add_task("nlu", rows=100)
    store.right("base", "nlu", 10, of=100)
    previous = ()
    for v in range(1, 61):
        previous = (store.add_adapter("main", "nlu", parents=previous),)
        store.right(previous[0], "nlu", 90 - 40 * (v >= 30) - 25 * (v >= 40), of=100)
    return store


def test_a_long_history_is_cut_to_what_matters_and_says_so(long):
    long.alias("main@12", "production")
    task = of_task(audit(long, most=24), "nlu")
    assert [e.subject for e in task.entries] == [
        "base", "main@1", "main@12", "main@30", "main@40",
        "main@56", "main@57", "main@58", "main@59", "main@60",
    ]  # fmt: skip
    assert task.best == "main@1"
    assert (task.omitted, task.regressions_omitted) == (51, 0)
    assert len(subjects(audit(long))) == 61
    assert len(subjects(audit(long, most=61))) == 61


def test_versions_with_an_alias_are_told_wherever_they_stand(long):
    long.alias("main@12", "production")
    long.alias("main@20", "candidate")
    assert {"main@12", "main@20"} <= set(subjects(audit(long, most=24)))


def test_regressions_of_judged_versions_are_found_though_the_table_has_no_room_for_them(long):
    for i in range(9):
        ref = long.add_adapter(f"side-{i}", "nlu", parents=["main@1"])
        long.right(ref, "nlu", 80 - i, of=100)
    result = audit(long, most=24)
    assert "side-0@1" not in subjects(result)
    assert [f.subject for f in result.regressions] == [f"side-{i}@1" for i in range(9)]
    assert result.regressions == audit(long).regressions


def test_of_many_regressions_the_largest_are_told_and_the_others_counted():
    store = FakeStore()
    store.add_task("nlu", rows=200)
    previous, right = (), 195
    for v in range(1, 61):
        previous = (store.add_adapter("main", "nlu", parents=previous),)
        right = right - 8 - v // 6 if v % 5 == 0 else right
        store.right(previous[0], "nlu", right, of=200)
    task = of_task(audit(store, most=24), "nlu")
    fallen = [e.subject for e in task.entries if e.parent.real and e.parent.worse]
    assert len(fallen) == 8
    assert task.regressions_omitted == 4
    assert "main@60" in fallen
    assert "main@5" not in fallen


def test_what_is_told_of_a_version_is_the_same_in_a_cut_history(long):
    whole, cut = (of_task(audit(long, most=most), "nlu") for most in (None, 24))
    of_whole = {e.subject: e for e in whole.entries}
    assert all(of_whole[e.subject] == e for e in cut.entries)
    assert whole.sensitivity == cut.sensitivity


def test_dates_are_of_the_adapters_making_and_leave_comparisons_alone(long):
    made = [long.adapter_at(f"main@{v}").created_at for v in (10, 12)]
    told = audit(long, since=made[0], until=made[1])
    assert subjects(told) == ["base", "main@10", "main@11", "main@12"]
    assert entry(told, "nlu", "main@10") == entry(audit(long), "nlu", "main@10")
    later = audit(long, since=made[1] + timedelta(seconds=1))
    assert subjects(later)[:2] == ["base", "main@13"]
    earlier = audit(long, until=made[0] - timedelta(seconds=1))
    assert subjects(earlier)[-1] == "main@9"
    assert of_task(earlier, "nlu").best == "main@1"


def test_an_alias_leaves_those_that_it_points_at(long):
    long.alias("main@12", "production")
    long.alias("main@30", "candidate")
    assert subjects(audit(long, alias="production")) == ["base", "main@12"]
    assert entry(audit(long), "nlu", "main@30").aliases == ("candidate",)
    assert subjects(audit(long, alias="none-has-it")) == ["base"]


def test_several_tasks_are_told_in_the_order_asked(road):
    result = audit(road, task=["sst", "clinc"])
    assert [t.task for t in result.tasks] == ["sst", "clinc"]
    assert result.sequences == ()
    assert [t.task for t in audit(road, task=["sst", "sst"]).tasks] == ["sst"]
    with pytest.raises(NotFound):
        audit(road, task=["sst", "nothing"])


def test_the_filters_are_told_as_they_were_asked(long):
    assert audit(long, alias="x", task="nlu").asked == {
        "tasks": ["nlu"], "since": None, "until": None, "alias": "x", "against": None,
        "most": None,
    }  # fmt: skip


def test_the_smallest_drop_that_could_have_been_shown_follows_rows_changes_and_tasks():
    def told(rows, changed, tasks=1):
        store = FakeStore()
        for i in range(tasks):
            store.add_task(f"t{i}", rows=rows)
        x = np.arange(rows) % 2 == 0
        one, two = [store.add_adapter("m") for _ in range(2)]
        y = x.copy()
        y[:changed] = ~y[:changed]
        for i in range(tasks):
            store.add_score("base", f"t{i}", x.astype(np.float32))
            store.add_score(one, f"t{i}", x.astype(np.float32))
            store.add_score(two, f"t{i}", y.astype(np.float32))
        return audit(store, two).tasks[0].sensitivity

    plain = told(200, 40)
    assert plain.discordance == pytest.approx(0.1)  # the median of 0 and 20%
    assert (plain.rows, plain.power, plain.alpha) == (200, 0.8, 0.05)
    # Fleiss' formula for McNemar without correction says .0627 for 20 of 200 rows.
    assert plain.drop == pytest.approx(0.065, abs=0.006)
    assert told(2000, 400).drop < plain.drop < told(200, 80).drop
    three = told(200, 40, tasks=3)
    assert three.alpha == pytest.approx(0.05 / 3)
    assert three.drop > plain.drop
    assert told(4, 2).drop == np.inf


def test_what_learning_the_task_changed_is_not_what_others_are_assumed_to_change():
    store = FakeStore()
    for name in "ab":
        store.add_task(name, rows=400)
    store.right("base", "a", 0, of=400)
    one = store.add_adapter("s", "a", sequence=True)
    two = store.add_adapter("s", "b", parents=[one], sequence=True)
    store.right(one, "a", 380, of=400)
    assert audit(store, one, task="a").tasks[0].sensitivity.discordance == pytest.approx(0.95)
    store.right(two, "a", 360, of=400)
    assert audit(store, two, task="a").tasks[0].sensitivity.discordance == pytest.approx(0.05)


def test_the_smallest_drop_of_graded_outcomes_is_in_their_units():
    store = FakeStore()
    store.add_task("t", rows=50)
    random = np.random.default_rng(0)
    one = store.add_adapter("m")
    store.add_score("base", "t", random.random(50))
    store.add_score(one, "t", random.random(50))
    found = audit(store).tasks[0].sensitivity
    assert np.isnan(found.discordance)
    e = entry(audit(store), "t", one).parent
    assert found.deviation == pytest.approx(e.error * 50**0.5)
    assert found.drop == pytest.approx(2.8 * e.error, rel=0.05)
