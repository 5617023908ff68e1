"""Kinds that PEFT has too: trained as PEFT trains them, and exchanged with it both ways."""

import copy
import warnings

import architectures
import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model

from lori_manager.adapters.applying import applied
from lori_manager.adapters.dora import from_magnitudes
from lori_manager.adapters.kind import module_of
from lori_manager.adapters.peft_import import read_peft
from lori_manager.config import Config
from lori_manager.engine.layers import linear_shape
from lori_manager.errors import DamagedObject, ImportRefused, InvalidInput
from lori_manager.kinds import resolved
from lori_manager.models import load_base, load_skeleton

IDS = torch.arange(24).reshape(2, 12) % 61
STEPS = 8
RANK = 4
USUAL = {"kind_options": {}, "rank": RANK, "alpha": 6.0, "seed": 3, "precision": "fp32"}
ALL = "all-linear"
IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
CASES = {
    "lora": (LoraConfig(r=RANK, lora_alpha=6, target_modules=ALL), {}),
    "rslora": (LoraConfig(r=RANK, lora_alpha=6, use_rslora=True, target_modules=ALL), {}),
    "dora": (LoraConfig(r=RANK, lora_alpha=6, use_dora=True, target_modules=ALL), {}),
    "pissa": (
        LoraConfig(r=RANK, lora_alpha=6, init_lora_weights="pissa", target_modules=ALL),
        {"svd": "full"},
    ),
    "adalora": (
        AdaLoraConfig(init_r=6, target_r=RANK, lora_alpha=9, total_step=STEPS, tinit=1, tfinal=3,
                      deltaT=1, target_modules=ALL, task_type="CAUSAL_LM"),
        {"tinit": 1 / STEPS, "tfinal": 3 / STEPS},
    ),
    "ia3": (IA3Config(), {}),
}  # fmt: skip


def saved(folder, make="llama"):
    """A base of large weights, so that all parts of it matter to its logits."""
    torch.manual_seed(0)
    architectures.__dict__[make](initializer_range=0.2).save_pretrained(folder)
    return load_base(folder, "fp32", "cpu")


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.double()


def off(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def quiet(make, *args, **named):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **named)


def stepped(model, parameters, penalty=None, after=None):
    """The same steps for anybody's parameters."""
    optimizer = torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0.0)
    for step in range(1, STEPS + 1):
        loss = model(input_ids=IDS, labels=IDS).loss
        (loss if penalty is None else loss + penalty()).backward()
        optimizer.step()
        if after is not None:
            after(step)
        optimizer.zero_grad()


@pytest.mark.parametrize("make", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", CASES)
def test_a_kind_trains_as_peft_trains_it(kind, make, tmp_path):
    base = saved(tmp_path, make)
    plain = logits(base.model)
    config, options = CASES[kind]
    fresh = saved(tmp_path, make).model
    torch.manual_seed(USUAL["seed"])
    theirs = quiet(get_peft_model, fresh, copy.deepcopy(config))
    after = theirs.base_model.update_and_allocate if kind == "adalora" else None
    stepped(theirs, [p for p in theirs.parameters() if p.requires_grad], after=after)
    expected = logits(theirs)
    assert off(expected, plain) > 0.05
    own = resolved(Config(**USUAL | {"kind": kind, "kind_options": options}))
    with module_of(kind).training(base, own, steps=STEPS) as training:
        stepped(base.model, training.parameters.values(), training.penalty, training.after_step)
        weights = training.weights(torch.float32)
    assert torch.equal(logits(base.model), plain)
    with applied(base, weights):
        assert off(logits(base.model), expected) < 2e-4
    if kind == "adalora":
        (block,) = weights.blocks
        left = {name: int(B.shape[1]) for name, B in block.B.items()}
        assert sum(left.values()) == RANK * len(base.linear_shapes)
        assert len(set(left.values())) > 2
        pattern = theirs.base_model.peft_config["default"].rank_pattern
        names = {n.split(".lora_E")[0].removeprefix("model."): n for n in pattern}
        kept = {short: sum(pattern[n]) for short, n in names.items() if any(pattern[n])}
        assert kept == {name.removeprefix("model."): rank for name, rank in left.items()}


def test_what_is_stored_of_a_pissa_is_as_exact_in_bf16_as_a_lora(tmp_path):
    """The difference is stored, not two large factors that cancel."""
    base = saved(tmp_path)
    own = resolved(Config(**USUAL | {"kind": "pissa"}))
    with module_of("pissa").training(base, own, steps=2) as training:
        for p in training.parameters.values():
            p.data.normal_(std=1e-4)
        exact, rounded = (training.weights(t).updates() for t in (torch.float32, torch.bfloat16))
    for name, update in exact.items():
        error = torch.linalg.norm(rounded[name].delta() - update.delta())
        assert error < 0.005 * torch.linalg.norm(update.delta())


@pytest.mark.parametrize("svd", ["full", "fast"])
def test_pissa_begins_at_the_best_approximation_of_that_rank(svd):
    from lori_manager.adapters.pissa import principal

    W = torch.randn(60, 40, generator=torch.Generator().manual_seed(0)) * 0.8 ** torch.arange(40)
    before = torch.random.get_rng_state()
    A, B = principal(W, 8, 3.0, svd, 8, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    U, S, Vh = torch.linalg.svd(W)
    assert torch.allclose(3.0 * B @ A, U[:, :8] * S[:8] @ Vh[:8], atol=1e-3)
    assert torch.equal(A, principal(W, 8, 3.0, svd, 8, seed=1)[0])


def test_a_resumed_pissa_goes_on_from_the_factors_that_it_began_with(tmp_path):
    """Whatever another machine's decomposition would give."""
    base = saved(tmp_path)
    options = {"svd": "fast", "niter": 0}  # coarse, so that seeds differ
    first, other = (
        resolved(Config(**USUAL | {"kind": "pissa", "kind_options": options, "seed": seed}))
        for seed in (1, 2)
    )
    with module_of("pissa").training(base, first, steps=2) as training:
        held = {name: t.clone() for name, t in training.state().items()}
    with module_of("pissa").training(base, other, steps=2) as training:
        name = sorted(held)[0]
        assert not torch.allclose(training.state()[name], held[name], atol=1e-2)
        training.load_state(held)
        assert all(torch.equal(t, held[n]) for n, t in training.state().items())


BAD_OPTIONS = [
    ("pissa", {"svd": "best"}, "`svd` must be one of auto, full, fast"),
    ("pissa", {"niter": -1}, "`niter` must be 0 or more"),
    ("adalora", {"init_rank": RANK}, "`init_rank` must be above `rank` 4"),
    ("adalora", {"tinit": 0.6, "tfinal": 0.6}, "leave none to cut"),
    ("adalora", {"tfinal": 1.0}, "`tfinal` must be a share"),
    ("adalora", {"beta1": 1.0}, "`beta1` must be above 0"),
    ("adalora", {"orthogonal": -1.0}, "`orthogonal` must be 0 or more"),
    ("ia3", {"outputs": "q_proj", "inputs": "q_proj"}, "in both options"),
    ("ia3", {"outputs": "nothing"}, "'nothing' matches no linear layer"),
]


@pytest.mark.parametrize(("kind", "options", "message"), BAD_OPTIONS)
def test_options_out_of_range_are_refused_by_name(kind, options, message, tmp_path):
    base = saved(tmp_path)
    own = resolved(Config(**USUAL | {"kind": kind, "kind_options": options}))
    with (
        pytest.raises(InvalidInput, match=message),
        module_of(kind).training(base, own, steps=STEPS),
    ):
        pass


def test_ia3_takes_keys_values_and_the_feed_forward_of_every_architecture(tmp_path):
    expected = {"gpt2": {"c_attn": "outputs", "mlp.c_proj": "inputs"}}
    usual = {"k_proj": "outputs", "v_proj": "outputs", "down_proj": "inputs"}
    for make in architectures.PACKS:
        base = saved(tmp_path / make.__name__, make.__name__)
        own = resolved(Config(**USUAL | {"kind": "ia3"}))
        with module_of("ia3").training(base, own, steps=1) as training:
            found = training.weights(torch.float32).tensors
        layers = len({name.split(".")[2] for name in found})
        for ending, side in expected.get(make.__name__, usual).items():
            assert sum(name.endswith(f"{ending}.{side}") for name in found) == layers == 2
        assert len(found) == 2 * len(expected.get(make.__name__, usual))


def noisy(model, config):
    """A PEFT model whose parameters are all moved, as after training."""
    torch.manual_seed(1)
    model = quiet(get_peft_model, model, copy.deepcopy(config)).eval()  # PEFT changes it
    for name, p in model.named_parameters():
        if "magnitude" in name or "ia3_l" in name:
            p.data.mul_(1 + 0.3 * torch.randn(p.shape))
        elif "lora_" in name:
            p.data.normal_(std=0.2)
    return model


def imported(folder, base):
    skeleton = load_skeleton(base.folder)
    found = read_peft(folder, shapes=skeleton.linear_shapes, base_names=[str(base.folder)],
                      fingerprint="f" * 64)  # fmt: skip
    if found.magnitudes is None:
        return found.weights
    return from_magnitudes(found.weights, found.magnitudes, base.folder)


EXCHANGED = {
    "dora": LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=ALL),
    "dora of many ranks": LoraConfig(
        r=3, lora_alpha=5, use_dora=True, target_modules=ALL, rank_pattern={".*0.*": 2},
        alpha_pattern={".*1.*": 7},
    ),
    "ia3": IA3Config(target_modules=ALL, feedforward_modules=["down_proj", "mlp.c_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("case", EXCHANGED)
@pytest.mark.parametrize("make", ["llama", "qwen2", "gpt2"])
def test_what_peft_made_is_read_applied_merged_and_written_as_it_was(make, case, tmp_path):
    base = saved(tmp_path / "base", make)
    theirs = noisy(saved(tmp_path / "base", make).model, EXCHANGED[case])
    quiet(theirs.save_pretrained, tmp_path / "theirs")
    expected = logits(theirs)
    assert off(logits(base.model), expected) > 0.1
    weights = imported(tmp_path / "theirs", base)
    assert weights.kind == case.split()[0]
    with applied(base, weights):
        assert off(logits(base.model), expected) < 1e-5
    skeleton = load_skeleton(base.folder)
    told = {
        "base_name": str(base.folder), "revision": None, "fingerprint": "f" * 64, "label": "a@1",
        "all_modules": [n for n, _ in skeleton.model.named_modules()],
        "transposed": skeleton.transposed, "folder": base.folder,
    }  # fmt: skip
    kind = module_of(weights.kind)
    kind.write(weights, tmp_path / "ours", told)
    again = quiet(
        PeftModel.from_pretrained, saved(tmp_path / "base", make).model, tmp_path / "ours"
    )
    assert off(logits(again.eval()), expected) < 1e-5
    kind.write_full(weights, base.folder, tmp_path / "full", fingerprint="f" * 64, told=None)
    assert off(logits(load_base(tmp_path / "full", "fp32", "cpu").model), expected) < 1e-5


def test_a_part_of_the_modules_is_named_so_that_peft_scales_no_other(tmp_path):
    base = saved(tmp_path / "base")
    config = IA3Config(target_modules=r"model\.layers\.1\..*(k_proj|down_proj)",
                       feedforward_modules=r".*down_proj")  # fmt: skip
    theirs = noisy(saved(tmp_path / "base").model, config)
    quiet(theirs.save_pretrained, tmp_path / "theirs")
    weights = imported(tmp_path / "theirs", base)
    assert sorted(weights.tensors) == [
        "model.layers.1.mlp.down_proj.inputs", "model.layers.1.self_attn.k_proj.outputs"
    ]  # fmt: skip
    told = {"base_name": "b", "revision": None, "fingerprint": "f", "label": "",
            "all_modules": [n for n, _ in base.model.named_modules()], "transposed": (),
            "folder": base.folder}  # fmt: skip
    module_of("ia3").write(weights, tmp_path / "ours", told)
    again = quiet(PeftModel.from_pretrained, saved(tmp_path / "base").model, tmp_path / "ours")
    assert off(logits(again.eval()), logits(theirs)) < 1e-5


REFUSED = [
    ("ia3", {"modules_to_save": ["lm_head"]}, None, "'modules_to_save' is set"),
    ("ia3", {"feedforward_modules": []}, None, "expected \\[32, 1\\] from this base"),
    ("ia3", {"feedforward_modules": "("}, None, "no regular expression"),
    ("ia3", {"feedforward_modules": 3}, None, "must be a list of names"),
    ("ia3", {"target_modules": ["k_proj"]}, None, "target_modules leaves it out"),
    ("ia3", {"task_type": "SEQ_CLS"}, None, "only CAUSAL_LM"),
    ("ia3", {}, lambda t: t.update({"x.norm.weight": torch.ones(3)}), "not part of an IA3"),
    ("ia3", {}, lambda t: t.update({"x.ia3_l": torch.ones(3, 1)}), "'x' is not a linear module"),
    ("ia3", {}, lambda t: t.update({"lm_head.ia3_l": torch.ones(61, 1)}), "output head"),
    ("ia3", {}, lambda t: t.clear(), "holds no tensors"),
    ("ia3", {}, lambda t: t.update({k: v * torch.nan for k, v in t.items()}), "not finite"),
    ("dora", {"use_dora": "yes"}, None, "use_dora must be true or false"),
    ("dora", {"use_dora": False}, None, "a DoRA magnitude, and use_dora is not set"),
    ("dora", {}, lambda t: t.pop(next(k for k in t if "magn" in k)), "no lora_magnitude_vector"),
    ("dora", {}, lambda t: t.update({k: v[1:] for k, v in t.items() if "magn" in k}), "has shape"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "fields", "change", "message"), REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(case, fields, change, message, tools, tmp_path):
    base = saved(tmp_path / "base")
    config = LoraConfig(r=3, use_dora=True, target_modules=ALL) if case == "dora" else (
        IA3Config(**IA3)
    )  # fmt: skip
    theirs = noisy(saved(tmp_path / "base").model, config)
    quiet(theirs.save_pretrained, tmp_path / "theirs")
    assert imported(tmp_path / "theirs", base).kind == case
    tools.edit_config(tmp_path / "theirs", **fields)
    if change is not None:
        tools.edit_tensors(tmp_path / "theirs", change)
    with pytest.raises((ImportRefused, DamagedObject), match=message) as caught:
        imported(tmp_path / "theirs", base)
    assert "\n" not in str(caught.value)


def test_a_bf16_base_trains_a_dora_with_a_norm_in_float32(tmp_path):
    saved(tmp_path)
    base = load_base(tmp_path, "bf16", "cpu")
    own = resolved(Config(**USUAL | {"kind": "dora", "precision": "bf16"}))
    with module_of("dora").training(base, own, steps=STEPS) as training:
        magnitudes = {n: p for n, p in training.parameters.items() if n.endswith(".magnitude")}
        for name, p in magnitudes.items():
            W = base.model.get_submodule(name.removesuffix(".magnitude")).layer.base_layer.weight
            assert p.dtype == torch.float32
            assert torch.equal(p, torch.linalg.norm(W.float(), dim=1))
        first = training.weights(torch.float32)
        assert not any(t.any() for n, t in first.tensors.items() if n.endswith(".gain"))
        stepped(base.model, training.parameters.values())
        during = logits(base.model)
        weights = training.weights(torch.bfloat16)
    plain = logits(base.model)
    with applied(base, weights):
        assert off(logits(base.model), during) < 0.1 * off(plain, during)


def test_linear_shapes_cover_every_vector(tmp_path):
    base = saved(tmp_path)
    own = resolved(Config(**USUAL | {"kind": "ia3"}))
    with module_of("ia3").training(base, own, steps=1) as training:
        tensors = training.weights(torch.float32).tensors
    for name, vector in tensors.items():
        module, _, side = name.rpartition(".")
        shape = linear_shape(base.model.get_submodule(module))
        assert tuple(vector.shape) == (shape[0] if side == "outputs" else shape[1],)
        assert not vector.any()


@pytest.mark.parametrize("steps", [1, 2])
def test_adalora_of_too_few_steps_to_cut_in_is_refused(tiny_base, steps):

    base = load_base(tiny_base, "fp32", "cpu")
    config = resolved(Config(kind="adalora", rank=4))
    with (
        pytest.raises(InvalidInput, match=f"of {steps} steps.*none to cut"),
        module_of("adalora").training(base, config, steps=steps),
    ):
        pass
