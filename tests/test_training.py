"""fit: what moves and what does not, an independent reference, exact resume."""

import copy
import json
import logging
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from lori_manager import training
from lori_manager.adapters.kind import Training
from lori_manager.adapters.lori import (
    fresh_block,
    in_training,
    trainable_layers,
    trained_B,
    trained_block,
)
from lori_manager.config import Config
from lori_manager.engine.layers import LoriLinear, attached
from lori_manager.engine.mask import calibrate_mask
from lori_manager.errors import InvalidInput
from lori_manager.forward import Forward, place
from lori_manager.gradients import checkpointed
from lori_manager.models import BaseModel, load_base
from lori_manager.tasks.batches import training_order
from lori_manager.tasks.encoding import Encoded
from lori_manager.training import fit, learning_rate, no_weights, steps_for

CONFIG = Config(rank=4, alpha=8.0, batch=4, precision="fp32", checkpoint_seconds=0.0)
STEPS = 8


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(tiny_base, "fp32", "cpu")


def encoded_rows(count=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length, prompt = (int(torch.randint(*r, (), generator=g)) for r in ((6, 14), (1, 4)))
        rows.append(Encoded(torch.randint(0, 250, (length,), generator=g).tolist(), prompt))
    return rows


ROWS = encoded_rows()


def random_mask(block, seed=0, sparsity=0.7):
    g = torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(b.shape, generator=g) for n, b in block.B.items()}
    return calibrate_mask(scores, sparsity)


def non_zero(block, seed=5):
    g = torch.Generator().manual_seed(seed)
    return type(block)(
        {n: torch.randn(b.shape, generator=g).mul(0.05) for n, b in block.B.items()},
        block.scaling,
        block.projection,
    )


def train(base, block, mask, config=CONFIG, steps=STEPS, peak=1e-2, rows=ROWS, **options):
    """The layers after training, and what `fit` returned."""
    layers = trainable_layers(base.model, block, mask)
    with attached(base.model, layers):
        result = fit(
            base,
            {n: layer.values for n, layer in layers.items()},
            rows,
            config,
            steps=steps,
            peak=peak,
            **options,
        )
    return layers, result


def bits(tensor):
    return tensor.detach().contiguous().view(torch.int32)


def assert_same_bits(a, b):
    assert sorted(a) == sorted(b)
    for name in a:
        assert torch.equal(bits(a[name]), bits(b[name]))


def test_the_loss_goes_down(base):
    """As far as a random head of small weights lets it."""
    block = fresh_block(base.linear_shapes, CONFIG, "x")
    for mask, peak in ((None, 5e-2), (random_mask(block), 1e-1)):
        _, result = train(base, block, mask, steps=30, peak=peak, rows=ROWS[:4])
        assert result.losses[-1] < result.losses[0] - 0.3


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_entries_outside_the_mask_do_not_change_by_a_bit(base, continued, clip):
    block = fresh_block(base.linear_shapes, CONFIG, "x")
    if continued:
        block = non_zero(block)
    mask = random_mask(block)
    before = {n: b.clone() for n, b in block.B.items()}
    config = CONFIG.replace(weight_decay=0.1, clip=clip)
    layers, _ = train(base, block, mask, config)
    for name, B in trained_B(layers).items():
        assert torch.equal(bits(B[~mask[name]]), bits(before[name][~mask[name]]))
        assert not torch.equal(B[mask[name]], before[name][mask[name]])
        assert torch.equal(bits(block.B[name]), bits(before[name]))


def test_what_is_stored_after_a_continued_run_differs_at_masked_entries_alone(base):
    block = non_zero(fresh_block(base.linear_shapes, CONFIG, "x"))
    block = trained_block(
        block, {n: b.bfloat16().float() for n, b in block.B.items()}, None, "fp32"
    )
    start = type(block)({n: b.bfloat16() for n, b in block.B.items()}, 2.0, block.projection)
    mask = random_mask(block)
    layers, _ = train(base, start, mask, CONFIG.replace(weight_decay=0.1))
    stored = trained_block(start, trained_B(layers), mask, "bf16")
    for name, B in stored.B.items():
        same = B.view(torch.int16) == start.B[name].view(torch.int16)
        assert bool(same[~mask[name]].all())
        assert not bool(same[mask[name]].all())


def test_base_weights_and_A_do_not_move(base):
    block = fresh_block(base.linear_shapes, CONFIG, "x")
    weights = {n: p.clone() for n, p in base.model.named_parameters()}
    modules = dict(base.model.named_modules())
    layers, _ = train(base, block, None, CONFIG.replace(weight_decay=0.1))
    assert dict(base.model.named_modules()) == modules
    assert_same_bits(dict(base.model.named_parameters()), weights)
    assert_same_bits({n: layer.A for n, layer in layers.items()}, block.A)
    assert not any(p.grad is not None for p in base.model.parameters())


def test_decay_shrinks_a_start_towards_zero_where_it_trains(base):
    block = non_zero(fresh_block(base.linear_shapes, CONFIG, "x"))
    plain, decayed = (
        trained_B(train(base, block, None, CONFIG.replace(weight_decay=w))[0]) for w in (0.0, 5.0)
    )
    assert sum(float(b.abs().sum()) for b in decayed.values()) < 0.9 * sum(
        float(b.abs().sum()) for b in plain.values()
    )


def test_the_same_run_twice_gives_the_same_bits_and_another_seed_others(base):
    block = fresh_block(base.linear_shapes, CONFIG, "x")
    a, b = (trained_B(train(base, block, None)[0]) for _ in range(2))
    assert_same_bits(a, b)
    other = trained_B(train(base, block, None, CONFIG.replace(seed=1))[0])
    assert not any(torch.equal(a[n], other[n]) for n in a)


def in_dtype(model, dtype):
    """A copy in this dtype throughout: transformers' RMSNorm would round float64 to float32."""
    model = copy.deepcopy(model).to(dtype)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(
                F.rms_norm,
                normalized_shape=module.weight.shape,
                weight=module.weight,
                eps=module.variance_epsilon,
            )
    return model


@pytest.mark.parametrize(
    ("dtype", "steps", "of_loss", "of_B"),
    [(torch.float64, 50, 1e-12, 1e-12), (torch.float32, 20, 1e-6, 1e-4)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("masked", [False, True])
def test_B_is_what_a_plain_loop_over_pefts_lora_makes_of_it(
    base, masked, dtype, steps, of_loss, of_B
):
    """PEFT's layers with the same frozen A, dense B, masked gradients, one row a forward."""
    from peft import LoraConfig, get_peft_model

    peak, clip = 3e-3, 0.005
    config = CONFIG.replace(targets=("q_proj", "down_proj"), clip=clip, weight_decay=0.01)
    block = fresh_block(base.linear_shapes, config, "x")
    mask = random_mask(block) if masked else None
    if masked:  # a dense B under a gradient mask would decay, but for the zeros it starts with
        config = config.replace(weight_decay=0.0)

    ours = BaseModel(in_dtype(base.model, dtype), base.folder, str(dtype))
    layers = {n: layer.to(dtype) for n, layer in trainable_layers(ours.model, block, mask).items()}
    assert all(isinstance(layer, LoriLinear) for layer in layers.values())
    with attached(ours.model, layers):
        values = {n: layer.values for n, layer in layers.items()}
        result = fit(ours, values, ROWS, config, steps=steps, peak=peak)

    reference = get_peft_model(
        in_dtype(base.model, dtype),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], lora_dropout=0.0),
        autocast_adapter_dtype=False,
    ).to(dtype)
    found = {n.removeprefix("base_model.model."): m for n, m in reference.named_modules()
             if hasattr(m, "lora_A")}  # fmt: skip
    assert sorted(found) == sorted(block.B)
    for name, module in found.items():
        module.lora_A["default"].weight.data.copy_(block.A[name])
        module.lora_A["default"].weight.requires_grad_(False)
        if mask is not None:
            module.lora_B["default"].weight.register_hook(lambda g, m=mask[name]: g * m)
    B = [module.lora_B["default"].weight for module in found.values()]
    optimizer = torch.optim.AdamW(B, lr=peak, weight_decay=config.weight_decay)
    losses, rising = [], steps // 10
    for step, rows in enumerate(training_order([len(r.ids) for r in ROWS], 4, steps, config.seed)):
        optimizer.param_groups[0]["lr"] = peak * min(
            (step + 1) / (rising + 1), (steps - step) / (steps - rising)
        )
        nll = []
        for row in (ROWS[i] for i in rows):
            logits = reference(torch.tensor([row.ids])).logits[0]
            wanted = torch.tensor(row.ids[row.prompt_length :])
            lines = logits[row.prompt_length - 1 : -1].log_softmax(-1)
            nll.append(-lines.gather(1, wanted[:, None]).flatten())
        loss = torch.cat(nll).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([b.grad.flatten() for b in B]).norm()
        assert norm > clip  # else the test says nothing about clipping
        for b in B:
            b.grad.mul_(clip / (norm + 1e-6))
        optimizer.step()
        losses.append(loss.item())
    assert result.losses == pytest.approx(losses, rel=of_loss)
    for name, module in found.items():
        expected = module.lora_B["default"].weight.detach()
        difference = (layers[name].B() - expected).abs().max() / expected.abs().max()
        assert difference < of_B


def test_learning_rates_are_those_worked_out_by_hand():
    def rates(schedule, warmup=0.2, steps=10):
        return [learning_rate(s, steps, 6.0, schedule, warmup) for s in range(steps)]

    assert rates("constant") == pytest.approx([2, 4, *[6] * 8])
    assert rates("linear") == pytest.approx([2, 4, 6, 5.25, 4.5, 3.75, 3, 2.25, 1.5, 0.75])
    cosine = rates("cosine")
    assert cosine[:3] == pytest.approx([2, 4, 6])
    assert cosine[6] == pytest.approx(3)
    assert cosine[9] == pytest.approx(3 * (1 - math.cos(math.pi / 8)))
    assert rates("linear", 0.0, 3) == pytest.approx([6, 4, 2])
    assert rates("linear", 0.01, 3) == pytest.approx([3, 6, 3])
    assert rates("linear", 0.0, 1) == [6]
    assert rates("cosine", 0.99, 1) == [3]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_every_step_counts_and_none_is_above_the_peak(schedule, warmup, steps):
    rates = [learning_rate(s, steps, 1e-3, schedule, warmup) for s in range(steps)]
    assert all(0 < rate <= 1e-3 for rate in rates)


def test_steps_are_those_asked_for_or_as_many_as_the_passes_take():
    config = Config(batch=16, epochs=2.0)
    assert [steps_for(n, config) for n in (1, 16, 17, 33)] == [2, 2, 4, 6]
    assert steps_for(33, config.replace(epochs=0.1)) == 1
    assert steps_for(33, config.replace(epochs=1.5)) == 5
    assert steps_for(33, config.replace(steps=7)) == 7


def test_progress_is_told_after_every_step_and_sums_up(base):
    block, seen = fresh_block(base.linear_shapes, CONFIG, "x"), []
    _, result = train(base, block, random_mask(block), phase="training x", on_progress=seen.append)
    assert [(p.phase, p.step, p.steps) for p in seen] == [
        ("training x", i + 1, STEPS) for i in range(STEPS)
    ]
    assert [p.loss for p in seen] == result.losses
    assert all(p.tokens_per_second > 0 and p.seconds_left >= 0 for p in seen)
    assert seen[-1].seconds_left == 0
    lengths = [len(r.ids) for r in ROWS]
    order = training_order(lengths, 4, STEPS, 0)
    assert result.tokens == sum(lengths[i] for batch in order for i in batch)
    total = sum(b.numel() for b in block.B.values())
    assert result.parameters == round((1 - 0.7) * total)
    assert result.seconds > 0


class Stop(Exception):
    """The interruption."""


def stop_after(step):
    def on_progress(progress):
        if progress.step == step:
            raise Stop

    return on_progress


@pytest.mark.parametrize("stops", [[1], [4], [STEPS - 1], [STEPS], [2, 3, 7]])
@pytest.mark.parametrize("masked", [False, True])
def test_an_interrupted_run_goes_on_to_the_same_bits(base, tmp_path, stops, masked):
    block = fresh_block(base.linear_shapes, CONFIG, "x")
    if masked:
        block = non_zero(block)
    mask = random_mask(block) if masked else None
    config, path = CONFIG.replace(weight_decay=0.1), tmp_path / "state"
    layers, whole = train(base, block, mask, config)
    for step in stops:
        with pytest.raises(Stop):
            train(base, block, mask, config, checkpoint=path, on_progress=stop_after(step))
    seen = []
    again, result = train(base, block, mask, config, checkpoint=path, on_progress=seen.append)
    assert seen[0].step == min(stops[-1] + 1, STEPS)
    assert_same_bits(trained_B(layers), trained_B(again))
    assert result.losses == whole.losses
    assert result.tokens == whole.tokens
    assert not list(tmp_path.glob("*/*.damaged"))


def test_a_checkpoint_is_written_no_more_often_than_asked(base, tmp_path):
    block, path = fresh_block(base.linear_shapes, CONFIG, "x"), tmp_path / "state"
    train(base, block, None, CONFIG.replace(checkpoint_seconds=3600.0), checkpoint=path)
    assert not path.exists()
    train(base, block, None, CONFIG, checkpoint=path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    kept = [f"step-{step:09d}" for step in (STEPS - 2, STEPS - 1)]
    assert sorted(p.name for p in path.iterdir()) == kept


@pytest.mark.parametrize(("takes", "saves"), [(0, 14), (5, 1), (1, 3)])
def test_of_what_takes_long_to_save_a_tenth_of_the_time_is_spent(
    base, tmp_path, monkeypatch, takes, saves
):
    """A clock on which a step takes 1 s; saving is asked for every 2 s."""
    now, kept = [0.0], []
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def save(*_):
        kept.append(now[0])
        now[0] += takes

    def stepped(_):
        now[0] += 1

    monkeypatch.setattr(training, "_save_state", save)
    block = fresh_block(base.linear_shapes, CONFIG, "x")
    train(base, block, None, CONFIG.replace(checkpoint_seconds=2.0), steps=30,
          checkpoint=tmp_path / "state.safetensors", on_progress=stepped)  # fmt: skip
    assert len(kept) == saves


def test_modules_without_a_masked_entry_train_and_resume_beside_the_others(base, tmp_path):
    block, path = fresh_block(base.linear_shapes, CONFIG, "x"), tmp_path / "state"
    mask = random_mask(block)
    empty = sorted(mask)[::2]
    for name in empty:
        mask[name].fill_(False)
    layers, _ = train(base, block, mask)
    with pytest.raises(Stop):
        train(base, block, mask, checkpoint=path, on_progress=stop_after(3))
    again, _ = train(base, block, mask, checkpoint=path)
    assert_same_bits(trained_B(layers), trained_B(again))
    assert all(bool(b.any()) != (n in empty) for n, b in trained_B(layers).items())


def interrupted(base, path, block, **options):
    with pytest.raises(Stop):
        train(base, block, None, checkpoint=path, on_progress=stop_after(3), **options)


def tensors_cut(step):
    file = step / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def tensors_empty(step):
    (step / "tensors.safetensors").write_bytes(b"")


def tensors_gone(step):
    (step / "tensors.safetensors").unlink()


def one_bit_of_the_tensors(step):
    file = step / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-5000] ^= 4
    file.write_bytes(data)


def manifest_gone(step):
    (step / "manifest.json").unlink()


def manifest_junk(step):
    (step / "manifest.json").write_bytes(b"\xff" * 500)


def one_digit_of_the_manifest(step):
    file = step / "manifest.json"
    text = file.read_text()
    at = text.index("losses") + 15
    file.write_text(text[:at] + str(9 - int(text[at])) + text[at + 1 :])


DAMAGES = [tensors_cut, tensors_empty, tensors_gone, one_bit_of_the_tensors, manifest_gone,
           manifest_junk, one_digit_of_the_manifest]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    base, tmp_path, caplog, damage
):
    block, path = fresh_block(base.linear_shapes, CONFIG, "x"), tmp_path / "state"
    layers, whole = train(base, block, None)
    interrupted(base, path, block)
    damage(path / "step-000000003")
    seen = []
    with caplog.at_level(logging.WARNING):
        again, result = train(base, block, None, checkpoint=path, on_progress=seen.append)
    assert seen[0].step == 3  # step 2's state was gone on from
    assert_same_bits(trained_B(layers), trained_B(again))
    assert result.losses == whole.losses
    assert (path / "step-000000003.damaged").is_dir()
    assert "checkpoint unusable" in caplog.text
    assert "going back to step 2" in caplog.text


def test_where_no_checkpoint_is_whole_training_starts_again(base, tmp_path, caplog):
    block, path = fresh_block(base.linear_shapes, CONFIG, "x"), tmp_path / "state"
    layers, _ = train(base, block, None)
    interrupted(base, path, block)
    for step in list(path.iterdir()):
        tensors_cut(step)
    seen = []
    with caplog.at_level(logging.WARNING):
        again, _ = train(base, block, None, checkpoint=path, on_progress=seen.append)
    assert seen[0].step == 1
    assert_same_bits(trained_B(layers), trained_B(again))
    assert "starting again" in caplog.text


def other_phase(path, base, block):
    interrupted(base, path, block, phase="calibrating x")


def other_steps(path, base, block):
    interrupted(base, path, block, steps=STEPS + 1)


def other_rank(path, base, block):
    interrupted(base, path, fresh_block(base.linear_shapes, CONFIG.replace(rank=3), "x"))


def other_modules(path, base, block):
    config = CONFIG.replace(targets=("q_proj",))
    interrupted(base, path, fresh_block(base.linear_shapes, config, "x"))


@pytest.mark.parametrize(
    "other", [other_phase, other_steps, other_rank, other_modules], ids=lambda f: f.__name__
)
def test_a_foreign_checkpoint_is_set_aside_and_training_starts_again(base, tmp_path, caplog, other):
    block, path = fresh_block(base.linear_shapes, CONFIG, "x"), tmp_path / "state"
    layers, whole = train(base, block, None)
    other(path, base, block)
    with caplog.at_level(logging.WARNING):
        again, result = train(base, block, None, checkpoint=path)
    assert_same_bits(trained_B(layers), trained_B(again))
    assert result.losses == whole.losses
    apart = sorted(p.name for p in path.glob("*.damaged"))
    assert apart == ["step-000000002.damaged", "step-000000003.damaged"]
    assert "starting again" in caplog.text


def test_a_checkpoint_without_what_its_kind_keeps_is_set_aside(base, tmp_path, caplog):
    """As another release's may be; what one holds is handed back."""
    block, path, handed = fresh_block(base.linear_shapes, CONFIG, "x"), tmp_path / "state", []

    def kept(parameters):
        return Training(parameters, no_weights, state=lambda: {"own": torch.ones(2)},
                        load_state=lambda held: handed.append(held["own"]))  # fmt: skip

    def run(**options):
        layers = trainable_layers(base.model, block, None)
        values = {n: layer.values for n, layer in layers.items()}
        with attached(base.model, layers):
            return fit(base, values, ROWS, CONFIG, steps=STEPS, peak=1e-2, checkpoint=path,
                       training=kept(values), **options).losses  # fmt: skip

    interrupted(base, path, block)
    with pytest.raises(Stop):
        run(on_progress=stop_after(2))
    assert "starting again" in caplog.text
    assert not handed
    assert run() == train(base, block, None)[1].losses
    assert torch.equal(handed[0], torch.ones(2))


def test_a_loss_that_is_not_finite_is_one_clear_error(base):
    block = fresh_block(base.linear_shapes, CONFIG, "x")
    message = (
        r"^the loss is nan at step [23] of training x: lower the learning rate \(now 1e\+30\).*$"
    )
    with pytest.raises(InvalidInput, match=message):
        train(base, block, None, peak=1e30, phase="training x")


def test_values_that_are_not_finite_after_the_last_step_are_one_clear_error(base):
    """The loss is taken before the step, so that it cannot tell."""
    block = fresh_block(base.linear_shapes, CONFIG, "x")
    layers = trainable_layers(base.model, block, None)
    values = {n: layer.values for n, layer in layers.items()}
    next(iter(values.values())).register_hook(lambda g: g * math.inf)
    with attached(base.model, layers), pytest.raises(InvalidInput, match="values are not finite"):
        fit(base, values, ROWS, CONFIG, steps=1, peak=1e-3)


@pytest.mark.parametrize("rows", [[], ROWS])
def test_nothing_to_train_is_refused(base, rows):
    block = fresh_block(base.linear_shapes, CONFIG, "x")
    mask = random_mask(block, sparsity=0.5 if not rows else 0.999999)
    with pytest.raises(InvalidInput, match="nothing to train"):
        train(base, block, mask, rows=rows)


def test_a_checkpoint_tells_its_place_in_its_manifest(base, tmp_path):
    block, path = fresh_block(base.linear_shapes, CONFIG, "x"), tmp_path / "state"
    interrupted(base, path, block)
    manifest = json.loads((path / "step-000000003" / "manifest.json").read_text())
    state = manifest["facts"]
    assert manifest["step"] == 3
    assert (state["phase"], state["step"], state["steps"]) == ("train", 3, STEPS)
    assert len(state["losses"]) == 3


def test_padding_does_not_count_in_the_loss(base):
    """One step at rate ~0 on rows of unlike length: the mean over all completion tokens."""
    block = fresh_block(base.linear_shapes, CONFIG, "x")
    rows = [ROWS[0], Encoded(list(range(40)), 3), Encoded([5, 6], 1)]
    _, result = train(base, block, None, steps=1, peak=1e-12, rows=rows)
    nll = []
    for row in rows:
        with torch.no_grad():
            logits = base.model(torch.tensor([row.ids])).logits[0]
        targets = torch.tensor(row.ids[row.prompt_length :])
        nll.append(F.cross_entropy(logits[row.prompt_length - 1 : -1], targets, reduction="none"))
    assert result.losses[0] == pytest.approx(float(torch.cat(nll).mean()), rel=1e-5)


def run_once(base, config, steps=6, **changes):
    """(losses, trained B by module) of a dense run through `in_training`."""
    config = config.replace(**changes)
    block = fresh_block(base.linear_shapes, config, "x")
    layers = trainable_layers(base.model, block, random_mask(block))
    with in_training(base, layers) as parameters:
        result = fit(base, parameters, ROWS, config, steps=steps, peak=1e-2)
    return result.losses, trained_B(layers)


@pytest.mark.parametrize("changes", [{"micro_batch": 1}, {"micro_batch": 3}, {"packing": "on"}])
def test_rows_in_parts_or_padded_train_as_the_whole_batch_does(base, changes):
    """Rows have completions of different lengths: a mean of means would not do."""
    whole, parts = run_once(base, CONFIG), run_once(base, CONFIG, **changes)
    assert len({len(r.ids) - r.prompt_length for r in ROWS}) > 1
    assert parts[0] == pytest.approx(whole[0], rel=2e-6)
    for name, B in whole[1].items():
        assert (parts[1][name] - B).abs().max() <= 1e-4 * B.abs().max(), name


def test_checkpointing_gives_the_same_bits_and_keeps_less(base):
    plain, again = run_once(base, CONFIG), run_once(base, CONFIG, checkpointing="on")
    assert again[0] == plain[0]
    assert_same_bits(plain[1], again[1])
    assert not base.model.training
    assert not any(module.training for module in base.model.modules())

    def kept(on):
        block = fresh_block(base.linear_shapes, CONFIG, "x")
        layers = trainable_layers(base.model, block, None)
        size = 0

        def pack(tensor):
            nonlocal size
            size += tensor.numel() if tensor.grad_fn is not None else 0
            return tensor

        with in_training(base, layers), checkpointed(base.model, on):
            forward = Forward(base, packing="on")
            with forward.ready(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                forward.loss(place(forward.batch(ROWS), base.device))
        return size

    assert kept(True) < 0.2 * kept(False)


def test_a_model_that_cannot_checkpoint_is_refused(base):
    class Odd(torch.nn.Module):
        """No transformers model."""

    refused = pytest.raises(InvalidInput, match=r"Odd has no gradient checkpointing: leave")
    with refused, checkpointed(Odd(), True):
        raise AssertionError("not reached")
