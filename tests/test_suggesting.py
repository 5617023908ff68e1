"""`suggest`: what it chooses by, that it keeps to its time, and that nothing is stored."""

import math

import numpy as np
import pytest
from small_workspaces import copied, make_workspace

from lori_manager import suggesting
from lori_manager.config import Config
from lori_manager.errors import InvalidInput
from lori_manager.probing import Probe
from lori_manager.suggesting import sizes, smallest_that_keeps, steps_within, suggest

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = 64
NOISE = np.random.default_rng(0).normal(0, 0.02, ROWS)


@pytest.fixture(scope="module")
def untaught(tiny_base, tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("suggest") / "w", tiny_base, rank=8, alpha=16.0)


@pytest.fixture
def ws(untaught, tmp_path):
    return copied(untaught, tmp_path / "w")


class Machine:
    """A clock that moves by what probes cost, and losses by a formula."""

    def __init__(self, monkeypatch, loss, step=1.0, fixed=2.0):
        self.now, self.seen, self.masks = 0.0, [], []

        def probe(ws, task, config, parts, *, steps, mask, phase):
            self.now += fixed + steps * step
            self.seen.append((config, steps))
            assert (mask is None) == (config.kind != "lori")
            assert mask is None or mask["made"] == config.calibration_steps
            mean = loss(config, steps)
            finite = math.isfinite(mean)
            by_row = mean + NOISE - NOISE.mean() if finite else np.zeros(0)
            tokens = np.ones(ROWS) if finite else np.zeros(0)
            return Probe(mean, by_row, tokens, fixed + steps * step, step, 100, None)

        def probing_mask(ws, task, config, parts, steps):
            self.now += 0.5 * fixed + config.calibration_steps * step
            self.masks.append(config.calibration_steps)
            return {"made": config.calibration_steps}

        monkeypatch.setattr(suggesting.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(suggesting, "probe", probe)
        monkeypatch.setattr(suggesting, "probing_mask", probing_mask)
        monkeypatch.setattr(suggesting._Prober, "base_loss", lambda self, config: 5.0)


def bowl(best_rate, size=lambda config: 0.0, length=lambda steps: 0.0):
    return lambda config, steps: (
        1 + abs(math.log(config.learning_rate / best_rate)) + size(config) + length(steps)
    )


def test_the_rate_of_the_lowest_loss_is_proposed(ws, monkeypatch):
    Machine(monkeypatch, bowl(3e-2))
    found = suggest(ws, "colour", budget=3600, config=ws.settings.config.replace(steps=100))
    assert found.changes["learning_rate"] == 3e-2
    assert [c.setting for c in found.choices] == [
        "learning_rate", "targets", "rank", "sparsity", "steps",
    ]  # fmt: skip
    again = [p for p in found.probes if p.what == "rate"][-2:]
    assert [p.steps for p in again] == [100, 100]  # twice half of a training


def test_no_probe_is_made_twice(ws, monkeypatch):
    machine = Machine(monkeypatch, bowl(1e-2))
    suggest(ws, "colour", budget=3600, config=ws.settings.config.replace(steps=100))
    made = [(repr(config), steps) for config, steps in machine.seen]
    assert len(set(made)) == len(made)


def test_a_mask_is_as_a_training_of_the_probe_s_length_makes_it(ws, monkeypatch):
    machine = Machine(monkeypatch, bowl(1e-2))
    config = ws.settings.config.replace(steps=100, calibration_steps=0)
    found = suggest(ws, "colour", budget=3600, config=config)
    again = [p.steps for p in found.probes if p.what == "rate"][-2:]
    for own, steps in machine.seen:
        assert own.calibration_steps == steps or (steps in again and own.calibration_steps == 50)
    assert "calibration_steps" not in found.changes  # the probes' own is no setting
    machine = Machine(monkeypatch, bowl(1e-2))
    suggest(ws, "colour", budget=3600, config=config.replace(calibration_steps=7))
    assert machine.masks[:2] == [1, 8]  # only to tell the time
    assert set(machine.masks[2:]) == {7}


def test_the_command_has_all_that_differs_from_the_workspaces_settings(ws, monkeypatch):
    Machine(monkeypatch, bowl(1e-2))
    own = ws.settings.config
    config = own.replace(steps=100, batch=2, schedule="cosine", init="svd", store_dtype="fp32")
    found = suggest(ws, "colour", budget=3600, config=config)
    flags = dict(zip(found.command.split()[3::2], found.command.split()[4::2], strict=True))
    assert flags.items() >= {
        "--batch": "2", "--schedule": "cosine", "--init": "svd", "--store-dtype": "fp32",
        "--steps": str(found.changes["steps"]), "--sparsity": "0.9",
    }.items()  # fmt: skip
    assert "--seed" not in flags
    assert own.replace(**found.changes) == config.replace(**found.changes)
    assert "--batch" not in suggest(ws, "colour", budget=3600).command


def test_a_rank_is_told_only_of_kinds_that_have_one(ws, monkeypatch):
    Machine(monkeypatch, bowl(1e-2))
    config = ws.settings.config.replace(steps=100, kind="prefix")
    found = suggest(ws, "colour", budget=3600, config=config)
    assert all("rank" not in probe.settings for probe in found.probes)


def test_a_size_that_does_not_matter_is_the_smallest_and_one_that_does_is_kept(ws, monkeypatch):
    config = ws.settings.config.replace(steps=100)
    Machine(monkeypatch, bowl(1e-2))
    found = suggest(ws, "colour", budget=3600, config=config)
    assert (found.changes["rank"], found.changes["alpha"]) == (2, 4.0)
    assert found.changes["sparsity"] == 0.9
    why = next(c.why for c in found.choices if c.setting == "rank")
    assert why.startswith("the best of 5 after 50 steps, and the fewest values trained")
    Machine(monkeypatch, bowl(1e-2, size=lambda c: 2.0 * (c.rank < 8)))
    found = suggest(ws, "colour", budget=3600, config=config)
    assert (found.changes["rank"], found.changes["sparsity"]) == (8, 0.95)


def test_plops_layers_are_proposed_where_they_keep_what_all_gain(ws, monkeypatch):
    config = ws.settings.config.replace(steps=100)
    chosen = ws.place("colour", config).targets(3)
    Machine(monkeypatch, bowl(1e-2))
    found = suggest(ws, "colour", budget=3600, config=config)
    assert found.changes["targets"] == chosen
    Machine(monkeypatch, bowl(1e-2, size=lambda c: 0.5 * (c.targets == chosen)))
    found = suggest(ws, "colour", budget=3600, config=config)
    assert "targets" not in found.changes
    why = next(c for c in found.choices if c.setting == "targets")
    assert why.value == ["all-linear"]
    assert why.why.startswith(f"PLoP's {', '.join(chosen)} against all-linear: the best of 2")


def test_steps_are_the_fewest_that_keep_what_the_longest_gains(ws, monkeypatch):
    config = ws.settings.config.replace(steps=400)
    Machine(monkeypatch, bowl(1e-2, length=lambda steps: 20 / steps if steps < 200 else 0.0))
    found = suggest(ws, "colour", budget=36000, config=config)
    assert found.changes["steps"] == 200
    Machine(monkeypatch, bowl(1e-2, length=lambda steps: 100 / steps))
    found = suggest(ws, "colour", budget=36000, config=config)
    assert found.changes["steps"] == 400


def test_where_the_time_ends_before_the_loss_has_settled_all_steps_are_proposed(ws, monkeypatch):
    Machine(monkeypatch, bowl(1e-2, length=lambda steps: 100 / steps), step=0.1)
    config = ws.settings.config.replace(steps=4000)
    found = suggest(ws, "colour", budget=200, config=config)
    assert found.changes["steps"] == 4000
    why = next(c.why for c in found.choices if c.setting == "steps")
    assert why.startswith("the held-out loss still falls")


@pytest.mark.parametrize("budget", [200, 300, 1000, 3600])
@pytest.mark.parametrize(("kind", "dense"), [("lori", 0), ("lori", 2), ("lori", 30), ("lora", 0)])
def test_it_keeps_to_its_time(ws, monkeypatch, budget, kind, dense):
    machine = Machine(monkeypatch, bowl(1e-2), step=0.5)
    config = ws.settings.config.replace(steps=1000, kind=kind, calibration_steps=dense)
    found = suggest(ws, "colour", budget=budget, config=config)
    assert machine.now == found.seconds <= budget
    assert found.seconds > 0.5 * budget or budget == 3600
    assert len({c.setting for c in found.choices}) == len(found.choices)
    assert ("sparsity" in found.changes) == (kind == "lori")


def test_too_little_time_is_refused_with_how_much_would_do(ws, monkeypatch):
    Machine(monkeypatch, bowl(1e-2), step=2.0)
    config = ws.settings.config.replace(steps=1000)
    with pytest.raises(InvalidInput, match=r"a step takes 2 s.*give \d+(\.\d)? minutes") as refused:
        suggest(ws, "colour", budget=60, config=config)
    minutes = float(str(refused.value).rsplit("give ", 1)[1].split()[0])
    Machine(monkeypatch, bowl(1e-2), step=2.0)
    suggest(ws, "colour", budget=minutes * 60, config=config)


def test_where_time_is_short_the_rate_comes_first_and_the_rest_stays(ws, monkeypatch):
    machine = Machine(monkeypatch, bowl(3e-2), step=2.0)
    config = ws.settings.config.replace(steps=1000)
    found = suggest(ws, "colour", budget=300, config=config)
    assert machine.now <= 300
    assert next(p.steps for p in found.probes if p.what == "rate") == 10
    assert found.changes["learning_rate"] == 3e-2
    told = {c.setting: c.why for c in found.choices if c.setting != "learning_rate"}
    assert set(told) == {"targets", "rank", "sparsity", "steps"}
    assert all("no time was left" in why for why in told.values())


def test_masks_of_given_length_are_paid_for_once(ws, monkeypatch):
    config = ws.settings.config.replace(steps=1000, calibration_steps=100)
    Machine(monkeypatch, bowl(1e-2), step=0.5)
    found = suggest(ws, "colour", budget=1500, config=config)
    assert not [c for c in found.choices if "no time" in c.why]
    with pytest.raises(InvalidInput, match="minutes or more") as refused:
        suggest(ws, "colour", budget=60, config=config)
    minutes = float(str(refused.value).rsplit("give ", 1)[1].split()[0])
    machine = Machine(monkeypatch, bowl(1e-2), step=0.5)
    suggest(ws, "colour", budget=minutes * 60, config=config)
    assert machine.now <= minutes * 60


def test_rates_that_diverge_are_passed_over(ws, monkeypatch):
    Machine(monkeypatch, lambda c, steps: math.inf if c.learning_rate > 5e-3 else 1.0)
    found = suggest(ws, "colour", budget=3600, config=ws.settings.config.replace(steps=100))
    assert found.changes["learning_rate"] < 5e-3
    Machine(monkeypatch, lambda c, steps: math.inf)
    with pytest.raises(InvalidInput, match="diverged at every rate"):
        suggest(ws, "colour", budget=3600, config=ws.settings.config.replace(steps=100))


@pytest.mark.parametrize("kind", ["lori", "rslora"])
def test_a_real_one_proposes_what_trains_and_stores_nothing(ws, kind):
    config = ws.settings.config.replace(steps=16, kind=kind)
    found = suggest(ws, "colour", budget=120, config=config)
    assert ws.store.adapters() == []
    assert ws.store.masks("colour") == []
    assert found.seconds <= 120
    assert found.held == 5
    losses = [p.loss for p in found.probes if p.what == "rate"]
    assert min(losses) < found.base_loss
    assert found.command.startswith(f"lori train colour --kind {kind} --rank ")
    trained = ws.train(["colour"], config.replace(**found.changes))[0].adapter
    assert trained.facts["steps"] == found.changes["steps"]


def test_the_smallest_is_taken_only_where_it_is_shown_to_keep_enough():
    rng = np.random.default_rng(1)
    best, weights = 1 + rng.normal(0, 0.3, 200), np.ones(200)
    near = best + 0.01 + rng.normal(0, 0.02, 200)  # 1% of a gain of 1, told sharply
    noisy = best + 0.01 + rng.normal(0, 0.5, 200)  # the same, told badly
    far = best + 0.1
    assert smallest_that_keeps([near, best], weights, 2.0) == 0
    assert smallest_that_keeps([noisy, best], weights, 2.0) == 1
    assert smallest_that_keeps([far, near, best], weights, 2.0) == 1
    assert smallest_that_keeps([far, best], weights, 20.0) == 0
    assert smallest_that_keeps([np.zeros(0), best], weights, 2.0) == 1
    assert smallest_that_keeps([near, best], weights, 0.5) == 1  # nothing was gained: no room
    with pytest.raises(ValueError, match="every probe diverged"):
        smallest_that_keeps([np.zeros(0)], np.zeros(0), 2.0)


def test_tokens_weigh():
    best = np.array([1.0, 1.0] * 50)
    worse = np.array([1.0, 1.2] * 50)
    assert smallest_that_keeps([worse, best], np.array([999.0, 1.0] * 50), 2.0) == 0
    assert smallest_that_keeps([worse, best], np.array([1.0, 999.0] * 50), 2.0) == 1


def test_sizes_are_in_order_of_what_they_train_and_keep_the_scaling():
    found = sizes(Config(rank=32, alpha=64.0, sparsity=0.9), 576)
    assert [(c.rank, c.sparsity) for c in found] == [
        (8, 0.9), (16, 0.9), (32, 0.95), (32, 0.9), (32, 0.6),
    ]  # fmt: skip
    assert {c.scaling for c in found} == {2.0}
    assert [c.rank for c in sizes(Config(kind="lora", rank=32), 576)] == [8, 16, 32, 64]
    assert [c.rank for c in sizes(Config(kind="lora", rank=32), 40)] == [8, 16, 32]
    assert [c.rank for c in sizes(Config(kind="lora", rank=1), 40)] == [1, 2]


def test_steps_within_a_time_are_counted_by_hand():
    assert steps_within(10.0, 4, 4, 0.5, 0.1) == 20
    assert steps_within(1.0, 4, 4, 0.5, 0.1) == 0


@pytest.mark.parametrize("budget", [0.0, -5.0, math.inf])
def test_a_time_that_is_none_is_refused(ws, budget):
    with pytest.raises(InvalidInput, match="budget must be above 0"):
        suggest(ws, "colour", budget=budget)
