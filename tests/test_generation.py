"""Generation: what greedy decoding gives, whatever the batches and the model's own settings."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from lori_manager.engine.layers import LoriLinear, attached, low_rank_layers
from lori_manager.engine.update import LowRankUpdate
from lori_manager.errors import BadData
from lori_manager.generation import completions, end_ids, generate
from lori_manager.models import BaseModel, load_base
from lori_manager.scoring import score_rows
from lori_manager.tasks.encoding import Encoded, encode_rows
from lori_manager.tasks.rows import Row
from lori_manager.tasks.scorers import scorers

pytestmark = pytest.mark.usefixtures("one_thread")
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(tiny_base, "fp32", "cpu")


def ragged(count, vocabulary, longest=12, seed=0):
    """Prompts of unlike lengths, none of their tokens 0."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=g).tolist()
    return [torch.randint(1, vocabulary, (n,), generator=g).tolist() for n in lengths]


PROMPTS = ragged(40, 8)


def step_by_step(base, prompt, most, ends):
    """The most likely next token, again and again, from whole forwards of one row."""
    ids = list(prompt)
    for _ in range(most):
        with torch.no_grad():
            token = int(base.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_every_prompt_gets_the_most_likely_tokens_one_after_the_other(talker):
    expected = [step_by_step(talker, prompt, 12, {0}) for prompt in PROMPTS]
    assert generate(talker, PROMPTS, 12, 16) == expected
    lengths = {len(tokens) for tokens in expected}
    assert {0, 12} <= lengths
    assert len(lengths) > 5
    assert len({tuple(tokens) for tokens in expected}) > 20


@pytest.mark.parametrize("batch", [3, 8, 100])
def test_the_size_of_a_batch_changes_no_token(talker, base, batch):
    assert generate(talker, PROMPTS, 12, batch) == generate(talker, PROMPTS, 12, 1)
    bytewise = ragged(12, 256, longest=40)
    alone = generate(base, bytewise, 10, 1)
    assert generate(base, bytewise, 10, batch) == alone
    assert len({tuple(tokens) for tokens in alone}) > 8


def test_learned_positions_count_from_a_prompts_first_token_not_from_its_padding(talker):
    torch.manual_seed(1)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=8, n_embd=32, n_layer=2, n_head=2, n_positions=24,
                   initializer_range=0.6, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    ).eval()  # fmt: skip
    base = BaseModel(model, talker.folder, "fp32")
    base.tokenizer = talker.tokenizer
    expected = [step_by_step(base, prompt, 12, {0}) for prompt in PROMPTS]
    assert generate(base, PROMPTS, 12, 16) == expected
    assert len({tuple(tokens) for tokens in expected}) > 20


def test_without_the_cache_the_tokens_are_the_same(talker):
    assert generate(talker, PROMPTS, 12, 8, cache=False) == generate(talker, PROMPTS, 12, 8)


def test_where_a_text_may_not_end_yet_it_goes_on(talker):
    short = generate(talker, PROMPTS, 12, 8)
    forced = generate(talker, PROMPTS, 12, 8, min_new_tokens=12)
    assert {len(tokens) for tokens in forced} == {12}
    assert all(b[: len(a)] == a for a, b in zip(short, forced, strict=True))


def test_exact_match_of_one_forward_is_generation_compared(talker):
    said = generate(talker, PROMPTS, 12, 8)
    ended = [(p, s) for p, s in zip(PROMPTS, said, strict=True) if len(s) < 12]
    right = [Encoded([*p, *s, 0], len(p)) for p, s in ended]
    wrong = [Encoded([*p, *s, s[-1] if s else 1, 0], len(p)) for p, s in ended]
    rows = [Row("p", "c")] * len(ended)
    assert len(ended) > 5
    for encoded, expected in ((right, 1.0), (wrong, 0.0)):
        outcomes, _ = score_rows(talker, rows, encoded, scorers.get("exact_match"), 8)
        assert set(outcomes.tolist()) == {expected}


UNWANTED = {
    "do_sample": True, "temperature": 9.0, "top_k": 0, "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1, "suppress_tokens": [1, 2, 3], "forced_eos_token_id": 0,
    "min_new_tokens": 7, "max_length": 3, "num_beams": 3, "num_return_sequences": 1,
    "bad_words_ids": [[4]], "renormalize_logits": True, "use_cache": False,
}  # fmt: skip


def test_the_models_own_settings_neither_apply_nor_change(talker, monkeypatch):
    expected = generate(talker, PROMPTS, 12, 8)
    own = GenerationConfig(**UNWANTED)
    monkeypatch.setattr(talker.model, "generation_config", own)
    before = own.to_dict()
    assert generate(talker, PROMPTS, 12, 8) == expected
    assert talker.model.generation_config is own
    assert own.to_dict() == before
    with pytest.raises(IndexError):
        generate(talker, [[999]], 12, 8)
    assert talker.model.generation_config is own


def test_any_of_the_models_end_tokens_ends_a_text_and_is_left_out(talker, monkeypatch):
    monkeypatch.setattr(talker.model, "generation_config", GenerationConfig(eos_token_id=[3, 5]))
    assert end_ids(talker) == {0, 3, 5}
    expected = [step_by_step(talker, prompt, 12, {0, 3, 5}) for prompt in PROMPTS]
    assert generate(talker, PROMPTS, 12, 8) == expected
    assert not any({0, 3, 5} & set(tokens) for tokens in expected)


def test_without_any_end_token_every_text_has_all_its_tokens(talker, monkeypatch):
    for owner in (talker.tokenizer, talker.model.config, talker.model.generation_config):
        monkeypatch.setattr(owner, "eos_token_id", None)
    assert end_ids(talker) == set()
    assert {len(tokens) for tokens in generate(talker, PROMPTS, 5, 8)} == {5}


def test_nothing_is_warned_of_also_where_a_prompt_ends_in_the_padding_token(
    talker, caplog, recwarn
):
    generate(talker, [[1, 0], [2, 3], [4]], 4, 3, min_new_tokens=2)
    assert not caplog.records
    assert not recwarn.list
    talker.model.generate(torch.tensor([[1, 0], [2, 3]]), max_new_tokens=1)
    assert "right-padding" in caplog.text


def test_progress_counts_prompts_up_to_all_and_the_longest_go_first(talker, monkeypatch):
    seen, widths = [], []
    original = talker.model.generate

    def watched(ids, **kwargs):
        widths.append(ids.shape[1])
        return original(ids, **kwargs)

    monkeypatch.setattr(talker.model, "generate", watched)
    generate(talker, PROMPTS[:9], 3, 4, lambda *done: seen.append(done))
    assert seen == [(4, 9), (8, 9), (9, 9)]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == max(len(p) for p in PROMPTS[:9])


def test_no_prompts_give_no_texts(talker):
    assert generate(talker, [], 4, 8) == []
    assert completions(talker, [], 4, 8) == []


def test_what_does_not_fit_the_context_or_makes_no_sense_is_refused(base):
    assert base.context == 128
    assert len(generate(base, [[1] * 120], 8, 1)[0]) <= 8
    with pytest.raises(BadData, match=r"prompt 2 has 121 tokens, .* context of 128 .* 8 new"):
        generate(base, [[1], [1] * 121], 8, 1)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(base, [[]], 8, 1)
    with pytest.raises(ValueError, match="`max_new_tokens` must be at least 1, got 0"):
        generate(base, [[1]], 0, 1)


def test_attached_layers_are_generated_with(base):
    g = torch.Generator().manual_seed(0)
    update = LowRankUpdate(torch.randn(2, 64, generator=g), torch.randn(32, 2, generator=g))
    prompts = ragged(10, 256, seed=1)
    plain = generate(base, prompts, 8, 4)
    layer = base.model.get_submodule(DOWN)
    merged = nn.Linear(64, 32, bias=False)
    merged.weight.data = layer.weight + update.scaling * update.B @ update.A
    with attached(base.model, {DOWN: merged}):
        expected = generate(base, prompts, 8, 4)
    trained = LoriLinear(layer, update.A, update.scaling, start=update.B)
    for layers in (low_rank_layers(base.model, {DOWN: update}), {DOWN: trained}):
        with attached(base.model, layers):
            assert generate(base, prompts, 8, 4) == expected
    assert expected != plain
    assert generate(base, prompts, 8, 4) == plain


def test_completions_are_what_is_generated_and_the_rows_own_as_text(base):
    rows = [
        Row("Count: ", " one two"),
        Row("a much longer prompt, ", " \N{SNOWMAN} é"),
        Row("", "x"),
    ]
    encoded = encode_rows(base.tokenizer, rows, max_length=100, context=128)
    found = completions(base, encoded, 6, 2)
    assert [own for _, own in found] == [" one two", " \N{SNOWMAN} é", "x"]
    said = generate(base, [e.ids[: e.prompt_length] for e in encoded], 6, 1)
    assert [text for text, _ in found] == [base.tokenizer.decode(ids) for ids in said]


def test_special_tokens_are_no_part_of_either_text(base, monkeypatch):
    end = base.tokenizer.eos_token_id
    monkeypatch.setattr("lori_manager.generation.generate", lambda *_: [[72, end, 73]])
    ((text, own),) = completions(base, [Encoded([1, 73, end, 72, end], 1)], 4, 1)
    first, second = base.tokenizer.decode([72]), base.tokenizer.decode([73])
    assert first != second
    assert (text, own) == (first + second, second + first)


@pytest.fixture
def asked(monkeypatch):
    """(prompts, new tokens) of each call of `generate` by `completions`; it writes one token."""
    seen = []

    def generate(base, prompts, most, *_):
        seen.append(([[int(i) for i in p] for p in prompts], most))
        return [[104] for _ in prompts]

    monkeypatch.setattr("lori_manager.generation.generate", generate)
    return seen


def test_a_prompt_that_leaves_no_room_loses_its_beginning_but_not_the_begin_of_text(
    base, monkeypatch, asked
):
    """The context is 128."""
    ids = list(range(120))
    row, short = Encoded([*ids, 7, 8], 120), Encoded([0, 1, 2, 7], 3)
    completions(base, [row, short], 20, 1)
    known = {name: getattr(base.tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    beginning = SimpleNamespace(bos_token_id=0, decode=base.tokenizer.decode, **known)
    monkeypatch.setattr(base, "tokenizer", beginning)
    completions(base, [row, short], 20, 1)
    assert asked == [([ids[-108:], [0, 1, 2]], 20), ([[0, *ids[-107:]], [0, 1, 2]], 20)]


def test_new_tokens_take_at_most_half_of_the_context(base, asked):
    ids = list(range(128))
    completions(base, [Encoded(ids, 100)], 512, 1)
    completions(base, [Encoded(ids, 100)], 10, 1)
    assert asked == [([ids[36:100]], 64), ([ids[:100]], 10)]
