"""A base in nf4: what it holds, what trains over it, and that its scores stand apart."""

import copy
import dataclasses
import importlib.util
import warnings
import weakref

import architectures
import numpy as np
import pytest
import torch
from small_workspaces import copied, make_workspace
from torch import nn
from torch.nn import functional as F

from lori_manager import models
from lori_manager.adapters.lori import in_training
from lori_manager.context import Context
from lori_manager.engine.layers import LoriLinear, LowRankLinear, attached
from lori_manager.engine.unpacking import unpack_as_one_row
from lori_manager.engine.update import LowRankUpdate
from lori_manager.forward import Forward, place
from lori_manager.models import load_base, load_skeleton
from lori_manager.tasks.encoding import Encoded

if importlib.util.find_spec("bitsandbytes") is None:
    warnings.warn("no bitsandbytes: NOTHING of 4-bit bases is tested", stacklevel=1)
    pytest.skip("bitsandbytes is not installed", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")
draw = np.random.default_rng(0)
ROWS = [Encoded(draw.integers(0, 61, n), p) for n, p in ((9, 4), (3, 1), (12, 11), (5, 0))]
RANK = 3


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


def packed(make, folder, device="cpu", precision="fp32", **changes):
    torch.manual_seed(0)
    # Weights so large that all parts of a model matter to its logits.
    make(initializer_range=0.2, **changes).save_pretrained(folder)
    return load_base(folder, precision, device, 4)


def unpacked(layer):
    """A plain layer of the very values that a packed one multiplies with."""
    from bitsandbytes.functional import dequantize_4bit

    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if layer.bias is not None:
        plain.bias.data = layer.bias.data.clone()
    return plain.requires_grad_(False)


def held(model):
    """Every bit of a model: what is packed, its scales, and the rest."""
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def factors(shape, seed=1):
    """A (rank, in), B (out, rank) and a mask of half of B."""
    g = torch.Generator().manual_seed(seed)
    out, inner = shape
    A = torch.randn(RANK, inner, generator=g) / inner**0.5
    B = torch.randn(out, RANK, generator=g) * 0.3
    return A, B, torch.rand(out, RANK, generator=g) < 0.5


def off(got, expected):
    """The largest difference over the largest value."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


MAKERS = [
    (architectures.llama, {"tie_word_embeddings": False}),
    (architectures.llama, {"tie_word_embeddings": True}),
    (architectures.qwen2, {}),
    (architectures.gpt2, {}),
]


# What is loaded


@pytest.mark.parametrize(("make", "changes"), MAKERS)
def test_every_linear_layer_but_the_head_is_packed_and_nothing_else(tmp_path, make, changes):
    from bitsandbytes.nn import Linear4bit, Params4bit

    base = packed(make, tmp_path, **changes)
    layers = {n for n, m in base.model.named_modules() if isinstance(m, Linear4bit)}
    assert base.linear_shapes == load_skeleton(tmp_path).linear_shapes
    assert layers == set(base.linear_shapes)
    for name, (out, inner) in base.linear_shapes.items():
        weight = base.model.get_submodule(name).weight
        state = weight.quant_state
        assert (weight.dtype, weight.numel()) == (torch.uint8, out * inner // 2)
        assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
    rest = [p for p in base.model.parameters() if not isinstance(p, Params4bit)]
    assert {p.dtype for p in rest} == {torch.float32}
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training
    assert (base.precision, base.base_bits) == ("fp32", 4)


def test_packed_weights_are_near_the_ones_in_the_files(tmp_path):
    base = packed(architectures.llama, tmp_path)
    whole = load_base(tmp_path, "fp32", "cpu")
    for name in base.linear_shapes:
        true = whole.model.get_submodule(name).weight
        error = unpacked(base.model.get_submodule(name)).weight - true
        assert 0.05 < float(error.norm() / true.norm()) < 0.15, name  # nf4 on normal weights: 0.09


@pytest.mark.parametrize("shape", [(48, 32), (16, 96), (30, 48), (8, 64), (1, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_width_are_unpacked_as_their_blocks_say(shape, dtype):
    from bitsandbytes import functional

    unpack_as_one_row()
    unpack_as_one_row()
    true = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, state = functional.quantize_4bit(true, quant_type="nf4")
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    scales = state.absmax.repeat_interleave(state.blocksize)[: true.numel()]
    expected = (state.code[codes[: true.numel()]] * scales).view(shape)
    found = functional.dequantize_4bit(packed, state)
    assert torch.allclose(found.float(), expected.to(dtype).float(), rtol=1e-2, atol=1e-3)
    turned = functional.dequantize_4bit(packed.t(), state)
    assert torch.equal(turned, found.t())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_of_the_arithmetic_is_in_the_precision_asked_for(tmp_path, device, precision):
    base = packed(architectures.llama, tmp_path, device, precision)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    name, shape = next(iter(base.linear_shapes.items()))
    A, B, mask = factors(shape)
    layer = base.model.get_submodule(name)
    trained, applied = LoriLinear(layer, A, 0.7, mask, B), LowRankLinear(layer, LowRankUpdate(A, B))
    assert trained.A.dtype == applied.A.dtype == applied.B.dtype == dtype
    x = torch.randn(2, 5, shape[1], dtype=dtype, device=base.device)
    assert trained(x).dtype == applied(x).dtype == dtype
    assert base.model(torch.arange(6, device=base.device)[None]).logits.dtype == dtype


def test_weights_are_not_repacked_for_a_cpu_that_multiplies_bf16(tmp_path, monkeypatch):
    """Repacked ones pass no gradient on."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True, raising=False)
    base = packed(architectures.llama, tmp_path)
    before = held(base.model)
    base.probe()
    with torch.no_grad():
        base.probe()
    assert same(before, held(base.model))
    for module in base.model.modules():
        assert not hasattr(getattr(module, "quant_state", None), "packing_format_for_cpu")


# One layer


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("make", "changes"), MAKERS[1:])
def test_gradients_are_those_of_plain_autograd_over_the_unpacked_weight(
    tmp_path, device, make, changes, masked
):
    base = packed(make, tmp_path, device, **changes)
    for name, shape in base.linear_shapes.items():
        layer = base.model.get_submodule(name)
        before = held(layer)
        A, B, mask = factors(shape)
        wrapped = LoriLinear(layer, A, 0.7, mask if masked else None, B)
        g = torch.Generator().manual_seed(2)
        x = torch.randn(2, 7, shape[1], generator=g).to(device)
        given = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        y = wrapped(given[0])
        y.pow(2).sum().backward()

        dense = B.to(device).requires_grad_()
        plain = unpacked(layer).to(device)
        expected = plain(given[1]) + 0.7 * F.linear(F.linear(given[1], A.to(device)), dense)
        expected.pow(2).sum().backward()
        assert off(y, expected) < 1e-5, name
        assert off(given[0].grad, given[1].grad) < 1e-5, name
        wanted = dense.grad[mask.to(device)] if masked else dense.grad.flatten()
        assert off(wrapped.values.grad, wanted) < 1e-5, name
        assert layer.weight.grad is None
        assert same(before, held(layer)), name


def test_what_was_trained_and_what_is_applied_answer_bit_for_bit_alike(tmp_path, device):
    base = packed(architectures.qwen2, tmp_path, device)
    for name, shape in base.linear_shapes.items():
        layer = base.model.get_submodule(name)
        A, B, mask = factors(shape)
        x = torch.randn(3, 5, shape[1], device=base.device)
        with torch.inference_mode():
            applied = LowRankLinear(layer, LowRankUpdate(A, B, 0.5))(x)
        assert torch.equal(LoriLinear(layer, A, 0.5, mask, B)(x), applied), name


def test_the_backward_keeps_z_and_neither_the_input_nor_an_unpacked_weight(tmp_path, device):
    base = packed(architectures.llama, tmp_path, device)
    name = "model.layers.0.mlp.down_proj"
    out, inner = base.linear_shapes[name]
    A, B, mask = factors((out, inner))
    wrapped = LoriLinear(base.model.get_submodule(name), A, 0.7, mask, B)
    start = torch.randn(40, inner, device=base.device, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        x = start + 1  # not kept by the sum's own backward
        alive = weakref.ref(x)
        y = wrapped(x)
        del x
    assert alive() is None
    assert kept.count((40, RANK)) == 1
    assert not [shape for shape in kept if shape in ((40, inner), (40, out), (out, inner))]
    y.sum().backward()
    assert bool(start.grad.any())


# A whole model


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize(("make", "changes"), MAKERS)
def test_loss_and_gradients_are_those_of_the_unpacked_model_row_by_row(
    tmp_path, device, make, changes, packing
):
    base = packed(make, tmp_path, device, **changes)
    before = held(base.model)
    reference = copy.deepcopy(base.model)
    layers = {}
    plain = {}
    for name, shape in base.linear_shapes.items():
        A, B, mask = factors(shape)
        layers[name] = LoriLinear(base.model.get_submodule(name), A, 0.5, mask, B)
        plain[name] = Plain(unpacked(reference.get_submodule(name)), A, 0.5 * B).to(device)
    forward = Forward(base, packing=packing)
    assert forward.packed == (packing == "on")
    with in_training(base, layers) as parameters:
        assert all(layer.group.layers == [layer] for layer in layers.values())
        (values,) = parameters.values()
        with forward.ready():
            loss = forward.loss(place(forward.batch(ROWS), base.device))
            (gradient,) = torch.autograd.grad(loss, [values])
    assert same(before, held(base.model))
    with attached(reference, plain):
        total = 0.0
        for row in ROWS:
            ids = torch.as_tensor(np.asarray(row.ids, np.int64), device=base.device)
            logits = reference(ids[None]).logits[0]
            first = max(row.prompt_length, 1)
            total = total + F.cross_entropy(logits[first - 1 : -1], ids[first:], reduction="sum")
        total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    parts = torch.split(gradient, [layer.values.numel() for layer in layers.values()])
    for (name, layer), got in zip(layers.items(), parts, strict=True):
        expected = 0.5 * plain[name].B.grad.flatten()[layer.positions]
        assert off(got, expected) < 1e-3, name


class Plain(nn.Module):
    """base(x) + B A x by autograd alone."""

    def __init__(self, base, A, B):
        super().__init__()
        self.base, self.B = base, nn.Parameter(B)
        self.register_buffer("A", A)

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.A), self.B)


# Through a workspace


@pytest.fixture(scope="module")
def untaught(tiny_base, tmp_path_factory):
    """Three tasks whose defaults are a 4-bit base. Not to be changed."""
    folder = tmp_path_factory.mktemp("untaught") / "ws"
    return make_workspace(folder, tiny_base, base_bits=4, precision="fp32")


@pytest.fixture(scope="module")
def taught(untaught, tmp_path_factory):
    """colour@1. Not to be changed."""
    workspace = copied(untaught, tmp_path_factory.mktemp("taught") / "ws")
    workspace.train(["colour"])
    return workspace


@pytest.fixture
def fresh(untaught, tmp_path):
    return copied(untaught, tmp_path / "fresh")


@pytest.fixture
def ws(taught, tmp_path):
    return copied(taught, tmp_path / "ws")


def whole(workspace):
    """The workspace's settings, with the base as it is."""
    return dataclasses.replace(workspace.settings.config, base_bits=16)


def forbid_the_model(monkeypatch, workspace):
    monkeypatch.setattr(models, "load_base", None)
    workspace._model = None


def test_training_learns_leaves_the_base_as_it_is_and_records_its_bits(fresh):
    config = dataclasses.replace(fresh.settings.config, steps=24, learning_rate=0.1)
    base = fresh.base_model(config)
    before, layers = held(base.model), dict(base.model.named_modules())
    (trained,) = fresh.train(["colour"], config)
    adapter = trained.adapter
    assert adapter.facts["last_loss"] < adapter.facts["first_loss"] - 0.2
    assert fresh.base_model(config) is base
    assert dict(base.model.named_modules()) == layers
    assert same(before, held(base.model))
    assert all(p.grad is None for p in base.model.parameters())
    assert adapter.config["base_bits"] == 4
    assert adapter.versions["bitsandbytes"] not in ("", "unknown")
    assert adapter.base == fresh.store.base().fingerprint == models.fingerprint(fresh.base_folder)
    assert trained.mask.config["base_bits"] == 4


def test_the_same_seed_twice_is_the_same_digest_and_other_bits_are_another(taught, fresh, tmp_path):
    digest = taught.adapter("colour@1").digest
    fresh._model = None  # packed anew
    assert fresh.train(["colour"])[0].adapter.digest == digest
    assert fresh.train(["colour"], whole(fresh))[0].adapter.digest != digest
    assert "bitsandbytes" not in fresh.adapter("colour@2").versions


def test_an_interrupted_training_goes_on_to_the_same_digest(taught, fresh):
    config = dataclasses.replace(fresh.settings.config, checkpoint_seconds=0.0)

    def stop(progress):
        if progress.phase.startswith("training") and progress.step == 2:
            raise KeyboardInterrupt

    fresh.on_progress = stop
    with pytest.raises(KeyboardInterrupt):
        fresh.train(["colour"], config)
    fresh._model = None
    steps = []
    fresh.on_progress = lambda p: steps.append((p.phase, p.step))
    other = dataclasses.replace(config, base_bits=16)
    assert fresh.train(["colour"], other)[0].adapter.config["base_bits"] == 16
    assert ("training colour", 1) in steps
    steps.clear()
    (trained,) = fresh.train(["colour"], config)
    fresh.on_progress = Context.on_progress
    assert ("training colour", 4) in steps
    assert ("training colour", 1) not in steps
    assert trained.adapter.digest == taught.adapter("colour@1").digest


def test_an_adapter_goes_on_from_one_base_to_the_other(ws):
    from lori_manager.teaching import TrainOptions

    for config in (whole(ws), ws.settings.config):
        (trained,) = ws.train(["colour"], config, TrainOptions(start="colour@1"))
        assert trained.adapter.config["base_bits"] == config.base_bits


def test_scores_of_both_bases_are_kept_apart_and_neither_is_run_twice(ws, monkeypatch):
    for ref in ("colour@1", "base"):
        packed_score, plain_score = (
            ws.score([ref], ["colour"], config)[0] for config in (ws.settings.config, whole(ws))
        )
        assert (packed_score.precision, plain_score.precision) == ("fp32-nf4", "fp32")
        assert packed_score.id != plain_score.id
    forbid_the_model(monkeypatch, ws)
    again = ws.score(["colour@1"], ["colour"])[0]
    assert (again.precision, again.subject) == ("fp32-nf4", "colour@1")
    assert ws.score(["colour@1"], ["colour"], whole(ws))[0].precision == "fp32"


def test_a_score_is_that_of_the_base_it_names(untaught, tmp_path):
    ws = make_workspace(tmp_path / "ws", untaught.base_folder, base_bits=4, precision="fp32")
    (task,) = [t for t in ws.store.tasks() if t.name == "colour"]
    ws.add_task("nll", train=tmp_path / "ws" / "tasks" / "colour" / "train.jsonl",
                eval=tmp_path / "ws" / "tasks" / "colour" / "eval.jsonl", scorer="perplexity",
                allow_overlap=True, probe_rows=4)  # fmt: skip
    assert task.scorer != "perplexity"
    values = {}
    for config in (ws.settings.config, whole(ws)):
        (score,) = ws.score(["base"], ["nll"], config)
        values[score.precision] = score.value
    assert values["fp32"] != values["fp32-nf4"] == pytest.approx(values["fp32"], rel=0.05)


def test_the_loaded_base_is_kept_until_other_bits_are_asked_for(fresh):
    config = fresh.settings.config
    four = fresh.base_model(config)
    assert fresh.base_model(dataclasses.replace(config, seed=5)) is four
    sixteen = fresh.base_model(whole(fresh))
    assert (four.base_bits, sixteen.base_bits) == (4, 16)
    assert fresh.base_model(whole(fresh)) is sixteen
    assert fresh.base_model(config).base_bits == 4


def test_a_whole_model_is_exported_from_the_weights_in_the_files(ws, tmp_path):
    ws.export("colour@1", tmp_path / "full", full=True)
    exported, original = (load_base(f, "fp32", "cpu") for f in (tmp_path / "full", ws.base_folder))
    (block,) = ws.weights(ws.adapter("colour@1")).blocks
    for name, B in block.B.items():
        got, true = (b.model.get_submodule(name).weight for b in (exported, original))
        assert torch.allclose(got, true + block.scaling * B.float() @ block.A[name], atol=1e-6)
