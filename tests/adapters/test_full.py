"""Full fine-tuning: against plain PyTorch, tied weights, bf16, exact restore, whole models."""

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lori_manager.adapters import full
from lori_manager.adapters.applying import applied
from lori_manager.config import Config
from lori_manager.engine.weights import KindWeights
from lori_manager.errors import Conflict, InvalidInput, WrongBase
from lori_manager.kinds import resolved
from lori_manager.models import BaseModel, load_base
from lori_manager.tasks.encoding import Encoded
from lori_manager.training import fit

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [Encoded([3, 7, 11, 20, 5], 2), Encoded([9, 4, 33], 1)]
IDS = torch.arange(7)[None]
EMBEDDINGS = "model.embed_tokens.weight"


def made(make, tmp_path, **changes):
    torch.manual_seed(0)
    model = make(**changes).eval()
    model.requires_grad_(False)
    return BaseModel(model, tmp_path, "fp32")


def config(modules="all", **changes):
    own = Config(kind="full", kind_options={"modules": modules}, batch=2, clip=0.0, **changes)
    return resolved(own)


def logits(base):
    with torch.no_grad():
        return base.model(input_ids=IDS, use_cache=False).logits[0]


def trained(base, settings, steps=4, start=None, dtype=torch.float32):
    with full.training(base, settings, steps=steps, start=start) as training:
        result = fit(base, training.parameters, ROWS, settings, steps=steps,
                     peak=settings.learning_rate, training=training)  # fmt: skip
        return training.weights(dtype), logits(base), result


def reference(make, tmp_path, settings, steps=4, **changes):
    """The model trained by torch alone: AdamW on its parameters, loss of its plain logits."""
    from lori_manager.training import learning_rate

    model = made(make, tmp_path, **changes).model
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=settings.weight_decay)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, settings.learning_rate, settings.schedule,
                                        settings.warmup)  # fmt: skip
        optimizer.zero_grad()
        total, count = 0.0, 0
        for row in ROWS:
            ids = torch.as_tensor(row.ids)[None].long()
            told = model(input_ids=ids, use_cache=False).logits[0, row.prompt_length - 1 : -1]
            answers = ids[0, row.prompt_length :]
            total = total + torch.nn.functional.cross_entropy(told, answers, reduction="sum")
            count += len(answers)
        (total / count).backward()
        losses.append((total / count).item())
        optimizer.step()
    return model, losses


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", architectures.PACKS)
def test_it_is_what_torch_alone_does_to_every_parameter(make, tied, tmp_path):
    settings = config(learning_rate=1e-3, weight_decay=0.01)
    base = made(make, tmp_path, tie_word_embeddings=tied)
    before = {n: p.detach().clone() for n, p in base.model.named_parameters()}
    standing = {n: id(p) for n, p in base.model.named_parameters(remove_duplicate=False)}
    weights, during, result = trained(base, settings)
    model, losses = reference(make, tmp_path, settings, tie_word_embeddings=tied)
    assert result.losses == pytest.approx(losses, rel=1e-4)
    expected = dict(model.named_parameters())
    assert set(weights.tensors) == set(expected) == set(before)
    for name, difference in weights.tensors.items():
        assert bool(difference.any()), name
        if name.endswith("k_proj.bias"):  # softmax does not see it: its gradient is rounding
            continue
        off = (before[name] + difference - expected[name]).abs().mean()
        assert off <= 0.02 * difference.abs().mean(), name
    with torch.no_grad():
        assert torch.allclose(during, model(input_ids=IDS).logits[0], atol=2e-3)
    for name, p in base.model.named_parameters(remove_duplicate=False):
        assert id(p) == standing[name]
        assert not p.requires_grad
    assert all(torch.equal(p, before[n]) for n, p in base.model.named_parameters())
    with applied(base, weights):
        assert torch.allclose(logits(base), during, atol=1e-5)
        tables = base.model.get_input_embeddings().weight, base.model.get_output_embeddings().weight
        assert (tables[0] is tables[1]) == tied
    assert {n: id(p) for n, p in base.model.named_parameters(remove_duplicate=False)} == standing


def test_steps_too_small_for_bf16_are_not_lost(tiny_base):
    """Each is far below the weights' last bit; together they are not."""
    base = load_base(tiny_base, "bf16", "cpu")
    settings = config(learning_rate=1e-5, schedule="constant", warmup=0.0)
    weights, _, result = trained(base, settings, steps=8)
    assert {t.dtype for t in weights.tensors.values()} == {torch.float32}
    moved = weights.tensors["model.layers.0.mlp.up_proj.weight"].abs()
    assert 4e-5 < float(moved.max()) < 9e-5
    plain = dict(base.model.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal((plain.float() + 1e-5).bfloat16(), plain) or (
        ((plain.float() + 1e-5).bfloat16() == plain).float().mean() > 0.8
    )
    assert result.losses[-1] < result.losses[0]


def test_a_bf16_base_is_applied_as_it_was_trained(tiny_base):
    base = load_base(tiny_base, "bf16", "cpu")
    weights, during, _ = trained(base, config(learning_rate=1e-3))
    before = logits(base)
    with applied(base, weights):
        assert torch.equal(logits(base), during)
    assert torch.equal(logits(base), before)
    rounded = KindWeights("full", weights.options,
                          {n: t.bfloat16() for n, t in weights.tensors.items()})  # fmt: skip
    with applied(base, rounded):
        assert (logits(base) - during).abs().max() < 0.1 * (during - before).abs().max()


def test_some_modules_train_alone(tmp_path):
    base = made(architectures.llama, tmp_path)
    weights, _, result = trained(base, config("norm, mlp.down_proj", learning_rate=1e-3))
    assert set(weights.tensors) == {
        "model.norm.weight",
        *(f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)),
    }
    assert result.parameters == sum(t.numel() for t in weights.tensors.values())
    tied = made(architectures.llama, tmp_path, tie_word_embeddings=True)
    assert list(full.find_places(tied.model, "lm_head")) == [EMBEDDINGS]
    for wrong in ("down", "norm,", ""):
        with pytest.raises(InvalidInput, match="matches no module with weights"):
            full.find_places(base.model, wrong)


def test_training_goes_on_from_a_parent_and_stays_a_difference_to_the_base(tmp_path):
    base = made(architectures.llama, tmp_path)
    settings = config(learning_rate=1e-3)
    parent, _, _ = trained(base, settings)
    with full.training(base, settings, steps=1, start=parent) as training:
        again = training.weights(torch.float32)
    for name, t in parent.tensors.items():
        assert torch.allclose(again.tensors[name], t, atol=1e-7)
    child, during, _ = trained(base, settings, start=parent)
    assert not torch.equal(child.tensors[EMBEDDINGS], parent.tensors[EMBEDDINGS])
    with applied(base, child):
        assert torch.allclose(logits(base), during, atol=1e-5)
    with (
        pytest.raises(InvalidInput, match="which `modules` 'norm' leaves out"),
        full.training(base, config("norm"), steps=1, start=parent),
    ):
        pass


def test_differences_of_another_model_are_refused(tmp_path):
    base = made(architectures.llama, tmp_path)
    for tensors in ({"x": torch.ones(2)}, {EMBEDDINGS: torch.ones(61, 31)}):
        with (
            pytest.raises(WrongBase, match="another model"),
            applied(base, KindWeights("full", {"modules": "all"}, tensors)),
        ):
            pass


def test_packed_weights_are_refused(tmp_path):
    base = made(architectures.llama, tmp_path)
    layer = base.model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InvalidInput, match="--base-bits 4"), full.training(base, config(), steps=1):
        pass
    learned = {"model.layers.0.mlp.up_proj.weight": torch.ones(64, 32)}
    with (
        pytest.raises(InvalidInput, match="--base-bits 4"),
        applied(base, KindWeights("full", {"modules": "all"}, learned)),
    ):
        pass


TOLD = {"fingerprint": "f" * 64}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", [architectures.llama, architectures.gpt2, architectures.gemma])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_model_is_what_is_applied_to_the_bit(make, tied, dtype, tmp_path):
    source = tmp_path / "base"
    made(make, tmp_path, tie_word_embeddings=tied).model.to(dtype).save_pretrained(source)
    base = load_base(source, "fp32" if dtype == torch.float32 else "bf16", "cpu")
    weights, _, _ = trained(base, config(learning_rate=1e-3), dtype=torch.bfloat16)
    full.write_full(weights, source, tmp_path / "out", **TOLD)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    with applied(base, weights):
        inside = {n: p.detach().clone() for n, p in base.model.named_parameters()}
        expected = logits(base)
    assert {n: p.dtype for n, p in model.named_parameters()} == dict.fromkeys(inside, dtype)
    assert all(torch.equal(p, inside[n]) for n, p in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits[0], expected)


def test_a_checkpoint_that_stores_both_tied_tensors_gets_both_changed(tmp_path):
    source = tmp_path / "base"
    made(architectures.llama, tmp_path, tie_word_embeddings=True).model.save_pretrained(source)
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors[EMBEDDINGS].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    base = load_base(source, "fp32", "cpu")
    weights, _, _ = trained(base, config(learning_rate=1e-3))
    full.write_full(weights, source, tmp_path / "out", **TOLD)
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(out["lm_head.weight"], out[EMBEDDINGS])
    assert torch.equal(out[EMBEDDINGS], tensors[EMBEDDINGS] + weights.tensors[EMBEDDINGS])


def test_what_modules_left_out_is_copied_and_a_full_folder_is_refused(tmp_path):
    source = tmp_path / "base"
    made(architectures.llama, tmp_path).model.save_pretrained(source, max_shard_size="20kB")
    base = load_base(source, "fp32", "cpu")
    weights, _, _ = trained(base, config("norm", learning_rate=1e-3))
    full.write_full(weights, source, tmp_path / "out", **TOLD)
    before, after = (
        {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
        for folder in (source, tmp_path / "out")
    )
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {"model.norm.weight"}
    assert len(list(source.glob("*.safetensors"))) > 1
    with pytest.raises(Conflict):
        full.write_full(weights, source, source, **TOLD)


def test_a_sum_that_float16_cannot_hold_is_refused(tmp_path):
    source = tmp_path / "base"
    made(architectures.llama, tmp_path).model.half().save_pretrained(source)
    weights = KindWeights("full", {"modules": "all"}, {"model.norm.weight": torch.full((32,), 1e5)})
    with pytest.raises(InvalidInput, match="larger than float16 holds"):
        full.write_full(weights, source, tmp_path / "out", **TOLD)
