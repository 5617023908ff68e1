"""Encoding: ids by hand, truncation, begin of text, choices, chat templates."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lori_manager.errors import BadData, InvalidInput
from lori_manager.tasks.encoding import (
    Encoded,
    chat_renderer,
    encode_choices,
    encode_rows,
    lengths_summary,
)
from lori_manager.tasks.rows import Row, parse_row

WORDS = ["<unk>", "<s>", "</s>", "<turn>", "<end>"]
WORDS += [f"{space}{word}" for word in "abcdefghij" for space in ("", " ")]
ID = {word: i for i, word in enumerate(WORDS)}
EOS, BOS = ID["</s>"], ID["<s>"]
CHATML = (
    "{% for m in messages %}{{ '<turn>' + m['role'] + ': ' + m['content'] + '" + "EOT" + "\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def make_tokenizer():
    """A tokenizer of single letters, with and without the space before them."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(adds_bos=False, eos="</s>", bos="<s>", template=None):
        inner = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[a-z]"), "isolated")
        if adds_bos:
            inner.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", BOS)]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, unk_token="<unk>", eos_token=eos, bos_token=bos,
            additional_special_tokens=["<s>", "</s>", "<turn>", "<end>"],
            chat_template=template,
        )  # fmt: skip

    return make


class SlowTokenizer:
    """What the slow path answers: lists, one text at a time inside."""

    bos_token_id, eos_token_id, eos_token = None, EOS, "</s>"

    def __call__(self, text, **kwargs):
        if isinstance(text, str):
            return {"input_ids": [ID[c] for c in text]}
        return {"input_ids": [[ID[c] for c in one] for one in text]}


def ids(text):
    return [ID[part] for part in text.split("|")]


def encode(tokenizer, *rows, max_length=64, context=None):
    return encode_rows(tokenizer, rows, max_length=max_length, context=context)


def test_prompt_and_completion_are_tokenised_apart_and_end_of_text_comes_last(make_tokenizer):
    [one, two] = encode(make_tokenizer(), Row("a b", " c d"), Row("e", "f"))
    assert one.ids.tolist() == ids("a| b| c| d|</s>")
    assert one.ids.dtype == np.int32
    assert (one.prompt_length, one.truncated) == (2, 0)
    assert two.ids.tolist() == ids("e|f|</s>")


def test_no_rows_encode_to_nothing(make_tokenizer):
    assert encode(make_tokenizer()) == []


def test_a_slow_tokenizer_gives_the_same(make_tokenizer):
    rows = [Row("abc", "d"), Row("a", "bcd"), Row("abc", "bcd")]
    fast, slow = encode(make_tokenizer(), *rows), encode(SlowTokenizer(), *rows)
    assert [e.ids.tolist() for e in fast] == [e.ids.tolist() for e in slow]


def test_a_real_slow_tokenizer_is_read_too():
    from transformers import PreTrainedTokenizer

    class Letters(PreTrainedTokenizer):
        vocab_size = len(WORDS)

        def get_vocab(self):
            return dict(ID)

        def _tokenize(self, text, **kwargs):
            return list(text)

        def _convert_token_to_id(self, token):
            return ID.get(token, 0)

        def _convert_id_to_token(self, index):
            return WORDS[index]

    tokenizer = Letters(eos_token="</s>", unk_token="<unk>")
    [one, two] = encode(tokenizer, Row("ab", "c"), Row("", "c"))
    assert one.ids.tolist() == ids("a|b|c|</s>")
    assert two.ids.tolist() == ids("</s>|c|</s>")


def test_a_tokenizer_that_begins_text_with_a_token_gets_it_once(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    [one, two, three] = encode(tokenizer, Row("a", "b"), Row("<s>a", "b"), Row("", "b"))
    assert one.ids.tolist() == two.ids.tolist() == ids("<s>|a|b|</s>")
    assert one.prompt_length == two.prompt_length == 2
    assert three.ids.tolist() == ids("<s>|b|</s>")


def test_an_empty_prompt_becomes_one_token_so_that_every_completion_token_is_predicted(
    make_tokenizer,
):
    [one] = encode(make_tokenizer(), Row("", "b"))
    assert (one.ids.tolist(), one.prompt_length) == (ids("<s>|b|</s>"), 1)
    [one] = encode(make_tokenizer(bos=None), Row("", "b"))
    assert (one.ids.tolist(), one.prompt_length) == (ids("</s>|b|</s>"), 1)


def test_an_end_of_text_that_the_completion_brings_is_not_doubled(make_tokenizer):
    [one] = encode(make_tokenizer(), Row("a", "b</s>"))
    assert one.ids.tolist() == ids("a|b|</s>")


def test_a_prompt_that_is_too_long_loses_its_beginning(make_tokenizer):
    row = Row("a b c d e f", " g h")
    [one] = encode(make_tokenizer(), row, max_length=6)
    assert one.ids.tolist() == ids(" d| e| f| g| h|</s>")
    assert (one.prompt_length, one.truncated) == (3, 3)
    [one] = encode(make_tokenizer(adds_bos=True), row, max_length=6)
    assert one.ids.tolist() == ids("<s>| e| f| g| h|</s>")
    assert (one.prompt_length, one.truncated) == (3, 4)
    [one] = encode(make_tokenizer(adds_bos=True), row, max_length=64, context=4)
    assert one.ids.tolist() == ids("<s>| g| h|</s>")
    [one] = encode(make_tokenizer(), row, max_length=9)
    assert (len(one.ids), one.truncated) == (9, 0)
    [one] = encode(make_tokenizer(), row, max_length=8)
    assert (len(one.ids), one.truncated) == (8, 1)


def test_a_completion_that_leaves_no_room_is_refused_with_its_row(make_tokenizer):
    row = Row("a", " b c d", where="train.jsonl, line 3")
    with pytest.raises(BadData, match=r"train.jsonl, line 3: the completion has 4 tokens") as e:
        encode(make_tokenizer(), Row("a", "b"), row, max_length=4)
    assert "raise `max_length`" in str(e.value)
    with pytest.raises(BadData, match=r"row 1: .* the model's context of 3 must") as e:
        encode(make_tokenizer(), Row("a", " b c d"), max_length=64, context=3)
    assert "raise" not in str(e.value)


def test_a_tokenizer_without_end_of_text_is_refused(make_tokenizer):
    with pytest.raises(InvalidInput, match="eos_token"):
        encode(make_tokenizer(eos=None), Row("a", "b"))


def test_a_completion_that_the_tokenizer_drops_is_refused():
    class Deaf(SlowTokenizer):
        def __call__(self, text, **kwargs):
            return {"input_ids": [] if isinstance(text, str) else [[] for _ in text]}

    with pytest.raises(BadData, match="row 1: the tokenizer finds no token"):
        encode(Deaf(), Row("a", "b"))


def test_lengths_are_summed_up_before_and_after_truncation():
    def one(length, cut=0):
        return Encoded(np.zeros(length, np.int32), 1, cut)

    encoded = [one(length) for length in range(1, 20)] + [one(20, 5)]
    assert lengths_summary(encoded) == {
        "rows": 20, "tokens": 210, "median": 11, "p95": 19, "longest": 25, "truncated": 1
    }  # fmt: skip
    assert lengths_summary([one(3)]) == {
        "rows": 1, "tokens": 3, "median": 3, "p95": 3, "longest": 3, "truncated": 0
    }  # fmt: skip
    assert set(lengths_summary([]).values()) == {0}


def choice_row(completion, choices, **extra):
    return parse_row({"prompt": "p", "completion": completion, "choices": choices, **extra}, "x")


def test_choices_are_encoded_as_they_follow_the_prompt(make_tokenizer):
    tokenizer = make_tokenizer()
    row = choice_row(" b c", ["a", "b c", " d"])
    assert encode_choices(tokenizer, row) == ([ids(" a"), ids(" b| c"), ids(" d")], 1)
    row = choice_row("a b", ["b", "c"], answer="b")
    assert encode_choices(tokenizer, row) == ([ids("a| b"), ids("a| c")], 0)


def test_the_right_choice_is_what_encode_rows_puts_after_the_prompt(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    for row in (choice_row(" b c", ["a", "b c"]), choice_row("a b", ["b", "c"], answer="b")):
        [encoded] = encode(tokenizer, row)
        candidates, right = encode_choices(tokenizer, row)
        assert [*candidates[right], EOS] == encoded.ids[encoded.prompt_length :].tolist()


def test_choices_that_cannot_be_told_apart_are_refused(make_tokenizer):
    with pytest.raises(BadData, match="same tokens"):
        encode_choices(make_tokenizer(), choice_row("é", ["é", "ü"]))
    with pytest.raises(BadData, match="no `choices`"):
        encode_choices(make_tokenizer(), Row("a", "b"))


USER, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}


def test_chat_is_cut_where_the_assistant_begins_and_the_turn_ends(make_tokenizer):
    tokenizer = make_tokenizer(template=CHATML.replace("EOT", "</s>"))
    prompt, completion = chat_renderer(tokenizer)([USER, REPLY, USER, REPLY])
    assert prompt == (
        "<turn>user: a</s>\n<turn>assistant: b c</s>\n<turn>user: a</s>\n<turn>assistant: "
    )
    assert completion == "b c"


def test_an_end_of_turn_that_is_not_end_of_text_stays(make_tokenizer):
    tokenizer = make_tokenizer(template=CHATML.replace("EOT", "<end>"))
    assert chat_renderer(tokenizer)([USER, REPLY])[1] == "b c<end>"
    [encoded] = encode(tokenizer, Row("a", "b c<end>"))
    assert encoded.ids.tolist() == ids("a|b| c|<end>|</s>")


def test_white_space_of_the_content_stays_and_that_of_the_template_goes(make_tokenizer):
    reply = {"role": "assistant", "content": "b c \n"}
    for end, completion in (("</s>", "b c \n"), ("<end>", "b c \n<end>"), ("", "b c \n")):
        tokenizer = make_tokenizer(template=CHATML.replace("EOT", end))
        assert chat_renderer(tokenizer)([USER, reply])[1] == completion
    trims = CHATML.replace("EOT", "</s>").replace("m['content']", "m['content'] | trim")
    assert chat_renderer(make_tokenizer(template=trims))([USER, reply])[1] == "b c"


def test_content_that_names_the_end_of_text_is_cut_only_at_its_end(make_tokenizer):
    reply = {"role": "assistant", "content": "b</s>c"}
    tokenizer = make_tokenizer(template=CHATML.replace("EOT", "</s>"))
    assert chat_renderer(tokenizer)([USER, reply])[1] == "b</s>c"
    upper = CHATML.replace("EOT", "</s>").replace("m['content']", "m['content'] | upper")
    assert chat_renderer(make_tokenizer(template=upper))([USER, REPLY])[1] == "B C"


def test_a_template_that_writes_history_differently_is_refused(make_tokenizer):
    thinks = CHATML.replace("EOT", "</s>").replace("assistant: ' }", "assistant: <think>' }")
    with pytest.raises(BadData, match="cannot be told apart"):
        chat_renderer(make_tokenizer(template=thinks))([USER, REPLY])


def test_a_missing_or_failing_template_is_told(make_tokenizer):
    with pytest.raises(BadData, match="no chat template"):
        chat_renderer(make_tokenizer())([USER, REPLY])
    for template in ("{{ raise_exception('roles must alternate') }}", "{{ 1 / 0 }}", "{% if %}",
                     "{{ messages[0].none.x }}"):  # fmt: skip
        render = chat_renderer(make_tokenizer(template=template))
        with pytest.raises(BadData, match=r"train.jsonl, line 2: the chat template refuses"):
            parse_row({"messages": [USER, REPLY]}, "train.jsonl, line 2", render)


def test_reading_and_encoding_import_neither_torch_nor_transformers():
    code = (
        "import sys, lori_manager.tasks.sources, lori_manager.tasks.splits, "
        "lori_manager.tasks.encoding\n"
        "print({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")
