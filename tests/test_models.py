"""The base: its fingerprint, where it lies, its layers."""

import json
import shutil

import architectures
import pytest
import torch
from safetensors.torch import save_file

from lori_manager.config import Config
from lori_manager.errors import InvalidInput, NotFound, WrongBase
from lori_manager.models import (
    check_rank,
    fingerprint,
    linear_shapes,
    load_base,
    load_skeleton,
    load_tokenizer,
    locate,
    read_config,
    resolve_precision,
    resolve_targets,
    score_precision,
    weight_files,
)

pytestmark = pytest.mark.usefixtures("one_thread")


TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.zeros(0, 2),
}


def folder_of(path, shards, metadata=None, index=True):
    """A model folder whose weights are these shards, in this order."""
    path.mkdir()
    names = [f"model-{i:05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file({k: v.clone() for k, v in shard.items()}, path / name, metadata)
    if index:
        weight_map = {k: n for n, shard in zip(names, shards, strict=True) for k in shard}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def one_file(path, tensors=TENSORS, metadata=None):
    path.mkdir()
    save_file({k: v.clone() for k, v in tensors.items()}, path / "model.safetensors", metadata)
    return path


def test_the_fingerprint_is_the_pinned_one(tmp_path):
    """Workspaces hold it: it must never change for the same weights."""
    mark = "3a948877a148801c4bdf7cd2919e3eabb78b51c2ba5318290f2c4167333469a1"
    assert fingerprint(one_file(tmp_path / "m")) == mark


def test_shards_order_and_metadata_do_not_change_the_fingerprint(tmp_path):
    mark = fingerprint(one_file(tmp_path / "one"))
    part = {k: {k: v} for k, v in TENSORS.items()}
    others = [
        one_file(tmp_path / "two", dict(reversed(TENSORS.items()))),
        one_file(tmp_path / "three", metadata={"format": "pt", "note": "x" * 300}),
        folder_of(tmp_path / "four", [part["c"], part["a"], part["b"]]),
        folder_of(tmp_path / "five", [part["b"], {**part["a"], **part["c"]}], {"x": "y"}),
        folder_of(tmp_path / "six", [part["b"] | part["c"], part["a"]], index=False),
    ]
    assert {fingerprint(folder) for folder in others} == {mark}


def flipped(tensor):
    other = tensor.clone()
    other.view(torch.int16 if tensor.element_size() == 2 else torch.int32).view(-1)[-1] ^= 1
    return other


@pytest.mark.parametrize(
    "change",
    [
        {"a": flipped(TENSORS["a"])},
        {"b": flipped(TENSORS["b"])},
        {"a": TENSORS["a"].view(3, 2).clone()},
        {"b": TENSORS["b"].view(torch.float16)},
        {"c": torch.zeros(2, 0)},
        {"d": torch.zeros(1)},
        {"a": TENSORS["a"].view(torch.int32)},
    ],
)
def test_one_bit_a_shape_a_type_or_a_tensor_more_is_another_base(tmp_path, change):
    mark = fingerprint(one_file(tmp_path / "one"))
    assert fingerprint(one_file(tmp_path / "two", TENSORS | change)) != mark


def test_swapped_or_renamed_tensors_are_another_base(tmp_path):
    marks = {
        fingerprint(one_file(tmp_path / name, {names[0]: torch.zeros(2), names[1]: torch.ones(2)}))
        for name, names in (("one", "ab"), ("two", "ba"), ("three", "ac"))
    }
    assert len(marks) == 3


def test_an_unchanged_folder_is_not_read_again_and_a_changed_one_is(tmp_path):
    folder, cache = one_file(tmp_path / "m"), tmp_path / "cache.json"
    mark = fingerprint(folder, cache)
    known = json.loads(cache.read_text())
    assert known["fingerprint"] == mark
    cache.write_text(json.dumps(known | {"fingerprint": "from the cache"}))
    assert fingerprint(folder, cache) == "from the cache"
    save_file(TENSORS | {"b": flipped(TENSORS["b"])}, folder / "model.safetensors")
    changed = fingerprint(folder, cache)
    assert changed not in (mark, "from the cache")
    assert fingerprint(folder, cache) == changed == fingerprint(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"files": []}', "\x00"])
def test_a_spoiled_cache_is_written_anew(tmp_path, content):
    folder, cache = one_file(tmp_path / "m"), tmp_path / "cache.json"
    cache.write_text(content)
    assert fingerprint(folder, cache) == fingerprint(folder)
    assert json.loads(cache.read_text())["fingerprint"] == fingerprint(folder)


def header(text):
    return len(text).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        b"\xff" * 8 + b"{}",
        header("{"),
        header("[]"),
        header("3"),
        header('{"a": 1}'),
        header('{"a": {}}'),
        header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}'),
        header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}') + b"1234",
        header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}') + b"12345678",
        header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": ["x", 8]}}'),
        header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-9, 8]}}'),
    ],
)
def test_a_file_that_is_not_whole_is_a_wrong_base(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WrongBase, match=r"model\.safetensors is (not a whole|cut short)") as e:
        fingerprint(tmp_path)
    assert "\n" not in str(e.value)


def test_weights_are_those_of_the_index_where_there_is_one(tmp_path):
    folder = folder_of(tmp_path / "m", [{"a": TENSORS["a"]}, {"b": TENSORS["b"]}])
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    assert [f.name for f in weight_files(folder)] == [
        "model-00000.safetensors",
        "model-00001.safetensors",
    ]
    (folder / "model-00001.safetensors").unlink()
    with pytest.raises(NotFound, match=r"lacks model-00001\.safetensors: convert the weights"):
        weight_files(folder)


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}']
)
def test_an_index_that_is_none_is_not_found_in_one_line(tmp_path, index):
    folder = folder_of(tmp_path / "m", [TENSORS])
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(NotFound, match=r"index\.json is not an index of safetensors files"):
        weight_files(folder)


def test_pickled_weights_alone_are_no_base(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(NotFound, match=r"holds no \*.safetensors: convert the weights"):
        weight_files(tmp_path)


def test_a_folder_is_located_whole_and_without_a_revision(tiny_base, monkeypatch):
    assert locate(str(tiny_base)) == (tiny_base.resolve(), None)
    monkeypatch.chdir(tiny_base.parent)
    assert locate(tiny_base.name) == (tiny_base.resolve(), None)
    with pytest.raises(InvalidInput, match="`--revision` is for hub ids"):
        locate(str(tiny_base), "main")


def test_a_folder_without_config_or_weights_is_not_found(tmp_path, tiny_base):
    with pytest.raises(NotFound, match=r"holds no config\.json"):
        locate(str(tmp_path))
    shutil.copy(tiny_base / "config.json", tmp_path)
    with pytest.raises(NotFound, match="holds no"):
        locate(str(tmp_path))


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c"])
def test_a_path_that_is_not_there_is_never_asked_of_the_hub(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(NotFound, match="there is no such folder"):
        locate(source)


def test_a_hub_id_is_the_commit_that_was_fetched(tiny_base, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda source, **options: asked.append((source, options)) or str(tiny_base),
    )
    assert locate("org/name", "v1") == (tiny_base, tiny_base.name)
    (_, (source, options)) = asked  # the first asks whether it is a pipeline
    assert (source, options["revision"]) == ("org/name", "v1")
    assert not any("bin" in p or "pt" in p for p in options["allow_patterns"])


@pytest.mark.parametrize("message", ["cannot reach it\nsecond line", ""])
def test_what_the_hub_does_not_give_is_not_found_in_one_line(monkeypatch, message):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(source, **_):
        raise LocalEntryNotFoundError(message)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(NotFound, match="base 'org/name' is neither a folder nor available") as e:
        locate("org/name")
    assert "\n" not in str(e.value)


def test_the_config_is_read_and_refused_in_one_line_where_it_is_none(tmp_path, tiny_base):
    assert read_config(tiny_base)["hidden_size"] == 32
    for content in (b"{", b"\xff"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(NotFound, match=r"holds no readable config\.json"):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(NotFound, match="is not a JSON object"):
        read_config(tmp_path)
    with pytest.raises(NotFound, match="holds no readable"):
        read_config(tmp_path / "nowhere")


def test_a_folder_without_a_model_or_tokenizer_is_not_found(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    for load in (load_tokenizer, load_base):
        with pytest.raises(NotFound) as e:
            load(tmp_path)
        assert "\n" not in str(e.value)


def test_a_loaded_base_is_frozen_and_in_the_precision_asked_for(tiny_base):
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        base = load_base(tiny_base, precision, "cpu")
        assert {p.dtype for p in base.model.parameters()} == {dtype}
        assert not any(p.requires_grad for p in base.model.parameters())
        assert not base.model.training
        assert (base.precision, base.context, base.device.type) == (precision, 128, "cpu")
        assert base.tokenizer is base.tokenizer
        assert base.tokenizer.eos_token_id == 256


def test_four_bits_without_bitsandbytes_are_one_line_that_says_how_to_get_it(
    tiny_base, monkeypatch
):
    monkeypatch.setattr("transformers.utils.import_utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(InvalidInput, match=r"pip install 'lori-manager\[cuda\]'") as e:
        load_base(tiny_base, "fp32", "cpu", 4)
    assert "\n" not in str(e.value)
    assert load_base(tiny_base, "fp32", "cpu").base_bits == 16


def test_scores_are_kept_by_precision_and_bits():
    assert score_precision(Config(precision="bf16")) == "bf16"
    assert score_precision(Config(precision="bf16", base_bits=4)) == "bf16-nf4"
    assert score_precision(Config(base_bits=4)) == f"{resolve_precision('auto')}-nf4"


def test_a_precision_that_is_named_is_kept():
    assert [resolve_precision(p) for p in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert resolve_precision("auto") in ("fp32", "bf16")


@pytest.mark.parametrize("tied", [False, True])
def test_linear_shapes_leave_the_head_out(tied):
    shapes = linear_shapes(architectures.llama(tie_word_embeddings=tied))
    assert len(shapes) == 14
    assert shapes["model.layers.0.self_attn.k_proj"] == (16, 32)
    assert shapes["model.layers.1.mlp.down_proj"] == (32, 48)
    assert not any("head" in n or "embed" in n for n in shapes)


def test_shapes_of_gpt2_are_out_by_in_though_its_weights_lie_the_other_way():
    shapes = linear_shapes(architectures.gpt2())
    assert shapes["transformer.h.0.attn.c_attn"] == (96, 32)
    assert shapes["transformer.h.1.mlp.c_fc"] == (128, 32)
    assert len(shapes) == 8


def test_a_skeleton_has_the_modules_of_the_model_and_no_weights(tmp_path, tiny_base):
    skeleton = load_skeleton(tiny_base)
    assert skeleton.linear_shapes == load_base(tiny_base, "fp32", "cpu").linear_shapes
    assert skeleton.transposed == frozenset()
    assert all(p.is_meta for p in skeleton.model.parameters())
    architectures.gpt2().save_pretrained(tmp_path)
    other = load_skeleton(tmp_path)
    assert other.transposed == set(other.linear_shapes)


SHAPES = {
    "model.layers.0.self_attn.q_proj": (8, 8),
    "model.layers.0.mlp.up_proj": (16, 8),
    "model.layers.1.self_attn.q_proj": (8, 8),
    "model.layers.11.self_attn.q_proj": (8, 8),
}


@pytest.mark.parametrize(
    ("targets", "indices"),
    [
        (["all-linear"], [0, 1, 2, 3]),
        (["q_proj"], [0, 2, 3]),
        (["self_attn.q_proj"], [0, 2, 3]),
        (["1.self_attn.q_proj"], [2]),
        (["model.layers.0.mlp.up_proj"], [1]),
        (["up_proj", "q_proj"], [0, 1, 2, 3]),
        (["up_proj", "all-linear", "up_proj"], [0, 1, 2, 3]),
    ],
)
def test_targets_are_whole_names_or_their_whole_last_parts(targets, indices):
    names = list(SHAPES)
    assert resolve_targets(SHAPES, targets) == sorted(names[i] for i in indices)


@pytest.mark.parametrize(
    "target", ["proj", "_proj", "q_pro", "Q_PROJ", ".q_proj", "attn.q_proj", "layers.0", "q*", " "]
)
@pytest.mark.parametrize("others", [[], ["up_proj"], ["all-linear"]])
def test_a_target_that_matches_nothing_is_refused_even_beside_good_ones(target, others):
    with pytest.raises(InvalidInput) as e:
        resolve_targets(SHAPES, [*others, target])
    assert str(e.value) == (
        f"target {target!r} matches no linear layer; there are: q_proj, up_proj"
    )


def test_a_rank_may_be_as_large_as_the_smallest_side_and_no_larger():
    check_rank(SHAPES, 8)
    check_rank({}, 99)
    with pytest.raises(
        InvalidInput, match=r"`rank` 9 is above .* \(8 x 8\) can have; use at most 8"
    ):
        check_rank(SHAPES, 9)
    with pytest.raises(InvalidInput, match=r"what b \(4 x 20\) can have; use at most 4"):
        check_rank({"a": (20, 20), "b": (4, 20)}, 5)
