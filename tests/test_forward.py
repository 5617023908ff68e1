"""Rows through models: the head, packing and padding give what a plain forward gives."""

import copy
import logging
from types import SimpleNamespace

import architectures
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lori_manager.adapters.lori import in_training
from lori_manager.engine.head import IGNORED, _HeadLoss, head_loss, head_scores
from lori_manager.engine.layers import LoriLinear, attached
from lori_manager.forward import Forward, can_pack, place
from lori_manager.models import BaseModel
from lori_manager.packing import attention_packed
from lori_manager.tasks.batches import Sizes
from lori_manager.tasks.encoding import Encoded

pytestmark = pytest.mark.usefixtures("one_thread")
draw = np.random.default_rng(0)
ROWS = [Encoded(draw.integers(0, 61, n), p) for n, p in ((9, 4), (3, 1), (12, 11), (5, 0), (2, 1))]


def make_base(make, folder, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return BaseModel(make(**changes).eval().requires_grad_(False).to(dtype), folder, "fp32")


def plain(model, rows=ROWS):
    """(hits, nll) of every completion token, a row at a time, from the model's own logits."""
    hits, nll = [], []
    for row in rows:
        logits = model(torch.as_tensor(np.asarray(row.ids, np.int64))[None]).logits[0]
        first = max(row.prompt_length, 1)
        targets = torch.as_tensor(np.asarray(row.ids[first:], np.int64))
        lines = logits[first - 1 : -1].double().log_softmax(-1)
        hits.append(lines.argmax(-1) == targets)
        nll.append(-lines.gather(1, targets[:, None]).flatten())
    return torch.cat(hits), torch.cat(nll)


def wrapped(model, seed=1):
    """Every linear layer but the head as a LoriLinear with a random start."""
    from lori_manager.models import linear_shapes

    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, (out, inner) in linear_shapes(model).items():
        A = torch.randn(3, inner, generator=generator) / inner**0.5
        start = torch.randn(out, 3, generator=generator) * 0.1
        mask = torch.rand(out, 3, generator=generator) < 0.5
        layers[name] = LoriLinear(model.get_submodule(name), A, 0.5, mask, start)
    return layers


@pytest.mark.parametrize("make", architectures.PACKS)
def test_which_architectures_pack(tmp_path, make):
    assert can_pack(make_base(make, tmp_path)) is architectures.PACKS[make]


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("make", architectures.PACKS)
def test_scores_are_those_of_every_row_alone(tmp_path, make, packing):
    base = make_base(make, tmp_path)
    forward = Forward(base, packing=packing)
    with torch.no_grad(), forward.ready():
        hits, nll = forward.scores(place(forward.batch(ROWS), base.device))
    with torch.no_grad():
        expected_hits, expected = plain(base.model)
    assert torch.equal(hits, expected_hits)
    assert torch.allclose(nll.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("make", architectures.PACKS)
def test_loss_and_gradients_are_those_of_plain_layers_row_by_row(tmp_path, make, packing):
    """Joined siblings, one parameter, packed rows, sliced head: against plain autograd."""
    base = make_base(make, tmp_path)
    reference = copy.deepcopy(base.model)
    layers = wrapped(base.model)
    forward = Forward(base, packing=packing)
    with in_training(base, layers) as parameters:
        (values,) = parameters.values()
        values.data = values.data.double()
        for layer in layers.values():
            layer.values = layer.values.double()
        with forward.ready():
            loss = forward.loss(place(forward.batch(ROWS), base.device))
            (gradient,) = torch.autograd.grad(loss, [values])

    plain_layers = wrapped(reference)

    class Plain(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.B = layer, nn.Parameter(layer.B().detach().double())

        def forward(self, x):
            low = F.linear(F.linear(x, self.layer.A.double()), self.B) * self.layer.scaling
            return self.layer.base(x) + low

    modules = {name: Plain(layer) for name, layer in plain_layers.items()}
    with attached(reference, modules):
        _, nll = plain(reference)
        nll.sum().backward()
    assert loss.item() == pytest.approx(nll.sum().item(), rel=1e-6)
    at = 0
    names = {id(layer): name for name, layer in layers.items()}
    seen = []
    for layer in layers.values():
        for one in layer.group.layers:
            if id(one) in seen:
                continue
            seen.append(id(one))
            name = names[id(one)]
            expected = modules[name].B.grad.flatten()[one.positions]
            got = gradient[at : at + len(expected)]
            at += len(expected)
            scale = expected.abs().max()
            assert scale > 0, name
            assert (got - expected).abs().max() < 1e-6 * scale, name
    assert at == values.numel()


def test_filling_up_a_packed_batch_changes_nothing(tmp_path):
    base = make_base(architectures.llama, tmp_path)
    forward = Forward(base, packing="on")
    sizes = Sizes(tokens=40, wanted=30, rows=7, longest=12)
    with torch.no_grad(), forward.ready():
        exact = forward.loss(place(forward.batch(ROWS), base.device))
        filled = forward.batch(ROWS, sizes)
        assert filled.ids.shape == (1, 40)
        assert forward.loss(place(filled, base.device)).item() == pytest.approx(
            exact.item(), rel=1e-12
        )
        hits, nll = forward.scores(place(filled, base.device))
    assert hits.shape == nll.shape == (30,)
    assert not nll[filled.targets == IGNORED].any()


def test_rows_do_not_see_their_neighbours(tmp_path):
    base = make_base(architectures.llama, tmp_path)
    forward = Forward(base, packing="on")
    other = [Encoded((np.asarray(ROWS[0].ids) + 1) % 61, 4), *ROWS[1:]]
    with torch.no_grad(), forward.ready():
        one, two = (
            forward.scores(place(forward.batch(rows), base.device))[1] for rows in (ROWS, other)
        )
    first = len(ROWS[0].ids) - 4
    assert not torch.equal(one[:first], two[:first])
    assert torch.equal(one[first:], two[first:])


def test_the_models_own_attention_comes_back(tmp_path):
    base = make_base(architectures.llama, tmp_path)
    before = base.model.config._attn_implementation
    with attention_packed(base.model):
        assert base.model.config._attn_implementation != before
    assert base.model.config._attn_implementation == before
    ids = torch.arange(12).view(2, 6)
    logits = base.model(ids).logits
    with Forward(base, packing="on").ready():
        pass
    assert torch.equal(base.model(ids).logits, logits)


def test_a_model_whose_packing_is_wrong_is_padded_with_a_line_of_log(tmp_path, monkeypatch, caplog):
    """Positions that do not restart: the check must find it (rotary ones would not matter)."""
    base = make_base(architectures.gpt2, tmp_path)
    positions = base.model.transformer.wpe
    true = positions.forward
    monkeypatch.setattr(positions, "forward", lambda p: true(torch.arange(p.shape[1])[None]))
    with caplog.at_level(logging.INFO, "lori_manager"):
        assert not can_pack(base)
    lines = [r.message for r in caplog.records if r.message.startswith("rows are padded")]
    assert len(lines) == 1
    assert lines[0].startswith("rows are padded, not packed: packing moves logits by")


def test_a_leak_between_rows_is_found(tmp_path, monkeypatch):
    from lori_manager import packing

    def leaky(q, k, v, bounds, scaling, window):
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)

    monkeypatch.setattr(packing, "_padded", leaky)
    assert not can_pack(make_base(architectures.llama, tmp_path))


def test_the_question_is_asked_once_a_model(tmp_path, monkeypatch):
    base = make_base(architectures.llama, tmp_path)
    assert can_pack(base)
    monkeypatch.setattr(type(base.model), "forward", None)
    assert can_pack(base)


@pytest.mark.parametrize("make", [architectures.llama, architectures.gpt2])
def test_the_head_runs_at_wanted_places_alone_where_it_is_all_there_is(tmp_path, make, monkeypatch):
    base = make_base(make, tmp_path)
    forward = Forward(base, packing="on")
    seen = []
    true = _HeadLoss.forward

    def watched(ctx, h, *rest):
        seen.append(tuple(h.shape))
        return true(ctx, h, *rest)

    monkeypatch.setattr(_HeadLoss, "forward", staticmethod(watched))
    with forward.ready(), torch.no_grad():
        forward.loss(place(forward.batch(ROWS), base.device))
    assert seen == [(5 + 2 + 1 + 4 + 1, 32)]


def test_a_model_without_a_known_head_uses_its_plain_forward(tmp_path):
    class Odd(nn.Module):
        """Logits of its own making, and no decoder to ask."""

        config = SimpleNamespace(vocab_size=5)

        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 5)

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=self.embedding(input_ids))

    odd = Odd()
    forward = Forward(BaseModel(odd, tmp_path, "fp32"))
    assert not forward.packed
    row = Encoded([1, 2, 4, 3], 2)
    loss = forward.loss(place(forward.batch([row]), torch.device("cpu")))
    expected = F.cross_entropy(odd.embedding.weight[[2, 4]], torch.tensor([4, 3]), reduction="sum")
    assert loss.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 14, 1 << 20])
def test_the_heads_loss_and_gradient_do_not_depend_on_its_slices(monkeypatch, bias, chunk):
    from lori_manager.engine import head

    monkeypatch.setattr(head, "_CHUNK", chunk)
    g = torch.Generator().manual_seed(0)
    h = torch.randn(6, 4, dtype=torch.float64, generator=g).requires_grad_()
    W = torch.randn(7, 4, dtype=torch.float64, generator=g)
    b = torch.randn(7, dtype=torch.float64, generator=g) if bias else None
    targets = torch.tensor([0, 6, IGNORED, 3, 3, IGNORED])
    assert torch.autograd.gradcheck(lambda x: head_loss(x, W, b, targets) * 3, (h,))
    loss = head_loss(h, W, b, targets)
    expected = F.cross_entropy(F.linear(h, W, b), targets, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    hits, nll = head_scores(h.detach(), W, b, targets)
    assert nll.sum().item() == pytest.approx(expected.item(), rel=1e-12)
    assert hits.tolist() == (F.linear(h, W, b).argmax(1) == targets).tolist()
