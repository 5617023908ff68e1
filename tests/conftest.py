"""What tests of several parts share."""

import logging
import os

import pytest

# Read when torch and tqdm are imported: threads that wait without spinning, for tiny
# matrices on busy cores, and no bars between what commands print.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TQDM_DISABLE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several at work: a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# What takes long begins first, so that no worker is left alone with it at the end.
LONG = ("test_real_model", "test_ranks", "test_on_", "test_kill", "test_crowds", "test_power")


def pytest_collection_modifyitems(items):
    def late(item):
        return next((i for i, name in enumerate(LONG) if name in item.path.name), len(LONG))

    items.sort(key=late)


CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="session")
def cache_for_tests(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def own_cache(cache_for_tests):
    """No test reads or fills the cache of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORI_CACHE", str(cache_for_tests))
        yield


@pytest.fixture(autouse=True)
def logging_as_before():
    """A command sets lori's log level, and writes to a stream that ends with its test."""
    yield
    logger = logging.getLogger("lori_manager")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A folder with a random Llama of two layers and a tokenizer whose tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bases") / "tiny"
    end = "<|end|>"
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end, chat_template=CHAT
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary) + 1,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            eos_token_id=len(vocabulary),
            pad_token_id=len(vocabulary),
            bos_token_id=None,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A random model of few tokens and large weights: it says many things, and ends often (0)."""
    from types import SimpleNamespace

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lori_manager.models import BaseModel

    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, initializer_range=0.6,
                    eos_token_id=0, pad_token_id=0, bos_token_id=None)
    ).eval()  # fmt: skip
    base = BaseModel(model, tmp_path_factory.mktemp("talker"), "fp32")
    base.tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=0)
    return base


@pytest.fixture(scope="module")
def one_thread():
    """Several threads on matrices this small only wait for one another."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def s3():
    """A real S3 server on loopback."""
    import buckets

    if buckets.missing():
        pytest.skip(f"S3 IS NOT TESTED: {', '.join(buckets.missing())} not installed (extra dev)")
    with buckets.serving() as server:
        yield server


@pytest.fixture
def bucket(s3, monkeypatch):
    """A new bucket, with the credentials for it in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3.bucket()


@pytest.fixture(scope="session")
def postgres_server():
    """A PostgreSQL server of the tests' own."""
    import servers

    lacking = servers.missing()
    if lacking:
        pytest.skip(f"POSTGRESQL IS NOT TESTED: {lacking}")
    with servers.serving() as server:
        yield server
