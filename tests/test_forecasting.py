"""What a dry run tells of a merge, and how it compares with what came."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
from small_workspaces import copied, make_workspace, write_rows

from lori_manager.combining import merge_again
from lori_manager.errors import InvalidInput
from lori_manager.forecasting import merge_key

pytestmark = pytest.mark.usefixtures("one_thread")
PAIR = ["colour@1", "shape@1"]


@pytest.fixture(scope="module")
def taught(tiny_base, tmp_path_factory):
    """Two adapters that know their tasks, with probe rows enough. Not to be changed."""
    ws = make_workspace(tmp_path_factory.mktemp("forecasting") / "ws", tiny_base, steps=30)
    for task in ("colour", "shape"):
        probe = write_rows(ws.root / "tasks" / task / "probe.jsonl", task, 24, 500)
        ws.add_task(task, probe=str(probe))
    ws.train(["colour", "shape"])
    return ws


@pytest.fixture
def ws(taught, tmp_path):
    found = copied(taught, tmp_path / "ws")
    found.said = []
    found.on_message = found.said.append
    return found


def test_one_adapter_is_expected_to_say_what_it_says(ws):
    told = ws.forecast(["colour@1"], method="concat", probe_rows=10)
    (expected,) = told.expected
    own = next(s for s in ws.store.scores(subject="colour@1") if s.task == "colour")
    assert (expected.agrees, expected.own) == (1.0, own.value)
    assert expected.score == own.value
    assert 0 < expected.rows <= 32
    assert told.method == "concat"


def test_members_that_are_muted_are_expected_to_lose(ws):
    """At weight 0 the merge is the base, which says something else."""
    told = ws.forecast(PAIR, method="concat", weights=[1.0, 0.0], probe_rows=10)
    agreed = {e.task: e.agrees for e in told.expected}
    assert agreed["colour"] == 1.0
    assert agreed["shape"] < 1.0


def test_the_next_forecast_tells_how_good_the_last_one_was(ws):
    before = ws.forecast(PAIR, method="concat", weights=[1.0, 0.2], probe_rows=10)
    assert (before.past.forecasts, before.past.merges) == (0, 0)
    assert math.isnan(before.past.off_by)
    merged = ws.merge(PAIR, method="concat", weights=[1.0, 0.2])
    now = {s.task: s.value for s in merged.scores if s.subject == merged.adapter.ref}
    past = ws.forecast(PAIR, method="concat", probe_rows=10).past
    assert (past.merges, past.forecasts) == (1, 2)
    missed = [abs(e.score - now[e.task]) for e in before.expected]
    assert past.off_by == pytest.approx(sum(missed) / 2)


def test_another_weight_or_setting_is_another_merge(ws):
    members = [ws.adapter(ref) for ref in PAIR]
    keys = {
        merge_key(members, [0.5, 0.5], "concat", {}),
        merge_key(members, [0.5, 0.4], "concat", {}),
        merge_key(members[::-1], [0.5, 0.5], "concat", {}),
        merge_key(members, [0.5, 0.5], "tsv", {}),
        merge_key(members, [0.5, 0.5], "concat", {"max_rank": 2}),
    }
    assert len(keys) == 5
    merged = ws.merge(PAIR, method="concat").adapter
    again = merge_again(ws, merged.ref).adapter
    settings = [a.config["settings"] for a in (merged, again)]
    assert merge_key(members, [0.5, 0.5], "concat", settings[0]) == merge_key(
        members, [0.5, 0.5], "concat", settings[1]
    )


def test_too_few_probe_rows_leave_the_interference_alone(ws):
    told = ws.forecast(PAIR, method="concat", probe_rows=4)
    assert told.expected == ()
    assert any(line.startswith("no rehearsal: it needs 16 probe rows") for line in ws.said)
    assert ws.store.forecasts() == []


def test_a_rehearsal_is_fitted_to_other_prompts_than_it_is_judged_by(ws, monkeypatch):
    from lori_manager import consolidation

    seen = []
    answered = consolidation.answered

    def watched(base, updates, rows, *rest):
        seen.append([tuple(map(int, row.ids)) for row in rows])
        return answered(base, updates, rows, *rest)

    monkeypatch.setattr(consolidation, "answered", watched)
    ws.forecast(PAIR, method="layerwise", probe_rows=10)
    by_task = {name: ws.rows(ws.store.task(name), "probe")[1] for name in ("colour", "shape")}
    for rows in by_task.values():
        every = [tuple(map(int, row.ids)) for row in rows]
        mine = [one for one in seen if set(one) <= set(every)]
        fitted, judged = set(mine[0]), set(mine[-1])
        assert fitted
        assert judged
        assert not fitted & judged


@pytest.mark.parametrize("method", ["auto", "routed"])
def test_what_chooses_for_itself_is_not_forecast(ws, method):
    with pytest.raises(InvalidInput, match="forecasts one merge"):
        ws.forecast(PAIR, method=method)


def test_forecasts_come_back_as_they_were_stored(ws):
    told = ws.forecast(PAIR, method="concat", probe_rows=10)
    kept = ws.store.forecasts()
    assert tuple(f.expected for f in kept) == told.expected
    assert dataclasses.replace(kept[0].expected) == told.expected[0]


def test_what_is_expected_is_the_own_score_times_what_agrees(ws, monkeypatch):
    from lori_manager import rehearsal
    from lori_manager.merge_inputs import MergeInputs

    monkeypatch.setattr(type(ws.store), "find_score", lambda *_, **__: SimpleNamespace(value=0.8))
    member, task = ws.adapter("colour@1"), ws.store.task("colour")
    inputs = MergeInputs(ws, [member], ws.settings.config, 10)
    found = rehearsal._expected(inputs, member, task, 0.5, 28)
    assert (found.own, found.score) == (0.8, 0.4)
    assert found.error == pytest.approx(0.8 * (0.5 * 0.5 / 32) ** 0.5)
    assert rehearsal._expected(inputs, member, task, 1.0, 28).error > 0
