"""Prefix tuning: PEFT's logits on every architecture, padded rows, greedy text, refusals."""

import copy
from types import SimpleNamespace

import architectures
import numpy as np
import pytest
import torch
from peft import PeftModel

from lori_manager.adapters import prefix
from lori_manager.adapters.applying import applied
from lori_manager.config import Config
from lori_manager.engine.weights import KindWeights
from lori_manager.errors import InvalidInput, WrongBase
from lori_manager.forward import Forward, can_pack, place
from lori_manager.generation import generate
from lori_manager.kinds import resolved
from lori_manager.models import BaseModel, load_base
from lori_manager.tasks.encoding import Encoded

pytestmark = pytest.mark.usefixtures("one_thread")
draw = np.random.default_rng(0)
ROWS = [Encoded(draw.integers(0, 61, n), p) for n, p in ((9, 4), (3, 1), (12, 11))]
TOLD = {"base_name": "tiny", "revision": None, "fingerprint": "f" * 64, "label": "x@1"}


def made(make, tmp_path, **changes):
    torch.manual_seed(0)
    model = make(initializer_range=0.3, **changes).eval()
    model.requires_grad_(False)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    base = BaseModel(model, tmp_path, "fp32")
    base.tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=None)
    return base


def config(count=3, **options):
    return resolved(Config(kind="prefix", kind_options={"num_virtual_tokens": count, **options}))


def drawn(base, count=3, seed=0):
    with prefix.training(base, config(count).replace(seed=seed), steps=1) as training:
        return training.weights(torch.float32)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(np.asarray(ids))[None].long()).logits[0]


def in_peft(base, weights, folder):
    prefix.write(weights, folder, TOLD)
    return PeftModel.from_pretrained(copy.deepcopy(base.model), folder).eval()


@pytest.mark.parametrize("count", [3, 9])
@pytest.mark.parametrize("make", architectures.PACKS)
def test_peft_gives_the_same_logits_after_an_export(make, count, tmp_path):
    base = made(make, tmp_path)
    weights = drawn(base, count)
    plain = logits(base.model, ROWS[0].ids)
    theirs = in_peft(base, weights, tmp_path / "out")
    for row in ROWS:
        with applied(base, weights):
            ours = logits(base.model, row.ids)
        peers = logits(theirs, row.ids)
        assert (ours - peers).abs().max() <= 1e-5 * ours.abs().max()
    assert (logits(base.model, ROWS[0].ids) - plain).abs().max() == 0
    with applied(base, weights):
        assert (logits(base.model, ROWS[0].ids) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("make", architectures.PACKS)
def test_rows_together_get_the_logits_that_each_has_alone(make, tmp_path):
    base = made(make, tmp_path)
    with applied(base, drawn(base)):
        forward = Forward(base, packing="on")
        assert not forward.packed
        with forward.ready():
            _, nll = forward.scores(place(forward.batch(ROWS), base.device))
        alone = []
        for row in ROWS:
            told = logits(base.model, row.ids).log_softmax(-1)
            at = torch.arange(row.prompt_length - 1, len(row.ids) - 1)
            alone.append(-told[at, torch.as_tensor(row.ids).long()[at + 1]])
    assert torch.allclose(nll, torch.cat(alone), atol=1e-4)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("make", architectures.PACKS)
def test_what_is_generated_is_what_every_forward_would_say(make, cache, tmp_path):
    """Prompts of several lengths, padded on the left, against argmax after argmax alone."""
    windows = (architectures.mistral, architectures.gemma2, architectures.gemma3)
    base = made(make, tmp_path, **({"sliding_window": 24} if make in windows else {}))
    prompts = [list(row.ids[:n]) for row, n in zip(ROWS, (9, 2, 5), strict=True)]
    with applied(base, drawn(base, 4)):
        said = generate(base, prompts, 6, 3, cache=cache)
        for prompt, tokens in zip(prompts, said, strict=True):
            ids = [int(i) for i in prompt]
            for token in tokens:
                told = logits(base.model, ids)[-1]
                assert told[token] >= told.max() - 1e-4
                ids.append(token)
    assert [len(tokens) for tokens in said] == [6, 6, 6]


def test_a_window_that_padding_pushes_the_prefix_out_of_is_told(tmp_path):
    base = made(architectures.mistral, tmp_path)
    with applied(base, drawn(base)):
        with pytest.raises(InvalidInput, match="window of 4 tokens"):
            generate(base, [[1, 2], [3, 4, 5]], 4, 2)
        said = generate(base, [[1, 2], [3, 4, 5]], 4, 1)
        told = logits(base.model, [1, 2, *said[0][:-1]])[-1]
    assert told[said[0][-1]] >= told.max() - 1e-4


@pytest.mark.parametrize("make", [architectures.llama, architectures.gpt2])
def test_peft_writes_the_same_text(make, tmp_path):
    base = made(make, tmp_path)
    weights, prompt = drawn(base, 4), [int(i) for i in ROWS[0].ids]
    with applied(base, weights):
        (ours,) = generate(base, [prompt], 8, 1)
    theirs = in_peft(base, weights, tmp_path / "out")
    found = theirs.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(),
        max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    assert found[0, len(prompt) :].tolist() == ours


def test_packing_is_asked_for_again_afterwards(tmp_path):
    base = made(architectures.llama, tmp_path)
    weights = drawn(base)
    with applied(base, weights):
        assert not can_pack(base)
    assert can_pack(base)
    with applied(base, weights):
        assert not can_pack(base)
    assert can_pack(base)


def test_a_projection_is_folded_away(tmp_path):
    base = made(architectures.llama, tmp_path)
    settings = config(projection=True, hidden=5)
    with prefix.training(base, settings, steps=1) as training:
        assert {n: tuple(p.shape) for n, p in training.parameters.items()} == {
            "embedding.weight": (3, 16), "transform.0.weight": (5, 16), "transform.0.bias": (5,),
            "transform.2.weight": (64, 5), "transform.2.bias": (64,),
        }  # fmt: skip
        during = base.model(input_ids=torch.arange(6)[None]).logits
        weights = training.weights(torch.float32)
        (gradient,) = torch.autograd.grad(during.sum(), [training.parameters["transform.0.bias"]])
    assert gradient.abs().sum() > 0
    assert {n: tuple(t.shape) for n, t in weights.tensors.items()} == {prefix.TENSOR: (3, 64)}
    with applied(base, weights):
        assert torch.allclose(logits(base.model, np.arange(6)), during[0], atol=1e-6)


def test_training_goes_on_from_a_prefix_of_as_many_tokens(tmp_path):
    base = made(architectures.llama, tmp_path)
    parent = drawn(base, 3)
    with prefix.training(base, config(3, projection=True), steps=1, start=parent) as training:
        assert torch.equal(training.parameters["embedding.weight"], parent.tensors[prefix.TENSOR])
    with (
        pytest.raises(InvalidInput, match="3 virtual tokens, this training 4"),
        prefix.training(base, config(4), steps=1, start=parent),
    ):
        pass


def test_checkpointing_is_refused(tmp_path):
    base = made(architectures.llama, tmp_path)
    with (
        pytest.raises(InvalidInput, match="leave --checkpointing out"),
        prefix.training(base, config().replace(checkpointing="on"), steps=1),
    ):
        pass


@pytest.mark.parametrize("options", [{"num_virtual_tokens": 0}, {"hidden": -1}])
def test_unusable_options_are_refused(options, tmp_path):
    settings = resolved(Config(kind="prefix", kind_options=options))
    base = made(architectures.llama, tmp_path)
    with pytest.raises(InvalidInput, match="at least"), prefix.training(base, settings, steps=1):
        pass


def test_more_tokens_than_learned_positions_are_refused(tmp_path):
    base = made(architectures.gpt2, tmp_path)
    with applied(base, drawn(base, 30)):
        logits(base.model, [1, 2])
        with pytest.raises(InvalidInput, match=r"30 virtual tokens and 3 of a row .* 32 positions"):
            logits(base.model, [1, 2, 3])


def test_a_prefix_of_another_model_is_refused(tmp_path):
    base = made(architectures.llama, tmp_path)
    weights = drawn(made(architectures.llama, tmp_path, num_hidden_layers=3))
    with pytest.raises(WrongBase, match="another model"), applied(base, weights):
        pass
    cut = KindWeights("prefix", drawn(base).options, {prefix.TENSOR: torch.ones(3, 63)})
    with pytest.raises(WrongBase, match="another model"), applied(base, cut):
        pass


def test_bf16_bases_take_float32_prefixes(tiny_base):
    base = load_base(tiny_base, "bf16", "cpu")
    weights = drawn(base)
    with applied(base, weights):
        assert logits(base.model, np.arange(5)).dtype == torch.bfloat16
    with prefix.training(base, config(), steps=1) as training:
        loss = base.model(input_ids=torch.arange(5)[None]).logits.float().sum()
        (p,) = training.parameters.values()
        assert torch.autograd.grad(loss, [p])[0].dtype == torch.float32


def test_virtual_tokens_that_leave_no_room_for_rows_are_refused(tmp_path):
    base = made(architectures.llama, tmp_path)
    context = base.model.config.max_position_embeddings
    count = context - 1
    said = f"{count} virtual tokens leave no room for rows in the model's context of {context}"
    with pytest.raises(InvalidInput, match=said), prefix.training(base, config(count), steps=1):
        pass
    with prefix.training(base, config(count - 1), steps=1):
        pass
