"""The attacks of docs/security.md: each refused in one line, nothing lost, nothing run."""

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time

import mutating
import pytest
import torch
from safetensors.torch import load_file, save_file

from lori_manager import base_files, models
from lori_manager.errors import BadData, DamagedObject, InvalidInput, LoriError, NotFound, WrongBase
from lori_manager.sandbox.forked import Bounds, Forked, Refused
from lori_manager.store.files import ObjectStore
from lori_manager.tasks.encoding import chat_renderer
from lori_manager.tasks.sources import read_source
from lori_manager.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def refused(ws, folder):
    """Why an import was refused, in one line that a terminal can show."""
    begun = time.process_time()
    (found,) = ws.import_adapters([folder], assume_base=True)
    assert found.adapter is None
    assert found.reason.isprintable()
    assert time.process_time() - begun < 5  # a hang, not a speed
    return found.reason


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def one_line(call):
    with pytest.raises(LoriError) as caught:
        call()
    assert str(caught.value).isprintable()
    return str(caught.value)


# Imports.


def test_a_pickle_in_the_place_of_weights_is_not_opened(site, unchanged, tmp_path):
    ws, folder = site

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save(Bomb(), folder / "lora" / "adapter_model.bin")
    (folder / "lora" / WEIGHTS).unlink()
    assert "is a pickle" in refused(ws, folder / "lora")
    shutil.copy(folder / "lora" / "adapter_model.bin", folder / "lora" / WEIGHTS)
    assert "malformed" in refused(ws, folder / "lora")
    assert not (tmp_path / "exploded").exists()
    unchanged()


@pytest.mark.parametrize(
    ("kind", "name"),
    [("lora", WEIGHTS), ("lora", CONFIG), ("prefix", WEIGHTS),
     ("bottleneck", "adapter.safetensors"), ("bottleneck", "lori_adapter.json")],
)  # fmt: skip
def test_a_link_out_of_the_folder_is_not_followed(site, unchanged, kind, name):
    ws, folder = site
    shutil.move(folder / kind / name, folder / "secret")
    (folder / kind / name).symlink_to(folder / "secret")
    assert "a link to a file outside its folder" in refused(ws, folder / kind)
    unchanged()


@pytest.mark.parametrize("target", ["/dev/zero", "loop"])
def test_a_link_to_a_device_or_to_itself_is_not_read(site, unchanged, target):
    ws, folder = site
    (folder / "lora" / CONFIG).unlink()
    (folder / "lora" / CONFIG).symlink_to(CONFIG if target == "loop" else target)
    assert "there is no adapter_config.json" in refused(ws, folder / "lora")
    unchanged()


def test_a_pipe_is_not_waited_for(site, unchanged):
    ws, folder = site
    (folder / "lora" / WEIGHTS).unlink()
    os.mkfifo(folder / "lora" / WEIGHTS)
    assert "there is no adapter_model" in refused(ws, folder / "lora")
    (folder / "bottleneck" / "adapter.safetensors").unlink()
    os.mkfifo(folder / "bottleneck" / "adapter.safetensors")
    assert "not a regular file" in refused(ws, folder / "bottleneck")
    unchanged()


def header_attacks():
    big = 2**40

    def twice(header, values):
        text = json.dumps(header)
        name, entry = next((k, v) for k, v in header.items() if k != "__metadata__")
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}" + "}"
        return struct.pack("<Q", len(text)) + text.encode() + values

    def entry(change):
        def made(header, values):
            name = next(k for k in header if k != "__metadata__")
            header[name] = header[name] | change(header[name])
            return mutating.joined(header, values)

        return made

    def named(name):
        def made(header, values):
            old = next(k for k in header if k != "__metadata__")
            header[name] = header.pop(old)
            return mutating.joined(header, values)

        return made

    def overlap(header, values):
        one, two = [k for k in header if k != "__metadata__" and header[k]["shape"]][:2]
        header[two] = header[one]
        return mutating.joined(header, values)

    return {
        "twice": twice,
        "overlap": overlap,
        "huge header": lambda h, v: struct.pack("<Q", big) + mutating.joined(h, v)[8:],
        "header of 200 MB": lambda h, v: struct.pack("<Q", 200_000_000) + b"{" * 8,
        "trailing bytes": lambda h, v: mutating.joined(h, v) + b"\0",
        "cut": lambda h, v: mutating.joined(h, v)[:-1],
        "huge shape": entry(lambda e: {"shape": [2**62, 4]}),
        "negative": entry(lambda e: {"shape": [-1, -1]}),
        "offsets": entry(lambda e: {"data_offsets": [e["data_offsets"][1], e["data_offsets"][0]]}),
        "dtype": entry(lambda e: {"dtype": "I8"}),
        "unknown dtype": entry(lambda e: {"dtype": "OBJECT"}),
        "more fields": entry(lambda e: {"code": "x"}),
        "path": named("../../../etc/cron.d/x"),
        "control": named("\x1b]0;x\x07"),
        "no name": named(""),
        "deep": lambda h, v: struct.pack("<Q", 100_000) + b"[" * 100_000,
        "nan": lambda h, v: mutating.joined(h, b"\xff\xff" * (len(v) // 2)),
    }


@pytest.mark.parametrize("kind", ["lora", "prefix", "bottleneck"])
@pytest.mark.parametrize("attack", header_attacks())
def test_a_forged_safetensors_file_is_refused(site, unchanged, kind, attack):
    ws, folder = site
    if (kind, attack) == ("prefix", "overlap"):
        return  # it has one tensor
    path = next((folder / kind).glob("*.safetensors"))
    path.write_bytes(header_attacks()[attack](*mutating.split(path.read_bytes())))
    refused(ws, folder / kind)
    unchanged()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"target_modules": r"(?:(?:.|.)*)*[A-Z]"}, "too long to match"),
        ({"rank_pattern": {r"(?:(?:\w|\.|[a-z])+)+(?=\s)": 4}}, "too long to match"),
        ({"exclude_modules": r"(?:\w|\.|.)*(?<=\s)"}, "too long to match"),
        ({"layers_to_transform": [0], "layers_pattern": r"(?:.|.)*(?:.|.)*[A-Z]"}, "too long"),
        ({"target_modules": "a{999999999}"}, "braces"),
        ({"target_modules": "x" * 20_000}, "characters"),
        ({"lora_alpha": 1e300}, "more than float32"),
        ({"r": 2**31}, "r must be"),
        ({"auto_mapping": {"a": ["b"] * 3}, "custom_code": "x.py"}, "custom_code"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_a_hostile_lora_configuration_is_refused(site, unchanged, fields, reason):
    ws, folder = site
    edit(folder / "lora" / CONFIG, **fields)
    assert reason in refused(ws, folder / "lora")
    unchanged()


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"peft_type": "LORA", "peft_type": "LORA"}', '{"peft_type": "LORA", "r": NaN}',
     '{"peft_type": "LORA", "revision": "\\ud800"}', '{"a": ' * 70 + "1" + "}" * 70,
     '{"peft_type": "LORA", "r": 1' + "0" * 5000 + "}", "\x00" * 100],
    ids=["deep", "twice", "nan", "half", "nested", "long number", "zeros"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_json_that_two_readers_may_take_differently_is_refused(site, unchanged, kind, text):
    ws, folder = site
    name = CONFIG if kind == "lora" else "lori_adapter.json"
    (folder / kind / name).write_text(text)
    assert "is not usable" in refused(ws, folder / kind)
    unchanged()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_layers": 3}, "num_layers is 3"),
        ({"token_dim": True}, "token_dim is True"),
        ({"num_virtual_tokens": 7}, "num_virtual_tokens is 7"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"new_in_peft_9": [1]}, "new_in_peft_9"),
        ({"modules_to_save": ["x"]}, "modules_to_save"),
    ],
)
def test_a_hostile_prefix_configuration_is_refused(site, unchanged, fields, reason):
    ws, folder = site
    edit(folder / "prefix" / CONFIG, **fields)
    assert reason in refused(ws, folder / "prefix")
    unchanged()


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "ia3"}, {"kind": "lora"}, {"kind": "../../os"}, {"kind": "full_export"},
        {"options": {"placement": {}, "reduction": 4, "activation": "relu"}},
        {"options": {"placement": "houlsby", "reduction": 10**30, "activation": "relu"}},
        {"version": True}, {"run": "x"},
    ],
)  # fmt: skip
def test_a_hostile_folder_of_the_own_form_is_refused(site, unchanged, fields):
    ws, folder = site
    edit(folder / "bottleneck" / "lori_adapter.json", **fields)
    refused(ws, folder / "bottleneck")
    unchanged()


@pytest.mark.parametrize("name", ["..", "-", "a\nb", "\x1b[31m", "x" * 200, "base", "latest", "1"])
def test_a_hostile_folder_name_becomes_a_line_of_the_pattern_or_is_refused(site, tmp_path, name):
    from lori_manager.refs import check_name
    from lori_manager.transfer import line_name

    with contextlib.suppress(InvalidInput):
        assert check_name(line_name(tmp_path / "x" / name)).isascii()


@pytest.mark.parametrize(
    "fields",
    [
        {"members": ["../../etc", "two"]}, {"members": ["/tmp", "two"]},
        {"members": ["a/b", "two"]},
        {"members": "ab"}, {"members": [".hidden", "two"]}, {"held_out": [[1e308, 1], [1, 1]]},
        {"held_out": [["9", 1], [1, 1]]}, {"reads": "\x1b[2J"}, {"version": 9},
    ],
)  # fmt: skip
def test_a_hostile_router_is_refused(tmp_path, fields):
    from targets import FINGERPRINT, Bed

    from lori_manager.adapters.routed_directory import read_routed

    bed = Bed(tmp_path / "bed")
    edit(bed.routed / "router.json", **fields)
    said = one_line(lambda: read_routed(bed.routed, shapes=bed.shapes, fingerprint=FINGERPRINT))
    assert "router is malformed" in said


# The store.


@pytest.mark.parametrize(
    "digest", ["../../../etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "/..", ""]
)
def test_a_digest_that_is_none_is_no_path(tmp_path, digest):
    for call in (ObjectStore(tmp_path).get, ObjectStore(tmp_path).exists):
        with pytest.raises(DamagedObject, match="is no SHA-256"):
            call(digest)


def test_a_small_stored_file_cannot_ask_for_long_or_for_much():
    from lori_manager.engine.codec import decode_adapter, encode_adapter
    from lori_manager.engine.projection import ORTHOGONAL, ProjectionSpec
    from lori_manager.engine.weights import AdapterWeights, Block

    spec = ProjectionSpec(1, "", 2, {"x": 2**18}, ORTHOGONAL)
    B, mask = {"x": torch.zeros(1, 2)}, {"x": torch.zeros(1, 2, dtype=torch.bool)}
    data = encode_adapter(AdapterWeights((Block(B, 1.0, spec, mask=mask),)))
    header, values = mutating.split(data)
    doc = json.loads(header["__metadata__"]["lori"])
    doc["blocks"][0]["modules"] = [[1, 2**24, 2, ["x"]]]
    begun = time.process_time()
    with pytest.raises(DamagedObject, match="is for more than 262144 inputs"):
        decode_adapter(sealed(header, doc, values))
    assert time.process_time() - begun < 1


def sealed(header, doc, values):
    """A file with that document and a checksum that fits."""
    import hashlib

    doc.pop("sha256")
    h = hashlib.sha256(json.dumps(doc, sort_keys=True, separators=(",", ":")).encode())
    for key in sorted(k for k in header if k != "__metadata__"):
        begin, end = header[key]["data_offsets"]
        h.update(f"|{key}|{end - begin}|".encode() + values[begin:end])
    doc["sha256"] = h.hexdigest()
    header["__metadata__"]["lori"] = json.dumps(doc, sort_keys=True, separators=(",", ":"))
    return mutating.joined(header, values)


def test_what_the_store_makes_is_its_owners_alone(site, tmp_path, tiny_base):
    old = os.umask(0)
    try:
        with Workspace.create(tmp_path / "fresh", str(tiny_base)) as ws:
            ws.store.objects.put(b"content")
    finally:
        os.umask(old)
    root = tmp_path / "fresh" / ".lori"
    for path in (root, *root.rglob("*")):
        mode = path.stat().st_mode & 0o777
        if path.name.endswith(".lock"):  # empty, and in a folder that nobody else may enter
            continue
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_a_workspace_that_another_user_put_above_is_not_taken(site, monkeypatch):
    ws, _ = site
    (ws.root / "deep").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    if os.getuid() == 0:
        os.chown(ws.root / ".lori", 12345, -1)
    said = one_line(lambda: Workspace.open(ws.root / "deep"))
    assert "belongs to another user" in said
    Workspace.open(ws.root).close()


# Bases.


@pytest.fixture
def base(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "base")


@pytest.mark.parametrize(
    "name", ["../../x.safetensors", "/etc/passwd", "a/b.safetensors", "pytorch_model.bin", ".."]
)
def test_an_index_names_files_beside_it_alone(base, tmp_path, name):
    shutil.copy(base / "model.safetensors", tmp_path / "x.safetensors")
    (base / "model.safetensors").unlink()
    index = {"weight_map": {"a": name}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    said = one_line(lambda: Workspace.create(tmp_path / "ws", str(base)))
    assert "is not an index of safetensors files beside it" in said
    assert not (tmp_path / "ws").exists()


def test_a_second_file_of_weights_does_not_change_what_the_fingerprint_is_of(base):
    mark = models.fingerprint(base)
    tensors = load_file(base / "model.safetensors")
    save_file({k: v + 1 for k, v in tensors.items()}, base / "zz.safetensors")
    # transformers loads model.safetensors: so that is what is known by the fingerprint
    assert models.fingerprint(base) == mark
    (base / "model.safetensors").rename(base / "aa.safetensors")
    assert "in another file" in one_line(lambda: models.fingerprint(base))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"attn_implementation": "evil/kernel"}, "kernels to be fetched"),
        ({"_attn_implementation": {"": "evil/kernel"}}, "kernels to be fetched"),
        ({"text_config": {"experts_implementation": "evil/kernel"}}, "kernels to be fetched"),
        ({"num_hidden_layers": 10**9}, "more than 10000 layers"),
        ({"hidden_size": 2**60}, "no model is so large"),
        ({"max_position_embeddings": "x"}, "max_position_embeddings"),
    ],
)
def test_a_hostile_configuration_of_a_base_is_refused(base, tmp_path, fields, reason):
    edit(base / "config.json", **fields)
    assert reason in one_line(lambda: Workspace.create(tmp_path / "ws", str(base)))
    for load in (models.load_skeleton, models.load_base):
        assert reason in one_line(lambda load=load: load(base))
    assert not (tmp_path / "ws").exists()


def test_an_adapter_beside_the_base_is_not_put_into_it(base, tmp_path):
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/base"}')
    assert "holds adapter_config.json" in one_line(lambda: models.load_base(base))


CODE = """
import os, pathlib
pathlib.Path(os.environ["LORI_TEST_RAN"]).write_text("ran")
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own-model"
"""
MODEL = """
from .configuration_own import OwnConfig
from transformers import LlamaForCausalLM
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def coded(base, tmp_path, monkeypatch):
    """A base that is built by its own code, as the hub's cache keeps it; what the code leaves."""
    snapshot = tmp_path / "models--org--own" / "snapshots" / COMMIT
    shutil.copytree(base, snapshot)
    edit(
        snapshot / "config.json", model_type="own-model", architectures=["OwnModel"],
        auto_map={"AutoConfig": "configuration_own.OwnConfig",
                  "AutoModelForCausalLM": "modeling_own.OwnModel"},
    )  # fmt: skip
    (snapshot / "configuration_own.py").write_text(CODE)
    (snapshot / "modeling_own.py").write_text(MODEL)
    ran = tmp_path / "ran"
    monkeypatch.setenv("LORI_TEST_RAN", str(ran))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "mods")
    )
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(snapshot))
    return snapshot, ran


def test_code_of_a_base_is_refused_unless_asked_for_with_its_commit(coded, tmp_path):
    snapshot, ran = coded

    def create(*a, **k):
        return Workspace.create(tmp_path / "ws", *a, **k)

    assert "--trust-remote-code" in one_line(lambda: create("org/own"))
    assert "--trust-remote-code" in one_line(lambda: create(str(snapshot)))
    trust = {"trust_remote_code": True}
    for revision in (None, "main", COMMIT[:12], COMMIT.upper()):
        said = one_line(lambda r=revision: create("org/own", r, **trust))
        assert "40 hexadecimal digits" in said
    assert "a folder has no commit" in one_line(lambda: create(str(snapshot), **trust))
    for load in (models.load_skeleton, models.load_base):
        one_line(lambda load=load: load(snapshot))
    assert not ran.exists()
    assert not (tmp_path / "ws").exists()


def test_code_of_a_base_runs_once_pinned_and_only_as_it_was(coded, tmp_path):
    snapshot, ran = coded
    with Workspace.create(tmp_path / "ws", "org/own", COMMIT, trust_remote_code=True) as ws:
        assert not ran.exists()
        code = ws.store.base().code
        assert code == base_files.code_digest(snapshot)
        assert ws.skeleton().linear_shapes
        assert ran.exists()
    ran.unlink()
    (snapshot / "helper.py").write_text("x = 1")
    with Workspace.open(tmp_path / "ws") as ws:
        with pytest.raises(WrongBase, match="is not what this workspace was made with"):
            ws.skeleton()
        with pytest.raises(WrongBase, match="is not what this workspace was made with"):
            ws.move_base(str(snapshot))
    assert not ran.exists()


def test_code_of_another_repository_is_refused_even_when_asked_for(coded, tmp_path):
    snapshot, ran = coded
    edit(
        snapshot / "config.json", auto_map={"AutoConfig": "evil/repo--configuration_own.OwnConfig"}
    )

    def create():
        return Workspace.create(tmp_path / "ws", "org/own", COMMIT, trust_remote_code=True)

    assert "code of another repository" in one_line(create)
    assert not ran.exists()


def test_trust_without_code_is_refused(base, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(base))

    def create():
        return Workspace.create(tmp_path / "ws", "org/a", COMMIT, trust_remote_code=True)

    assert "brings no code" in one_line(create)


# Chat templates.

ENDLESS = {
    "a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "a power": "{{ 9**(9**9) }}",
    "a wide field": "{{ '%999999999999d' % 1 }}",
    "much text": "{{ 'x' * 99999999999 }}",
    "a long answer": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}
ESCAPES = {
    "the class of a text": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a function's globals": "{{ raise_exception.__globals__['os'].system('touch ran') }}",
    "the loop's own": "{{ self.__init__.__globals__ }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "a changed message": "{{ messages.append(1) }}",
    "an include": "{% include '/etc/passwd' %}",
    "attr": "{{ messages | attr('__class__') | attr('__base__') }}",
}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return models.load_tokenizer(tiny_base)


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_without_end_is_ended(tokenizer, monkeypatch, template):
    monkeypatch.setattr(tokenizer, "chat_template", ENDLESS[template])
    render = chat_renderer(tokenizer, Bounds(cpu_seconds=0.3))
    for _ in range(2):  # the second call has a fork of its own again
        with pytest.raises(BadData, match="the chat template"):
            render(CHAT)


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_cannot_leave_the_sandbox(tokenizer, monkeypatch, tmp_path, template):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizer, "chat_template", ESCAPES[template] + "{{ 'written' }}")
    with contextlib.suppress(BadData):
        prompt, _ = chat_renderer(tokenizer)(CHAT)
        assert "class" not in prompt
        assert "root:" not in prompt
    assert list(tmp_path.iterdir()) == []


def test_a_template_that_means_well_is_rendered_in_the_fork(tokenizer):
    render = chat_renderer(tokenizer)
    assert [render(CHAT) for _ in range(50)] == [("user: hi<|end|>assistant: ", "yes")] * 50


def test_a_fork_answers_within_its_bounds_alone():
    double = Forked(lambda x: x * 2, Bounds(cpu_seconds=0.2, memory=64 << 20, answer=1000))
    assert double(4) == 8
    assert double("a") == "aa"
    with pytest.raises(Refused, match="more than 1000"):
        double("a" * 600)
    assert double(5) == 10
    with pytest.raises(Refused, match="unsupported operand"):
        double({"a": 1})
    wasteful = Forked(lambda x: len(bytearray(x)), Bounds(memory=64 << 20))
    assert wasteful(10) == 10
    with pytest.raises(Refused, match=r"MemoryError|memory"):
        wasteful(1 << 30)
    quiet = Forked(lambda x: time.sleep(x), Bounds(wall_seconds=0.2))
    with pytest.raises(Refused, match=r"and 0\.2 s"):
        quiet(20)


def test_a_fork_holds_no_files_of_its_parent(tmp_path):
    def held(_):
        links = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
        return [os.readlink(link) for link in links if os.path.islink(link)]

    with (tmp_path / "open").open("w"):
        assert str(tmp_path / "open") in held(0)
        assert str(tmp_path / "open") not in Forked(held)(0)


# Data, settings and own code.


@pytest.mark.parametrize(
    "spec", ["hf:../../etc", "hf:a/b/c", "hf:/nowhere/x", "hf:~x/y", "hf:a/..b"]
)
def test_a_data_set_has_a_name_of_the_hub_or_is_a_folder_here(tmp_path, spec):
    assert "expected hf:owner/name" in one_line(lambda: read_source(spec, root=tmp_path))


def test_rows_of_hostile_size_are_refused_in_time(tmp_path):
    names = [f"k{i}" for i in range(60_000)]
    twice = "{" + ",".join(f'"{n}": 1' for n in [*names, "k59999"]) + "}"
    choices = json.dumps({"prompt": "a", "completion": "b", "choices": [*names, "k59999"]})
    begun = time.process_time()
    for text, reason in ((twice, "comes twice"), (choices, "must differ"), ("[" * 10**6, "deep")):
        (tmp_path / "r.jsonl").write_text(text)
        assert reason in one_line(lambda: read_source("r.jsonl", root=tmp_path))
    assert time.process_time() - begun < 5  # not the square of their number


@pytest.mark.parametrize(
    "text",
    ["x = " + "[" * 5000, "[defaults]\nalpha = 1" + "0" * 400, "[defaults]\nrank = 1" + "0" * 30,
     "[gate]\nmargin = 1" + "0" * 400, "[tasks.a]\nprobe_rows = 'x'", "[tasks.a]\ntrain = 5",
     "[tasks.a]\nallow_overlap = 1", "[scorers]\n'../x' = 'a.py:b'", "[scorers]\nx = 'a.sh:b'",
     "[scorers]\nx = 'a.py:__import__(1)'", "x = 1" + "0" * 5000],
)  # fmt: skip
def test_hostile_settings_are_refused(site, text):
    ws, _ = site
    (ws.root / "lori.toml").write_text(text)
    with Workspace.open(ws.root) as opened, pytest.raises(InvalidInput) as caught:
        _ = opened.settings
    assert "\n" not in str(caught.value)


def test_an_own_scorer_is_not_run_by_looking(site, tmp_path):
    ws, _ = site
    (ws.root / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(t, r): return 1.0\n"
    )
    (ws.root / "lori.toml").write_text('[scorers]\nown = "own.py:f"\n')
    with Workspace.open(ws.root) as opened:
        assert opened.settings.scorers
        assert list(opened.verify()) == []
        opened.audit()
        opened.add_task("named", eval=str(ws.root / "tasks/colour/eval.jsonl"), scorer="own")
    for command in (["tasks"], ["lines"], ["verify"], ["show", "a-lora"]):
        subprocess.run(
            [sys.executable, "-m", "lori_manager", "-C", str(ws.root), *command],
            check=True, capture_output=True,
        )  # fmt: skip
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    ["../x", "a/b", "", ".", "..", "a" * 65, "a\0", "base", "CON:", "$(id)", "é", "a b", "3"],
)
def test_no_name_but_those_of_the_pattern_is_taken(site, unchanged, name):
    ws, _ = site
    rows = str(ws.root / "tasks/colour/eval.jsonl")
    with pytest.raises(LoriError):
        ws.add_task(name, eval=rows)
    with pytest.raises(LoriError):
        ws.set_alias("a-lora@1", name)
    unchanged()


def test_a_tokenizer_that_crashes_its_reader_is_refused(base):
    (base / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    with pytest.raises(NotFound, match="holds no usable tokenizer"):
        models.load_tokenizer(base)
