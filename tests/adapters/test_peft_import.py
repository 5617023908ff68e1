import dataclasses
import json
import os
import re
import shutil
import struct
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from lori_manager.adapters import peft_config
from lori_manager.adapters.peft_export import write_peft
from lori_manager.adapters.peft_import import read_peft
from lori_manager.errors import DamagedObject, ImportRefused, LoriError

Q0 = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q0}.lora_A.weight"
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_model(bed, **config):
    """A PEFT model whose factors are all random, as after training."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(bed.copy(), LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    for name, values in model.named_parameters():
        if "lora_" in name:
            values.data.normal_(std=0.2)
    return model


def save(model, directory, tools, **fields):
    """Save with PEFT; the base is named afterwards, for PEFT would look it up on the hub."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
    tools.edit_config(directory, **{"base_model_name_or_path": "org/Tiny-Base"} | fields)
    return directory


CASES = {
    "plain": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": LAYERS}),
    "rslora": ("llama", {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": LAYERS}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": LAYERS,
            "rank_pattern": {
                "q_proj": 2,
                r"layers\.1\.mlp\..*": 3,
                "model.layers.1.mlp.up_proj": 7,
            },
            "alpha_pattern": {"^model.layers.0.self_attn.k_proj": 3, "v_proj|down_proj": 5.5},
        },
    ),
    "rslora with patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": LAYERS,
            "rank_pattern": {"q_proj": 2, "down_proj": 9},
            "alpha_pattern": {"down_proj": 16},
        },
    ),
    "some targets": ("llama", {"r": 3, "target_modules": ["v_proj", "mlp.down_proj"]}),
    "an expression": ("llama", {"r": 3, "target_modules": r".*\.1\..*(q|up)_proj"}),
    "one layer": ("llama", {"r": 3, "target_modules": ["q_proj"], "layers_to_transform": 1}),
    "layers by name": (
        "llama",
        {
            "r": 3,
            "target_modules": ["q_proj", "model.layers.0.mlp.up_proj"],
            "layers_to_transform": [1],
            "layers_pattern": ["h", "layers"],
        },
    ),
    "exclusions": ("llama", {"r": 3, "target_modules": LAYERS, "exclude_modules": ["up_proj"]}),
    "all linear": ("llama", {"r": 3, "target_modules": "all-linear"}),
    "dropout": ("llama", {"r": 3, "target_modules": LAYERS, "lora_dropout": 0.5}),
    "gaussian": ("llama", {"r": 4, "target_modules": LAYERS, "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"r": 4, "target_modules": LAYERS, "init_lora_weights": "orthogonal"}),
    "mica": ("llama", {"r": 4, "target_modules": LAYERS, "init_lora_weights": "mica"}),
    "gpt2": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_fc", "c_proj"]}),
    "gpt2 declared": (
        "gpt2",
        {"r": 4, "lora_alpha": 9, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_imported_adapter_computes_the_logits_that_peft_computes(case, request, tools, tmp_path):
    kind, config = CASES[case]
    bed = request.getfixturevalue(kind)
    model = peft_model(bed, **config)
    imported = read_peft(save(model, tmp_path / "a", tools), **bed.import_arguments())
    updates = imported.weights.updates()
    adapted = [n for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert sorted(updates) == sorted(adapted)
    assert tools.difference(bed.model, model) > 0.01
    assert tools.difference(bed.merged(updates), model) <= 1e-5
    assert imported.rank == max(
        model.base_model.model.get_submodule(n).r["default"] for n in adapted
    )
    assert imported.alpha == config.get("lora_alpha", 8)
    assert imported.config["base_model_name_or_path"] == bed.base_name
    assert imported.notes == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_kept_bit_for_bit_in_their_own_dtype(llama, tools, tmp_path, dtype):
    model = peft_model(llama, r=4, lora_alpha=7, target_modules=LAYERS, alpha_pattern={"q_proj": 3})
    save(model, tmp_path / "a", tools)
    tools.edit_tensors(tmp_path / "a", lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    blocks = read_peft(tmp_path / "a", **llama.import_arguments()).weights.blocks
    assert sorted(block.scaling for block in blocks) == [3 / 4, 7 / 4]
    stored, _ = tools.read_tensors(tmp_path / "a")
    for block in blocks:
        assert block.mask is None
        for name in block.B:
            for factor, values in (("A", block.A[name]), ("B", block.B[name])):
                expected = stored[f"base_model.model.{name}.lora_{factor}.weight"]
                assert values.dtype == dtype
                assert torch.equal(values, expected)


def test_one_scaling_makes_one_block(llama, tools, tmp_path):
    model = peft_model(llama, r=4, target_modules=LAYERS, rank_pattern={"q_proj": 2})
    save(model, tmp_path / "a", tools, lora_alpha=4, alpha_pattern={"q_proj": 2})
    (block,) = read_peft(tmp_path / "a", **llama.import_arguments()).weights.blocks
    assert block.scaling == 1.0
    assert {int(B.shape[1]) for B in block.B.values()} == {2, 4}


def test_import_export_import_keeps_every_bit_at_scaling_one(llama, tools, tmp_path):
    model = peft_model(llama, r=4, lora_alpha=4, target_modules=LAYERS)
    first = read_peft(save(model, tmp_path / "a", tools), **llama.import_arguments())
    write_peft(first.weights.updates(), tmp_path / "b", **llama.export_arguments())
    second = read_peft(tmp_path / "b", **llama.import_arguments(base_names=[]))
    assert second.notes == []
    one, two = first.weights.updates(), second.weights.updates()
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].scaling == two[name].scaling == 1.0
        assert torch.equal(one[name].A, two[name].A)
        assert torch.equal(one[name].B, two[name].B)


def test_weights_outlive_the_directory(llama, tools, tmp_path):
    save(peft_model(llama, r=2, target_modules=["q_proj"]), tmp_path / "a", tools)
    imported = read_peft(tmp_path / "a", **llama.import_arguments())
    before = imported.weights.blocks[0].B[Q0].clone()
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    with (tmp_path / "a" / "adapter_model.safetensors").open("r+b") as file:
        file.write(b"\0" * size)
    assert torch.equal(imported.weights.blocks[0].B[Q0], before)


def test_patterns_choose_as_in_peft():
    patterns = [
        "q_proj",
        r"layers\.1\..*",
        "self_attn.q_proj",
        "^model.layers.0.mlp.up_proj",
        "a|b",
    ]
    patterns += ["layers.2", ".*", "proj"]
    modules = [
        f"model.layers.{i}.{m}" for i in (0, 1, 12) for m in ("self_attn.q_proj", "mlp.up_proj")
    ]
    modules += ["a", "b", "xb", "model.b", "layers.2", "model.layers.2", "q_proj", "xq_proj"]
    for start in range(len(patterns)):
        keys = patterns[start:]
        settings = peft_config.lora_settings(
            {"peft_type": "LORA", "rank_pattern": {k: i + 10 for i, k in enumerate(keys)}}
        )
        for module in modules:
            found = get_pattern_key(keys, module)
            expected = keys.index(found) + 10 if found in keys else 8
            assert settings.rank_of(module) == expected, (keys, module)


TARGETINGS = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["proj", "mlp.up_proj", "model.layers.0.q_proj"]},
    {"target_modules": r".*\.1\..*proj"},
    {"target_modules": []},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["mlp.up_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*experts.*"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 12]},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": []},
    {"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": "experts"},
    {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["model.layers.1.mlp.up_proj"], "layers_to_transform": [0]},
]


@pytest.mark.parametrize("fields", TARGETINGS, ids=str)
def test_targets_are_those_of_peft(fields):
    modules = [f"model.layers.{i}.{m}_proj" for i in (0, 1, 12) for m in ("q", "mlp.up", "xq")]
    modules += ["model.layers.1.mlp.experts.0.up_proj", "q_proj", "up_proj", "h.1.up_proj"]
    config = LoraConfig(**fields)
    for module in modules:
        expected = bool(check_target_module_exists(config, module))
        assert peft_config.is_target(fields, module) is expected, module


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "mica", "eva"])
def test_accepted_initialisations_leave_the_base_as_it_is(llama, init):
    model = peft_model(llama, r=4, target_modules=["q_proj"], init_lora_weights=init)
    weight = model.base_model.model.get_submodule(Q0).base_layer.weight
    assert torch.equal(weight, llama.model.get_submodule(Q0).weight)
    peft_config.lora_settings({"peft_type": "LORA", "init_lora_weights": init})


def test_every_field_of_the_installed_peft_is_decided_upon():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    known = peft_config._READ | peft_config._HARMLESS | set(peft_config._REFUSED)
    assert fields - known == set()


# Everything below starts from one sound adapter and breaks it.


@pytest.fixture(scope="module")
def sound(llama, tools, tmp_path_factory):
    model = peft_model(llama, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return save(model, tmp_path_factory.mktemp("sound") / "adapter", tools)


@pytest.fixture
def adapter(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "adapter")


def refused(bed, directory, kind=ImportRefused, **changes):
    """The message of the refusal: one line that names the directory."""
    with pytest.raises(LoriError) as caught:
        read_peft(directory, **bed.import_arguments(**changes))
    message = str(caught.value)
    assert type(caught.value) is kind
    assert message.startswith(f"{directory}: ")
    assert "\n" not in message
    assert len(message) < 600 + len(str(directory))
    return message


SWITCHES = [
    ("modules_to_save", ["lm_head"], "replaces whole modules"),
    ("trainable_token_indices", [1, 2], "rows of the embeddings"),
    ("layer_replication", [[0, 2], [1, 2]], "repeats layers"),
    ("lora_bias", True, "B has a bias"),
    ("target_parameters", ["experts.gate"], "bare parameters"),
    ("alora_invocation_tokens", [5], "some tokens only"),
    ("arrow_config", {"top_k": 3}, "Arrow routes"),
    ("use_qalora", True, "QA-LoRA"),
    ("use_bdlora", {"nblocks": 2}, "diagonal blocks"),
    ("kasa_config", {"beta": 0.1}, "KaSA"),
    ("monteclora_config", {"num_samples": 2}, "samples its weights"),
    ("velora_config", {"num_groups": 2}, "more than A and B"),
    ("megatron_config", {"a": 1}, "Megatron"),
    ("ensure_weight_tying", True, "ties adapters"),
    ("bias", "all", "train with bias='none'"),
    ("bias", "lora_only", "train with bias='none'"),
    ("invented_in_peft_9", {"gamma": 2}, "does not know what it computes"),
    ("x" * 5000, 1, "does not know"),
    ("line\nbreak", 1, "does not know"),
]


@pytest.mark.parametrize(("field", "value", "reason"), SWITCHES, ids=lambda v: str(v)[:24])
def test_fields_that_change_the_mathematics_are_refused_by_name(
    llama, tools, adapter, field, value, reason
):
    tools.edit_config(adapter, **{field: value})
    message = refused(llama, adapter)
    assert reason in message
    assert repr(field)[1:20].rstrip("'") in message


def test_fields_that_are_switched_off_or_harmless_do_not_matter(llama, tools, adapter):
    tools.edit_config(
        adapter,
        invented_in_peft_9=None,
        invented_in_peft_10=False,
        lora_dropout=0.1,
        inference_mode=False,
        fan_in_fan_out=True,
        revision="main",
        rank_pattern=None,
        eva_config={"rho": 2.0},
    )
    assert read_peft(adapter, **llama.import_arguments()).notes == []


INITS = ["pissa", "pissa_niter_16", "PiSSA", "olora", "OLoRA", "corda", "lora_ga", "loftq"]


@pytest.mark.parametrize("init", INITS)
def test_initialisations_that_changed_the_base_are_refused(llama, tools, adapter, init):
    tools.edit_config(adapter, init_lora_weights=init)
    assert "relative to a base that this initialisation changed" in refused(llama, adapter)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_peft_writes_the_refused_initialisation_unless_it_converts(llama, tools, tmp_path, init):
    model = peft_model(llama, r=4, target_modules=["q_proj"], init_lora_weights=init)
    weight = model.base_model.model.get_submodule(Q0).base_layer.weight
    assert not torch.equal(weight, llama.model.get_submodule(Q0).weight)
    assert "init_lora_weights" in refused(llama, save(model, tmp_path / "a", tools))


def test_a_converted_pissa_adapter_is_imported_as_the_lora_that_it_is(llama, tools, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa"
    )
    model = get_peft_model(llama.copy(), config).eval()
    settings = model.peft_config["default"]
    settings.init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    settings.init_lora_weights = "pissa"
    for name, values in model.named_parameters():
        if "lora_" in name:
            values.data += 0.1 * torch.randn_like(values)
    model.save_pretrained(
        tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    tools.edit_config(tmp_path / "a", base_model_name_or_path=llama.base_name)
    updates = read_peft(tmp_path / "a", **llama.import_arguments()).weights.updates()
    plain = PeftModel.from_pretrained(llama.copy(), tmp_path / "a").eval()
    assert tools.difference(llama.merged(updates), plain) <= 1e-5


def test_lm_head_and_embedding_adapters_made_by_peft_are_refused(llama, tools, tmp_path):
    dora = peft_model(llama, r=2, target_modules=["q_proj"], use_dora=True)
    save(dora, tmp_path / "dora", tools, use_dora=False)
    assert "is a DoRA magnitude" in refused(llama, tmp_path / "dora")
    head = peft_model(llama, r=2, target_modules=["q_proj", "lm_head"])
    message = refused(llama, save(head, tmp_path / "head", tools))
    assert "module 'lm_head' is an output head" in message
    embedding = peft_model(llama, r=2, target_modules=["q_proj", "embed_tokens"])
    message = refused(llama, save(embedding, tmp_path / "embedding", tools))
    assert "embed_tokens" in message
    saved = peft_model(llama, r=2, target_modules=["q_proj"], modules_to_save=["model.norm"])
    assert "modules_to_save" in refused(llama, save(saved, tmp_path / "saved", tools))
    tools.edit_config(tmp_path / "saved", modules_to_save=None)
    assert "model.norm.weight' is not part of a LoRA" in refused(llama, tmp_path / "saved")


WRONG_TYPES = [
    ("peft_type", "ADALORA", "peft_type is 'ADALORA': only LORA"),
    ("peft_type", ["LORA"], "only LORA"),
    ("task_type", "SEQ_CLS", "only CAUSAL_LM"),
    ("task_type", {}, "only CAUSAL_LM"),
    ("r", "4", "r must be a whole number"),
    ("r", 0, "r must be a whole number"),
    ("r", True, "r must be a whole number"),
    ("r", 10**300, "r must be a whole number"),
    ("r", None, "r must be a whole number"),
    ("lora_alpha", "8", "lora_alpha must be a finite number"),
    ("lora_alpha", 10**400, "lora_alpha must be a finite number"),
    ("use_rslora", "true", "use_rslora must be true or false"),
    ("rank_pattern", ["q_proj"], "rank_pattern must map names to numbers"),
    ("rank_pattern", {"q_proj": 2.5}, "rank_pattern must be a whole number"),
    ("rank_pattern", {"(": 2}, "is no regular expression"),
    ("rank_pattern", {"a{99999999999999999999}": 2}, "braces that are no counts"),
    ("rank_pattern", {"(a{200}){200}": 2}, "count to more than 10000"),
    ("target_modules", "(?:q_proj){e<=3}", "braces that are no counts"),
    ("alpha_pattern", {"q_proj": None}, "alpha_pattern must be a finite number"),
    ("alpha_pattern", {"(?i)q": 2}, "is no regular expression"),
    ("target_modules", {"q_proj": 1}, "target_modules must be a list of names"),
    ("target_modules", [1], "target_modules must be a list of names"),
    ("target_modules", "(", "is no regular expression"),
    ("exclude_modules", 3, "exclude_modules must be a list of names"),
    ("layers_to_transform", ["0"], "layers_to_transform must be layer numbers"),
    ("layers_to_transform", {}, "layers_to_transform must be layer numbers"),
    ("init_lora_weights", {}, "does not know whether that changes"),
    ("init_lora_weights", "new_in_peft_9", "does not know whether that changes"),
    ("base_model_name_or_path", 7, "base_model_name_or_path must be a name"),
]


@pytest.mark.parametrize(("field", "value", "reason"), WRONG_TYPES, ids=lambda v: str(v)[:24])
def test_wrong_values_in_the_configuration_are_refused(llama, tools, adapter, field, value, reason):
    tools.edit_config(adapter, **{field: value})
    assert reason in refused(llama, adapter)


def test_a_malformed_layers_pattern_is_refused(llama, tools, adapter):
    for patterns in (["layers", "("], ["(", "layers"]):
        tools.edit_config(adapter, layers_to_transform=[0, 1], layers_pattern=patterns)
        assert "layers_pattern has '('" in refused(llama, adapter)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ".*q_proj"},
        {"exclude_modules": ["v_proj"]},
        {"exclude_modules": ".*v_proj"},
        {"layers_to_transform": [0]},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"layers_to_transform": [0, 1], "layers_pattern": "h"},
    ],
    ids=str,
)
def test_tensors_that_peft_would_ignore_are_refused(llama, tools, adapter, fields):
    tools.edit_config(adapter, **fields)
    assert re.search(r"module \S+ has tensors, but target_modules", refused(llama, adapter))
    # PEFT indeed has no place for them.
    config = LoraConfig(**json.loads((adapter / "adapter_config.json").read_text()))
    tensors, _ = tools.read_tensors(adapter)
    modules = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors}
    assert not all(check_target_module_exists(config, module) for module in modules)


def test_targets_without_tensors_are_told(llama, tools, adapter):
    tools.edit_config(adapter, target_modules=["q_proj", "v_proj", "up_proj"])
    (note,) = read_peft(adapter, **llama.import_arguments()).notes
    assert "2 modules" in note
    assert "model.layers.0.mlp.up_proj" in note


def test_a_zero_update_is_imported_with_a_note(llama, tools, adapter):
    tools.edit_tensors(adapter, lambda t: [v.zero_() for k, v in t.items() if ".lora_B." in k])
    (note,) = read_peft(adapter, **llama.import_arguments()).notes
    assert "zero everywhere" in note


def test_the_base_is_recognised_by_name_or_its_last_part(llama, tools, adapter):
    def notes(name, **changes):
        tools.edit_config(adapter, base_model_name_or_path=name)
        return read_peft(adapter, **llama.import_arguments(**changes)).notes

    assert notes("org/Tiny-Base") == []
    for name in ("/models/tiny-base/", "other/TINY-BASE", "C:\\models\\Tiny-Base"):
        (note,) = notes(name)
        assert "last part is equal" in note
    for name in ("org/tiny-base-2", "Tiny", "", None, "/", "org/Tiny-Base\n" + "x" * 9000):
        tools.edit_config(adapter, base_model_name_or_path=name)
        message = refused(llama, adapter)
        assert "made for the base" in message
        assert "'org/Tiny-Base'" in message
        (note,) = notes(name, assume_base=True)
        assert "assumed" in note
    tools.edit_config(adapter, base_model_name_or_path="/")
    refused(llama, adapter, base_names=["", "//"])


def test_a_recorded_fingerprint_decides_over_every_name(llama, tools, adapter):
    same = {"lori_base_fingerprint": llama.fingerprint}
    tools.edit_config(adapter, base_model_name_or_path="somewhere/else")
    tools.edit_tensors(adapter, lambda t: None, metadata=same)
    assert read_peft(adapter, **llama.import_arguments()).notes == []
    tools.edit_config(adapter, base_model_name_or_path=llama.base_name)
    tools.edit_tensors(adapter, lambda t: None, metadata={"lori_base_fingerprint": "e" * 64})
    assert "fingerprint 'eeeeee" in refused(llama, adapter)
    assert "fingerprint 'eeeeee" in refused(llama, adapter, assume_base=True)


def nan(values):
    values[0, 0] = float("nan")


def infinite(values):
    values[-1, -1] = float("-inf")


def put(key, *shape):
    return lambda t: t.update({key: torch.ones(*shape)})


def rename(old, new):
    return lambda t: t.update({new: t.pop(old)})


B = KEY.replace("lora_A", "lora_B")
TENSORS = [
    (lambda t: t.pop(KEY), f"module {Q0} has no lora_A"),
    (lambda t: t.pop(B), f"module {Q0} has no lora_B"),
    (lambda t: t.clear(), "holds no tensors"),
    (lambda t: t.update({KEY: t[KEY][:2]}), f"lora_A of module {Q0} has shape [2, 32]"),
    (lambda t: t.update({KEY: t[KEY][:, :8]}), f"lora_A of module {Q0} has shape [4, 8]"),
    (lambda t: t.update({B: t[B][:8]}), f"lora_B of module {Q0} has shape [8, 4]"),
    (lambda t: t.update({B: t[B].flatten()}), f"lora_B of module {Q0} has shape [128]"),
    (lambda t: t.update({KEY: t[KEY][None]}), "expected [4, 32]"),
    (lambda t: t.update({KEY: t[KEY].int()}), f"lora_A of module {Q0} is 'I32', expected one of"),
    (lambda t: t.update({KEY: t[KEY].double()}), "is 'F64', expected one of"),
    (put("base_model.model.model.layers.9.x.lora_A.weight", 4, 32), "'model.layers.9.x' is not"),
    (put("../../etc/passwd", 1), "'../../etc/passwd' is not part of a LoRA"),
    (put("../../etc/x.lora_A.weight", 4, 32), "'../../etc/x' is not a linear module"),
    (put("y" * 5000, 1), "is not part of a LoRA"),
    (put("base_model.model.model.norm.weight", 32), "is not part of a LoRA"),
    (put("base_model.model.model.embed_tokens.weight", 61, 32), "a weight of the base itself"),
    (put("base_model.model.model.embed_tokens.lora_embedding_A", 4, 61), "of the embeddings"),
    (put(f"base_model.model.{Q0}.lora_B.bias", 32), "is a bias"),
    (put(f"base_model.model.{Q0}.bias", 32), "is a bias"),
    (put(f"base_model.model.{Q0}.lora_magnitude_vector", 32), "DoRA magnitude"),
    (put("base_model.model.lm_head.lora_A.weight", 4, 32), "'lm_head' is an output head"),
    (put(KEY.removeprefix("base_model.model."), 4, 32), f"module '{Q0}' has lora_A twice"),
    (put(KEY.replace("lora_A", "lora_A.other"), 4, 32), "has lora_A twice"),
    (rename(KEY, KEY.replace("lora_A", "lora_A.other")), "several adapters ('other', None)"),
]


@pytest.mark.parametrize(("change", "reason"), TENSORS, ids=[r[:40] for _, r in TENSORS])
def test_tensors_that_do_not_fit_are_refused_naming_the_first(
    llama, tools, adapter, change, reason
):
    tools.edit_tensors(adapter, change)
    assert reason in refused(llama, adapter)


@pytest.mark.parametrize("spoil", [nan, infinite])
@pytest.mark.parametrize("key", [KEY, B])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_are_damage(llama, tools, adapter, spoil, key, dtype):
    def change(tensors):
        tensors[key] = tensors[key].to(dtype)
        spoil(tensors[key])

    tools.edit_tensors(adapter, change)
    message = refused(llama, adapter, DamagedObject)
    assert f"lora_{key[-8]} of module {Q0} has values that are not finite" in message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_damage(llama, tools, adapter, number):
    tools.edit_config(adapter, lora_dropout="HERE")
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text().replace('"HERE"', number))
    assert "is not usable" in refused(llama, adapter, DamagedObject)


def test_a_scaling_that_float32_cannot_hold_is_refused(llama, tools, adapter):
    tools.edit_config(adapter, lora_alpha=1e300)
    assert "more than float32 holds" in refused(llama, adapter)


@pytest.mark.parametrize("name", ["a\nb\x1b[31m", "", "\u202ea"])
def test_a_name_that_cannot_be_shown_is_damage(llama, tools, adapter, name):
    tools.edit_tensors(adapter, put(name, 1))
    assert "a tensor has the name" in refused(llama, adapter, DamagedObject)


def test_names_with_an_adapter_in_them_or_without_the_prefix_are_read(llama, tools, adapter):
    expected = read_peft(adapter, **llama.import_arguments()).weights.updates()
    forms = [
        lambda key: re.sub(r"lora_([AB])", r"lora_\1.default", key),
        lambda key: key.removeprefix("base_model.model.").replace(".default", ""),
    ]
    for form in forms:
        tools.edit_tensors(adapter, lambda t, f=form: t.update({f(k): t.pop(k) for k in list(t)}))
        found = read_peft(adapter, **llama.import_arguments()).weights.updates()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n].B, expected[n].B) for n in found)


def test_what_is_no_peft_directory_is_refused(llama, adapter, tmp_path):
    assert "there is no adapter_config.json" in refused(llama, tmp_path / "nowhere")
    assert "there is no adapter_config.json" in refused(llama, adapter / "adapter_config.json")
    (adapter / "adapter_model.safetensors").unlink()
    assert "there is no adapter_model.safetensors" in refused(llama, adapter)
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    assert "has no peft_type" in refused(llama, adapter)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_is_never_opened(llama, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Bomb(), adapter / "adapter_model.bin")
    (note,) = read_peft(adapter, **llama.import_arguments()).notes
    assert "adapter_model.bin was ignored" in note
    (adapter / "adapter_model.safetensors").unlink()
    assert "adapter_model.bin is a pickle" in refused(llama, adapter)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe\xff", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}", b"nope\n\nx"],
    ids=["empty", "cut", "binary", "deep", "huge", "prose"],
)
def test_a_malformed_configuration_is_damage(llama, adapter, text):
    (adapter / "adapter_config.json").write_bytes(text)
    assert "is not usable: it is no JSON" in refused(llama, adapter, DamagedObject)


@pytest.mark.parametrize("text", ["[]", "null", '"LORA"', "3"])
def test_a_configuration_that_is_no_object_is_refused(llama, adapter, text):
    (adapter / "adapter_config.json").write_text(text)
    assert "must hold an object" in refused(llama, adapter)


def test_cut_weights_are_damage_at_every_length(llama, adapter):
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "is cut short or malformed" in refused(llama, adapter, DamagedObject)
    path.write_bytes(whole + b"\0")
    assert "is cut short or malformed" in refused(llama, adapter, DamagedObject)
    path.write_bytes(struct.pack("<Q", 2**62) + whole[8:])
    assert "is cut short or malformed" in refused(llama, adapter, DamagedObject)


def test_a_tensor_name_that_occurs_twice_is_damage(llama, adapter):
    name = f"base_model.model.{Q0}.lora_A.weight"
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = f'{{"{name}": {json.dumps(entry)}, "{name}": {json.dumps(entry)}}}'.encode()
    (adapter / "adapter_model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + b"\0" * 4
    )
    assert "occurs twice" in refused(llama, adapter, DamagedObject)


def test_links_of_the_hubs_cache_are_read(llama, adapter, tmp_path):
    snapshot = tmp_path / "models--org--a" / "snapshots" / "1f0c"
    blobs = tmp_path / "models--org--a" / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(adapter, snapshot)
    for file in [*snapshot.iterdir()]:
        shutil.move(file, blobs / file.name)
        file.symlink_to(blobs / file.name)
    read_peft(snapshot, **llama.import_arguments())


def test_an_export_is_refused_by_another_base(llama, gpt2, tmp_path):
    write_peft(llama.updates(), tmp_path / "a", **llama.export_arguments())
    assert "fingerprint" in refused(gpt2, tmp_path / "a", fingerprint="0" * 64)
    assert "is not a linear module of this base" in refused(gpt2, tmp_path / "a")


def test_an_unsharded_file_of_empty_tensors_is_refused(llama, adapter):
    # What partitioned training saves when it did not gather its shards.
    save_file({KEY: torch.empty(0), B: torch.empty(0)}, adapter / "adapter_model.safetensors")
    assert "has shape [0]" in refused(llama, adapter)
