"""What an adapter answers to probe prompts, and general text in pieces."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lori_manager.consolidation import answered
from lori_manager.errors import BadData
from lori_manager.generation import generate
from lori_manager.models import BaseModel, load_tokenizer
from lori_manager.tasks.encoding import Encoded
from lori_manager.tasks.general import PIECE, general_rows

pytestmark = pytest.mark.usefixtures("one_thread")


def row(prompt, completion):
    return Encoded(np.array([*prompt, *completion], np.int32), len(prompt))


def test_answers_are_what_the_model_writes_with_the_tokenizers_own_end(talker):
    rows = [row([1, 2, 3], [4, 5, 0]), row([5], [1, 0])]
    said = generate(talker, [[1, 2, 3], [5]], 3, 4)
    for given, found, text in zip(rows, answered(talker, {}, rows, 4), said, strict=True):
        assert found.prompt_length == given.prompt_length
        assert list(found.ids) == [*given.ids[: given.prompt_length], *text, 0]
    # Llama 3 is like this: a model's settings name ends that no completion was taught with.
    other = BaseModel(talker.model, talker.folder, "fp32")
    other.tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=7)
    assert {int(r.ids[-1]) for r in answered(other, {}, rows, 4)} == {7}


def test_a_prompt_that_fills_the_context_loses_its_beginning(tmp_path):
    """As it does where it is scored; rows fit with their own completion, not with any."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                    num_attention_heads=2, max_position_embeddings=12, eos_token_id=0,
                    pad_token_id=0, bos_token_id=None)
    ).eval()  # fmt: skip
    base = BaseModel(model, tmp_path, "fp32")
    base.tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=0)
    rows = [row([1, 2] * 5 + [3], [0]), row([4], [5, 5, 5, 0])]
    long, short = answered(base, {}, rows, 4)
    assert max(len(long.ids), len(short.ids)) <= 12
    assert list(long.ids[: long.prompt_length]) == ([1, 2] * 5 + [3])[-8:]
    assert list(short.ids[:1]) == [4]


def test_general_text_is_in_pieces_spread_over_the_whole_of_it(tiny_base, tmp_path):
    tokenizer = load_tokenizer(tiny_base)  # a token a byte
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(97 + i // PIECE) for i in range(10 * PIECE + 5)))
    rows = general_rows(tokenizer, file, 4)
    assert [len(r.ids) for r in rows] == [PIECE] * 4
    assert [tokenizer.decode(r.ids[:2]) for r in rows] == ["aa", "dd", "gg", "jj"]
    assert len(general_rows(tokenizer, file, 24)) == 10
    assert {len(r.ids) for r in general_rows(tokenizer, file, 4, context=20)} == {20}
    manual = [general_rows(tokenizer, None, 24) for _ in range(2)]
    assert len(manual[0]) == 24
    assert [list(r.ids) for r in manual[0]] == [list(r.ids) for r in manual[1]]


def test_pieces_begin_with_the_token_that_texts_begin_with(tmp_path):
    class Beginning:
        """Puts 1 before plain text, as Gemma's and Llama's do."""

        bos_token_id = 1

        def __call__(self, text, add_special_tokens=True, **_):
            ids = [2 + ord(c) % 50 for c in text]
            return {"input_ids": [1, *ids] if add_special_tokens else ids}

    file = tmp_path / "text.txt"
    file.write_text("so it is " * 100)
    for piece in general_rows(Beginning(), file, 4):
        assert piece.ids[0] == 1
        assert 1 not in piece.ids[1:]
        assert len(piece.ids) == PIECE


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"too short", "9 tokens"), (b"\xff\xfe\xff" * 99, "UTF-8"), (None, "cannot read")],
)
def test_general_text_that_cannot_be_used_is_named(tiny_base, tmp_path, content, told):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadData, match=rf"text\.txt.*|.*{told}") as raised:
        general_rows(load_tokenizer(tiny_base), file, 4)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)
