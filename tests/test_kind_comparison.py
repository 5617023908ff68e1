"""`compare_kinds` on the tiny base: what it trains, keeps, goes on with and leaves alone."""

import dataclasses
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
from small_workspaces import copied, make_workspace

from lori_manager.comparing import difference_of
from lori_manager.errors import Conflict, InvalidInput, NotFound
from lori_manager.kind_comparison import RateSearch, compare_kinds
from lori_manager.metrics.multiple import holm
from lori_manager.probing import halves, probe, with_rate
from lori_manager.refs import parse_mask_ref
from lori_manager.reporting.kind_comparisons import change_between, kinds_compared, mean_score

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ["lori", "lora", "rslora"]
SEARCH = RateSearch(points=3, share=0.5, full=2)


@pytest.fixture(scope="module")
def untaught(tiny_base, tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("kinds") / "w", tiny_base)


@pytest.fixture(scope="module")
def done(untaught, tmp_path_factory):
    ws = copied(untaught, tmp_path_factory.mktemp("compared") / "w")
    return ws, ws.compare_kinds("colour", KINDS, seeds=2, search=SEARCH)


@pytest.fixture
def ws(untaught, tmp_path):
    return copied(untaught, tmp_path / "w")


def phases(ws, call):
    """What the call trained, by the names of its phases."""
    seen = {}
    ws.on_progress = lambda told: seen.setdefault(told.phase)
    try:
        found = call()
    finally:
        ws.on_progress = lambda told: None
    return found, list(seen)


def test_every_kind_is_searched_trained_and_scored_alike(done):
    ws, found = done
    assert [k.entry for k in found.kinds] == KINDS
    for kind in found.kinds:
        assert len(kind.tried) == 3
        short, full = dict(kind.tried), dict(kind.full)
        start = min(short, key=lambda r: (short[r], r))
        assert list(full) == [pytest.approx(start / 3, rel=0.01), start]
        assert kind.rate == min(full, key=lambda r: (full[r], r))
        assert kind.seeds == (0, 1)
        assert kind.adapters == (f"colour.{kind.entry}@1", f"colour.{kind.entry}@2")
        for ref, seed, score in zip(kind.adapters, kind.seeds, kind.scores, strict=True):
            adapter = ws.adapter(ref)
            assert (adapter.config["seed"], adapter.config["learning_rate"]) == (seed, kind.rate)
            assert adapter.facts["steps"] == found.steps == 4
            assert adapter.facts["rows"] == 21
            assert ws.score([ref], ["colour"])[0].value == score
        assert kind.value == pytest.approx(np.mean(kind.scores))
        assert kind.low <= kind.value <= kind.high
        assert kind.parameters == ws.adapter(kind.adapters[-1]).facts["parameters"]
        assert kind.bytes == ws.adapter(kind.adapters[-1]).bytes
        assert kind.step_seconds > 0
        seconds = [ws.adapter(ref).facts["seconds"] for ref in kind.adapters]
        if kind.entry == "lori":
            masks = [ws.store.mask(*parse_mask_ref(ws.adapter(r).mask)) for r in kind.adapters]
            seconds = [a + m.config["seconds"] for a, m in zip(seconds, masks, strict=True)]
        assert kind.seconds == pytest.approx(np.median(seconds))
        assert kind.peak_bytes is None or kind.peak_bytes > 10**7
    assert found.kinds[0].against is None
    assert {k.against.seeds for k in found.kinds[1:]} == {2}
    assert found.missing == ()
    assert list(ws.verify()) == []


def test_the_interval_of_a_share_of_rows_ends_at_all_and_none_of_them():
    """Two seeds that differ much leave an interval wider than there are scores."""
    outcomes = np.array([[1.0] * 9 + [0.0], [0.0] * 2 + [1.0] * 8])
    value, low, high = mean_score(np.array([[1.0] * 10, [0.0] * 10]))
    assert (value, low, high) == (0.5, 0.0, 1.0)
    assert mean_score(outcomes)[2] == 1.0
    assert mean_score(2 * outcomes)[2] > 2.0  # no share
    assert mean_score(2 * outcomes)[1] < mean_score(2 * outcomes)[0] == 1.7


def test_eval_rows_are_not_touched_before_the_training(ws):
    _, seen = phases(ws, lambda: ws.compare_kinds("colour", ["lora"], seeds=1, search=SEARCH))
    assert seen == [
        "lora at rate 0.0005", "lora at rate 0.0015", "lora at rate 0.000167",
        "lora at rate 0.0015, all steps", "lora at rate 0.0005, all steps", "training colour",
        "scoring colour.lora@1 on colour",
    ]  # fmt: skip


def test_the_tasks_own_line_and_name_stay_as_they_were(done):
    ws, _ = done
    assert ws.store.line("colour").versions == 0
    with pytest.raises(NotFound, match="nothing is trained"):
        ws.task_adapter("colour")
    ws.train(["colour"])
    assert ws.task_adapter("colour").ref == "colour@1"


def test_given_again_it_trains_nothing_and_says_the_same(done):
    ws, found = done
    again, seen = phases(ws, lambda: ws.compare_kinds("colour", KINDS, seeds=2, search=SEARCH))
    assert seen == []
    assert again == found


def test_further_kinds_and_seeds_join_what_is_there(done):
    ws, found = done
    more, seen = phases(
        ws, lambda: ws.compare_kinds("colour", ["lora", "lori-d"], seeds=3, search=SEARCH)
    )
    assert not any(phase.startswith("lora at") for phase in seen)
    assert seen.count("training colour") == 1  # told once a phase: lora's third, lori-d's three
    assert more.digest == found.digest
    assert [k.seeds for k in more.kinds] == [(0, 1, 2), (0, 1, 2)]
    assert more.kinds[1].against.seeds == 3
    assert ws.adapter("colour.lori-d@1").method == "lori-d"
    assert ws.adapter("colour.lori-d@1").config["dense_learning_rate"] == more.kinds[1].rate
    assert len(ws.store.kind_comparisons()) == 1


def test_a_removed_version_is_trained_again_and_hinders_no_report(done, tmp_path):
    ws = copied(done[0], tmp_path / "w")
    made = ws.adapter("colour.lora@latest").version

    def seeds():
        (left,) = [c for c in ws.report().comparisons if c.digest == done[1].digest]
        return {k.entry: k.seeds for k in left.kinds}["lora"]

    before = seeds()
    assert before[:2] == (0, 1)
    ws.remove(["colour.lora@1"])
    assert seeds() == before[1:]
    again, seen = phases(ws, lambda: ws.compare_kinds("colour", KINDS, seeds=2, search=SEARCH))
    assert "training colour" in seen
    assert again.kinds[1].seeds == (0, 1)
    assert ws.adapter("colour.lora@latest").version == made + 1


class Stopped(Exception):
    """The interruption."""


@pytest.mark.parametrize(
    "where",
    ["lora at rate 0.0015", "lora at rate 0.0005, all", "training colour", "scoring colour.lora"],
)
def test_interrupted_it_goes_on_to_the_same_adapters(done, ws, where):
    def tell(told):
        if told.phase.startswith(where):
            raise Stopped

    call = {"seeds": 2, "search": SEARCH}
    ws.on_progress = tell
    with pytest.raises(Stopped):
        ws.compare_kinds("colour", KINDS, **call)
    before = {(s.entry, s.step, s.point) for c in ws.store.kind_comparisons()
              for s in ws.store.kind_steps(c.digest)}  # fmt: skip
    assert before
    tried = {f"{entry} at rate {float(point):g}{', all steps' * (step == 'settle')}"
             for entry, step, point in before if step != "train"}  # fmt: skip
    found, seen = phases(ws, lambda: ws.compare_kinds("colour", KINDS, **call))
    assert not tried & set(seen)
    whole, expected = done
    for kind, other in zip(found.kinds, expected.kinds, strict=True):
        assert (kind.tried, kind.full) == (other.tried, other.full)
        assert kind.adapters == other.adapters  # none twice
        for ref in kind.adapters:
            assert ws.adapter(ref).digest == whole.adapter(ref).digest


def test_a_training_that_was_stored_and_not_noted_is_found_again(ws, monkeypatch):
    def refuse(digest, step, note=ws.store.add_kind_step):
        if step.step == "train":
            raise Stopped
        note(digest, step)

    monkeypatch.setattr(ws.store, "add_kind_step", refuse)
    with pytest.raises(Stopped):
        ws.compare_kinds("colour", ["lora"], seeds=1, search=SEARCH)
    monkeypatch.undo()
    found, seen = phases(ws, lambda: ws.compare_kinds("colour", ["lora"], seeds=1, search=SEARCH))
    assert seen == []
    assert found.kinds[0].adapters == ("colour.lora@1",)
    assert len(ws.store.adapters("colour.lora")) == 1


@pytest.mark.parametrize(
    ("hours_given", "settled", "told"),
    [
        (4.5, 1, "its rate not yet tried with all steps, nothing trained"),
        (5.5, 2, "seed 0 not trained"),
    ],
)
def test_a_spent_budget_begins_nothing_and_says_what_is_missing(
    ws, monkeypatch, hours_given, settled, told
):
    from lori_manager import kind_comparison

    hours = iter(range(1000))
    clock = SimpleNamespace(monotonic=lambda: next(hours) * 3600.0, perf_counter=time.perf_counter)
    monkeypatch.setattr(kind_comparison, "time", clock)
    found = ws.compare_kinds("colour", KINDS, seeds=1, budget=hours_given * 3600, search=SEARCH)
    monkeypatch.undo()
    assert [len(k.tried) for k in found.kinds] == [3, 0, 0]
    assert [len(k.full) for k in found.kinds] == [settled, 0, 0]
    assert found.kinds[0].rate is None or settled == 2
    assert found.missing == (
        f"lori: {told}",
        "lora: 0 of 3 rates tried, nothing trained",
        "rslora: 0 of 3 rates tried, nothing trained",
    )
    assert math.isnan(found.kinds[0].value)
    whole = ws.compare_kinds("colour", KINDS, seeds=1, search=SEARCH)
    assert whole.missing == ()


def test_a_rate_that_diverges_is_told_and_not_taken(ws, monkeypatch):
    from lori_manager import kind_comparison

    monkeypatch.setattr(kind_comparison, "usual_rate", lambda config, entry: 1e30)
    config = ws.settings.config.replace(clip=0.0, warmup=0.0)
    found = ws.compare_kinds("colour", ["lora"], seeds=1, search=SEARCH, config=config)
    assert all(math.isinf(loss) for _, loss in found.kinds[0].tried)
    assert found.kinds[0].diverged == (0,)
    assert math.isnan(found.kinds[0].value)
    stored = kinds_compared(ws.store, ws.store.kind_comparisons()[0])
    assert stored.kinds == found.kinds


def test_audit_and_report_leave_its_adapters_out_until_they_are_used(done, tmp_path):
    ws = copied(done[0], tmp_path / "w")
    ws.train(["shape"])
    told = ws.audit()
    subjects = {e.subject for t in told.tasks for e in t.entries}
    assert not any(s.startswith("colour.") for s in subjects)
    assert not any(ref.startswith("colour.") for ref in told.adapters)
    assert any("of `lori compare` left out" in note for note in told.notes)
    report = ws.report()
    assert report.newest == "shape@1"
    assert not any(v.line.startswith("colour.") for v in report.versions)
    assert [c.task for c in report.comparisons] == ["colour#1"]
    assert report.overlap is None or not any(
        m.ref.startswith("colour") and m.ref == ws.adapter("colour.lori@2").mask
        for m in report.overlap.masks
    )
    own = ws.audit("colour.lora@2")
    assert {"colour.lora@1", "colour.lora@2"} <= {e.subject for t in own.tasks for e in t.entries}
    ws.set_alias("colour.lora@1", "champion")
    ws.merge(["colour.rslora@2", "shape@1"], method="concat")
    subjects = {e.subject for t in ws.audit().tasks for e in t.entries}
    assert {"colour.lora@1", "colour.rslora@2"} <= subjects
    assert not {"colour.lora@2", "colour.rslora@1", "colour.lori@1"} & subjects


@pytest.mark.parametrize(
    ("kinds", "told", "changes"),
    [
        ([], "at least one kind", {}),
        (["lori", "nothing"], "no kind is called 'nothing'", {}),
        (["lora", "lora"], "named twice", {}),
        (["lora"], "`seeds` must be at least 1", {"seeds": 0}),
        (["lora"], "budget must be above 0", {"budget": 0.0}),
    ],
)
def test_what_cannot_be_compared_is_refused(ws, kinds, told, changes):
    with pytest.raises(InvalidInput, match=told):
        ws.compare_kinds("colour", kinds, **changes)
    assert ws.store.kind_comparisons() == []


def test_the_rate_is_what_is_best_after_all_steps(ws, monkeypatch):
    """Losses as on real tasks: a short training does best at a rate too high for a long one."""
    from lori_manager import kind_comparison

    def told(ws, task, config, parts, *, steps, **rest):
        best = 1.5e-3 if steps == 2 else 2e-4
        return dataclasses.replace(real, loss=abs(math.log(config.learning_rate / best)))

    parts = halves(ws, ws.store.task("colour"), ws.settings.config)
    config = ws.settings.config.replace(kind="lora")
    real = probe(ws, ws.store.task("colour"), config, parts, steps=1)
    monkeypatch.setattr(kind_comparison, "probe", told)
    search = RateSearch(points=3, share=0.5, full=4)
    (found,) = ws.compare_kinds("colour", ["lora"], seeds=1, search=search).kinds
    assert min(found.tried, key=lambda one: one[1])[0] == 1.5e-3
    assert [rate for rate, _ in found.full] == [5.57e-05, 1.67e-4, 5e-4, 1.5e-3]
    assert (found.rate, found.edge) == (1.67e-4, False)
    assert ws.adapter("colour.lora@1").config["learning_rate"] == 1.67e-4


@pytest.mark.parametrize(
    ("kind", "told", "changes"),
    [
        (
            "adalora",
            "is above what",
            {"kind": "adalora", "kind_options": {"init_rank": 20}, "steps": 100},
        ),
        ("adalora", "of 2 steps, `tinit`", {}),
        ("prefix", "leave --checkpointing out", {"checkpointing": "on"}),
    ],
)
def test_settings_that_a_kind_cannot_have_are_refused_before_anything_trains(
    ws, kind, told, changes
):
    config = ws.settings.config.replace(**changes)
    seen = {}
    ws.on_progress = lambda state: seen.setdefault(state.phase)
    with pytest.raises(InvalidInput, match=told):
        ws.compare_kinds("colour", ["lora", kind], seeds=1, search=SEARCH, config=config)
    assert not seen


def test_short_trainings_that_are_whole_ones_need_no_others(ws):
    search = RateSearch(points=2, share=1.0)
    found = ws.compare_kinds("colour", ["lora"], seeds=1, search=search)
    assert (found.full, found.kinds[0].full, found.missing) == (0, (), ())
    assert found.kinds[0].rate == min(found.kinds[0].tried, key=lambda one: one[1])[0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"points": 0}, "rates to try must be from 1 to 20, got 0"),
        ({"points": 21}, "rates to try must be from 1 to 20, got 21"),
        ({"factor": 1.0}, "factor between rates must be at least 1.05"),
        ({"share": 0.0}, "share of the steps"),
        ({"full": 1}, "at full length must be 0 or from 2 to 20"),
    ],
)
def test_a_search_that_cannot_be_is_refused(changes, told):
    with pytest.raises(InvalidInput, match=told):
        RateSearch(**changes)


def test_a_task_with_the_name_of_a_line_to_be_is_a_conflict(ws, tmp_path):
    from small_workspaces import write_rows

    train = write_rows(tmp_path / "t.jsonl", "colour", 24)
    held = write_rows(tmp_path / "e.jsonl", "colour", 8, 100)
    ws.add_task("colour.lora", train=str(train), eval=str(held))
    with pytest.raises(Conflict, match=r"colour\.lora"):
        ws.compare_kinds("colour", ["lora"], seeds=1)


def test_a_probe_is_judged_on_rows_that_it_does_not_train_on(ws):
    task = ws.store.task("colour")
    parts = halves(ws, task, ws.settings.config)
    assert (len(parts.rows), len(parts.held)) == (16, 5)
    trained = {tuple(r.ids) for r in parts.rows}
    assert not trained & {tuple(r.ids) for r in parts.held}
    config = with_rate(ws.settings.config.replace(kind="lora"), 0.02)
    short = probe(ws, task, config, parts, steps=2)
    longer = probe(ws, task, config, parts, steps=12)
    assert longer.loss < short.loss
    assert short.loss == pytest.approx(short.by_row @ short.tokens / short.tokens.sum())
    assert ws.store.adapters() == []


def test_one_seed_is_the_paired_comparison_of_rows():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (2, 1, 60)).astype(float)
    one = difference_of(a[0], b[0])
    assert change_between(a, b) == (one.change, one.low, one.high, one.p)


def test_several_seeds_never_say_more_than_the_rows_alone():
    rng = np.random.default_rng(1)
    a = rng.integers(0, 2, (3, 80)).astype(float)
    b = np.where(rng.random((3, 80)) < 0.1, 1.0, a)
    change, low, high, p = change_between(a, b)
    rows = difference_of(a.mean(0), b.mean(0))
    assert change == pytest.approx((b - a).mean())
    assert p >= rows.p
    assert low <= rows.low <= change <= rows.high <= high


def test_few_rows_that_all_changed_are_no_certainty():
    change, low, high, p = change_between(np.zeros((3, 5)), np.ones((3, 5)))
    assert change == high == 1
    assert p == pytest.approx(2 * 2**-5)
    assert low < 1


def test_seeds_that_disagree_widen_the_interval():
    rows = np.zeros((3, 200))
    alike, apart = rows.copy(), rows.copy()
    alike[:, :60] = 1
    apart[0, :120] = 1
    apart[1, :50] = 1
    apart[2, :10] = 1
    (c1, low1, _, p1), (c2, low2, _, p2) = change_between(rows, alike), change_between(rows, apart)
    assert c1 == pytest.approx(c2)
    assert p1 < 1e-6 < 0.05 < p2
    assert low2 < 0 < low1


def test_nothing_that_changed_leaves_an_interval():
    a = np.ones((3, 100))
    change, low, high, p = change_between(a, a)
    assert (change, p) == (0, 1)
    assert -0.05 < low < 0 < high < 0.05


def test_verdicts_go_by_holm_over_the_kinds(done, tmp_path):
    """Outcomes of our own in the place of those measured."""
    ws = copied(done[0], tmp_path / "w")
    digest = ws.store.kind_comparisons()[0]
    rights = {"lori": 8, "lora": 8, "rslora": 1}

    class Told:
        def __getattr__(self, name):
            return getattr(ws.store, name)

        def outcomes_of(self, scores):
            of = [rights[s.subject.split(".")[1].split("@")[0]] for s in scores]
            return [(np.array([1] * n + [0] * (8 - n), np.float32), None) for n in of]

    found = kinds_compared(Told(), digest, KINDS, 2)
    lora, rslora = found.kinds[1].against, found.kinds[2].against
    assert [lora.corrected, rslora.corrected] == holm([lora.p, rslora.p]).tolist()
    assert rslora.p == pytest.approx(2**-6)
    assert (lora.verdict, rslora.verdict) == ("ties", "loses to")
    rights = {"lori": 1, "lora": 8, "rslora": 1}
    assert kinds_compared(Told(), digest, KINDS, 2).kinds[1].against.verdict == "beats"
    assert dataclasses.replace(found).first == "lori"


def test_the_same_comparison_in_another_process_is_a_conflict(ws):
    from lori_manager.teaching import held_lock

    def tell(told):
        lock = next((ws.store.root / "locks").glob("compare-*"))
        with pytest.raises(Conflict, match="wait for it"):
            held_lock(lock, "the same comparison")
        raise Stopped

    ws.on_progress = tell
    with pytest.raises(Stopped):
        compare_kinds(ws, "colour", ["lora"], seeds=1, search=SEARCH)
