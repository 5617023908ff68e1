"""What PEFT has no form for: written, read back, and refused where it cannot be trusted."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_workspaces import copied, make_workspace

from lori_manager.adapters.applying import applied
from lori_manager.adapters.own_form import JSON_FILE, TENSORS_FILE
from lori_manager.errors import InvalidInput

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("bottleneck", "full", "prefix")


@pytest.fixture(scope="module")
def taught(tiny_base, tmp_path_factory):
    """One adapter a kind, on lines of their names, and its export. Not to be changed."""
    folder = tmp_path_factory.mktemp("own")
    ws = make_workspace(folder / "w", tiny_base)
    from lori_manager.teaching import TrainOptions

    for kind in KINDS:
        config = ws.settings.config.replace(kind=kind)
        ws.train(["colour"], config, TrainOptions(line=f"a-{kind}"))
        ws.export(f"a-{kind}@1", folder / f"{kind}-out")
    return ws, folder


def exported(taught, tmp_path, kind="bottleneck"):
    shutil.copytree(taught[1] / f"{kind}-out", tmp_path / "out")
    return copied(taught[0], tmp_path / "ws"), tmp_path / "out"


def refused(ws, folder):
    (found,) = ws.import_adapters([folder])
    assert found.adapter is None
    return found.reason


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_comes_back_with_the_same_digest_and_acts_alike(taught, tmp_path, kind):
    ws, folder = exported(taught, tmp_path, kind)
    (found,) = ws.import_adapters([folder])
    adapter = found.adapter
    assert adapter.digest == ws.adapter(f"a-{kind}@1").digest
    assert adapter.method == kind
    assert adapter.origin == "imported"
    base = ws.base_model(ws.settings.config)
    ids = torch.arange(6)[None] + 40
    said = []
    for one in (adapter, ws.adapter(f"a-{kind}@1")):
        with applied(base, ws.stored(one)), torch.no_grad():
            said.append(base.model(input_ids=ids).logits)
    assert torch.equal(*said)
    assert list(ws.verify()) == []


@pytest.mark.parametrize("kind", ["bottleneck", "full"])
def test_the_folder_is_json_and_safetensors_that_anybody_can_read(taught, kind):
    ws, folder = taught
    doc = json.loads((folder / f"{kind}-out" / JSON_FILE).read_text())
    base = ws.store.base()
    stored = ws.stored(ws.adapter(f"a-{kind}@1"))
    assert doc["format"] == "lori-kind"
    assert (doc["version"], doc["kind"], doc["options"]) == (1, kind, dict(stored.options))
    assert doc["source"].startswith("arXiv:")
    assert doc["base"]["fingerprint"] == base.fingerprint
    tensors = load_file(folder / f"{kind}-out" / TENSORS_FILE)
    assert set(tensors) == set(stored.tensors)
    assert all(torch.equal(t, stored.tensors[n]) for n, t in tensors.items())


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        ({"format": "peft"}, "format"),
        ({"version": 2}, "version '2'"),
        ({"kind": "teapot"}, "'teapot'"),
        ({"kind": "lora"}, "'lora'"),
        ({"kind": ["full"]}, "has no such folder"),
        ({"options": []}, "`options`"),
        ({"base": {"fingerprint": "0" * 64}}, "made for a base with fingerprint '0000"),
        ({"base": {}}, "does not say of which base"),
        ({"options": {"placement": "houlsby"}}, "fits no LlamaForCausalLM"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(taught, tmp_path, new, reason):
    ws, folder = exported(taught, tmp_path)
    doc = json.loads((folder / JSON_FILE).read_text())
    (folder / JSON_FILE).write_text(json.dumps(doc | new))
    assert reason in refused(ws, folder)


def test_a_folder_without_a_base_can_be_assumed_to_fit(taught, tmp_path):
    ws, folder = exported(taught, tmp_path)
    doc = json.loads((folder / JSON_FILE).read_text())
    (folder / JSON_FILE).write_text(json.dumps(doc | {"base": {}}))
    (found,) = ws.import_adapters([folder], assume_base=True)
    assert found.adapter is not None


NAME = "model.layers.0.mlp.up.bias"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda t: t.pop(NAME), f"'{NAME}'.*missing"),
        (lambda t: t.update({NAME: t[NAME][:-1].clone()}), f"'{NAME}'"),
        (lambda t: t.update({"more": t[NAME].clone()}), "'more'.*no such place"),
        (lambda t: t.update({NAME: t[NAME] * float("nan")}), "not finite"),
        (lambda t: t.update({NAME: t[NAME].float()}), "one dtype"),
        (lambda t: t.update({NAME: t[NAME].to(torch.int8)}), "one dtype"),
        (lambda t: t.clear(), "one dtype"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(taught, tmp_path, damage, reason):
    ws, folder = exported(taught, tmp_path)
    tensors = load_file(folder / TENSORS_FILE)
    damage(tensors)
    save_file(tensors, folder / TENSORS_FILE)
    assert re.search(reason, refused(ws, folder))


@pytest.mark.parametrize("name", [JSON_FILE, TENSORS_FILE])
def test_files_that_are_cut_or_gone_are_refused(taught, tmp_path, name):
    ws, folder = exported(taught, tmp_path)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    assert "copy it again" in refused(ws, folder)
    (folder / name).unlink()
    assert refused(ws, folder)


def test_a_prefix_of_another_model_or_base_is_refused(taught, tmp_path):
    ws, folder = exported(taught, tmp_path, "prefix")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    fingerprint = {"lori_base_fingerprint": ws.store.base().fingerprint}
    short = {"prompt_embeddings": tensors["prompt_embeddings"][:, :-2].contiguous()}
    save_file(short, path, metadata=fingerprint)
    assert "another model" in refused(ws, folder)
    save_file({"x": tensors["prompt_embeddings"]}, path, metadata=fingerprint)
    assert "'prompt_embeddings' alone" in refused(ws, folder)
    save_file({"prompt_embeddings": tensors["prompt_embeddings"] * float("inf")}, path,
              metadata=fingerprint)  # fmt: skip
    assert "not finite" in refused(ws, folder)
    save_file(tensors, path, metadata={"lori_base_fingerprint": "0" * 64})
    assert "fingerprint" in refused(ws, folder)


def test_a_whole_model_is_for_what_changes_the_bases_weights(taught, tmp_path):
    from transformers import AutoModelForCausalLM

    ws, _ = taught
    for kind in ("bottleneck", "prefix"):
        with pytest.raises(InvalidInput, match=f"of kind `{kind}`, which changes no weight"):
            ws.export(f"a-{kind}@1", tmp_path / kind, full=True)
        assert not (tmp_path / kind).exists()
    ws.export("a-full@1", tmp_path / "full", full=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    base = ws.base_model(ws.settings.config)
    ids = torch.arange(6)[None] + 40
    with applied(base, ws.stored(ws.adapter("a-full@1"))), torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_several_stages_go_on_from_one_another(taught, tmp_path):
    ws = copied(taught[0], tmp_path / "ws")
    for kind in KINDS:
        config = ws.settings.config.replace(kind=kind)
        first, second = ws.train(["shape", "size"], config, sequence=f"seq-{kind}")
        assert second.adapter.parents[0].ref == first.adapter.ref
        assert second.adapter.digest != first.adapter.digest
        assert len(second.scores) == 2
