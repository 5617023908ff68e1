import errno
import json
import stat
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from lori_manager.adapters import staging
from lori_manager.adapters.peft_export import write_peft
from lori_manager.errors import Conflict, InvalidInput, StorageFailed

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def load(bed, directory, dtype=torch.float32):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # unknown fields, missing keys, Conv1D
        return PeftModel.from_pretrained(bed.copy().to(dtype), directory).eval()


def names(directory):
    return sorted(p.name for p in directory.iterdir())


def test_peft_computes_the_logits_of_the_merged_weights(llama, tools, tmp_path):
    updates = llama.updates()
    write_peft(updates, tmp_path / "a", **llama.export_arguments())
    merged = llama.merged(updates)
    assert tools.difference(llama.model, merged) > 0.1  # else the test would prove nothing
    assert tools.difference(load(llama, tmp_path / "a"), merged) <= 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_unequal_ranks_and_scalings_become_one_rank(kind, request, tools, tmp_path):
    bed = request.getfixturevalue(kind)
    updates = bed.updates(ranks=(1, 3, 8), scalings=(0.3, 2.0, -1.7, 1 / 3))
    write_peft(updates, tmp_path / "a", **bed.export_arguments())
    assert tools.difference(load(bed, tmp_path / "a"), bed.merged(updates)) <= 1e-5
    # What float32 leaves is the rounding of the folded B, and Llama's norms in float32.
    folded = {
        n: replace(u, B=(u.B.double() * u.scaling).float(), scaling=1.0) for n, u in updates.items()
    }
    exact = bed.merged(folded, torch.float64)
    limit = 1e-6 if kind == "llama" else 1e-12
    assert tools.difference(load(bed, tmp_path / "a", torch.float64), exact) <= limit
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


@pytest.mark.parametrize("part", ["", "c_attn", "mlp.c_proj"])
def test_conv1d_modules_export_too(gpt2, tools, tmp_path, part):
    updates = gpt2.updates([n for n in gpt2.layers if n.endswith(part)], scalings=(0.5,))
    write_peft(updates, tmp_path / "a", **gpt2.export_arguments())
    merged = gpt2.merged(updates)
    assert tools.difference(gpt2.model, merged) > 0.01
    assert tools.difference(load(gpt2, tmp_path / "a"), merged) <= 1e-5


def targets_written(bed, modules, directory, **changes):
    write_peft(bed.updates(modules), directory, **bed.export_arguments(**changes))
    return json.loads((directory / "adapter_config.json").read_text())["target_modules"]


def test_targets_are_short_only_where_the_short_names_mean_the_same(llama, gpt2, tmp_path):
    both = [n for n in llama.layers if n.endswith(("q_proj", "down_proj"))]
    assert targets_written(llama, both, tmp_path / "a") == ["down_proj", "q_proj"]
    first = ["model.layers.0.self_attn.q_proj"]
    assert targets_written(llama, first, tmp_path / "b") == first
    # mlp.c_proj and attn.c_proj share their last part.
    attention = [n for n in gpt2.layers if n.endswith("attn.c_proj")]
    assert targets_written(gpt2, attention, tmp_path / "c") == attention
    more = [*llama.all_modules, f"draft.{first[0]}"]
    with pytest.raises(ValueError, match="ending of another"):
        targets_written(llama, first, tmp_path / "d", all_modules=more)


def test_what_is_not_a_target_stays_untouched(llama, tmp_path):
    write_peft(
        llama.updates(["model.layers.1.mlp.up_proj"]), tmp_path / "a", **llama.export_arguments()
    )
    adapted = [n for n, m in load(llama, tmp_path / "a").named_modules() if hasattr(m, "lora_A")]
    assert adapted == ["base_model.model.model.layers.1.mlp.up_proj"]


def test_the_files_say_what_servers_and_lori_look_for(llama, tools, tmp_path):
    write_peft(
        llama.updates(),
        tmp_path / "a",
        **llama.export_arguments(revision="abc", label="safety@3"),
    )
    assert names(tmp_path / "a") == FILES
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == llama.base_name
    assert config["revision"] == "abc"
    assert config["inference_mode"] is True
    tensors, metadata = tools.read_tensors(tmp_path / "a")
    assert metadata == {"format": "pt", "lori_base_fingerprint": llama.fingerprint}
    assert tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape == (4, 32)
    assert tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"].shape == (48, 4)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "# safety@3" in card
    assert 'base_model: "org/Tiny-Base"' in card
    modes = {stat.S_IMODE((tmp_path / "a" / name).stat().st_mode) for name in FILES}
    assert len(modes) == 1  # all as readable as any new file


def test_scaling_one_keeps_every_bit_and_inputs_stay_unchanged(llama, tools, tmp_path):
    updates = llama.updates(scalings=(1.0,))
    before = {n: (u.A.clone(), u.B.clone()) for n, u in updates.items()}
    shared = {n: replace(u, A=updates[llama.layers[0]].A) for n, u in updates.items()}
    write_peft(updates, tmp_path / "a", **llama.export_arguments())
    tensors, _ = tools.read_tensors(tmp_path / "a")
    for name, (A, B) in before.items():
        assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], A)
        assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], B)
        assert torch.equal(updates[name].A, A)
        assert torch.equal(updates[name].B, B)
    # One A in memory for several modules, as a shared projection has it.
    one = {n: u for n, u in shared.items() if llama.shapes[n][1] == 32}
    write_peft(one, tmp_path / "b", **llama.export_arguments())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_hold_the_rounded_factors(llama, tools, tmp_path, dtype):
    updates = llama.updates(["model.layers.0.mlp.up_proj"], scalings=(0.7,))
    write_peft(updates, tmp_path / "a", **llama.export_arguments(dtype=dtype))
    tensors, _ = tools.read_tensors(tmp_path / "a")
    (update,) = updates.values()
    stored = tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
    assert torch.equal(stored, (update.B.double() * 0.7).to(dtype))


def test_values_that_the_dtype_cannot_hold_are_refused(llama, tmp_path):
    updates = llama.updates(scalings=(1e6,))
    with pytest.raises(InvalidInput, match=r"lora_B of module 'model.layers.0.* not finite"):
        write_peft(updates, tmp_path / "a", **llama.export_arguments(dtype=torch.float16))
    assert names(tmp_path) == []


def test_bad_arguments_are_refused_before_anything_is_written(llama, tmp_path):
    arguments = llama.export_arguments()
    with pytest.raises(ValueError, match="expected updates"):
        write_peft({}, tmp_path / "a", **arguments)
    with pytest.raises(ValueError, match="dtype"):
        write_peft(llama.updates(), tmp_path / "a", **llama.export_arguments(dtype=torch.int8))
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.up_proj' is not one"):
        write_peft(
            llama.updates(["model.layers.0.mlp.up_proj"]),
            tmp_path / "a",
            **llama.export_arguments(all_modules=["lm_head"]),
        )
    with pytest.raises(InvalidInput, match="'lm_head' is an output head"):
        write_peft(llama.updates(["lm_head"]), tmp_path / "a", **arguments)
    assert names(tmp_path) == []


def test_a_directory_with_something_in_it_is_not_written(llama, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("years of work")
    with pytest.raises(Conflict, match="not empty"):
        write_peft(llama.updates(), tmp_path / "a", **llama.export_arguments())
    with pytest.raises(Conflict, match="is a file"):
        write_peft(
            llama.updates(), tmp_path / "a" / "thesis.txt", **llama.export_arguments(overwrite=True)
        )
    assert names(tmp_path / "a") == ["thesis.txt"]


def test_overwrite_replaces_the_adapter_and_nothing_else(llama, tools, tmp_path):
    arguments = llama.export_arguments(overwrite=True)
    write_peft(llama.updates(seed=1), tmp_path / "a", **arguments)
    (tmp_path / "a" / "thesis.txt").write_text("years of work")
    updates = llama.updates(seed=2)
    write_peft(updates, tmp_path / "a", **arguments)
    assert names(tmp_path / "a") == [*FILES, "thesis.txt"]
    assert tools.difference(load(llama, tmp_path / "a"), llama.merged(updates)) <= 1e-5


def test_an_empty_directory_is_filled_and_missing_parents_are_made(llama, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_peft(llama.updates(), Path(), **llama.export_arguments())
    assert names(tmp_path / "here") == FILES
    write_peft(llama.updates(), tmp_path / "x" / "y" / "z", **llama.export_arguments())
    assert names(tmp_path / "x" / "y") == ["z"]


def test_a_place_that_cannot_be_written_is_one_error(llama, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed, match="cannot write"):
        write_peft(llama.updates(), tmp_path / "file" / "a", **llama.export_arguments())


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("step", range(9))
def test_a_disk_that_fills_up_never_leaves_a_loadable_mixture(
    llama, tools, tmp_path, monkeypatch, existing, step
):
    directory = tmp_path / "a"
    old, new = llama.updates(seed=1, ranks=(2,)), llama.updates(seed=2, ranks=(4,))
    if existing:
        write_peft(old, directory, **llama.export_arguments())
    steps = []
    replace_file = Path.replace

    def tick(*_):
        steps.append(1)
        if len(steps) == step + 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    def ticking_replace(path, target):
        tick()
        return replace_file(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(staging, "sync", tick)
        patched.setattr(Path, "replace", ticking_replace)
        if step < (8 if existing else 5):
            with pytest.raises(StorageFailed, match="No space left"):
                write_peft(new, directory, **llama.export_arguments(overwrite=True))
        else:
            write_peft(new, directory, **llama.export_arguments(overwrite=True))
    assert not list(tmp_path.rglob(".lori-export-*"))
    if (directory / "adapter_config.json").exists():
        config = json.loads((directory / "adapter_config.json").read_text())
        tensors, _ = tools.read_tensors(directory)
        written = {2: old, 4: new}[config["r"]]
        for name, update in written.items():
            assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], update.B)


def test_a_directory_that_appears_meanwhile_is_not_replaced(llama, tmp_path, monkeypatch):
    publish = staging.publish

    def late(staged, directory, last, existing):
        directory.mkdir()
        (directory / "other").write_text("")
        publish(staged, directory, last, existing)

    monkeypatch.setattr(staging, "publish", late)
    with pytest.raises(Conflict, match="meanwhile"):
        write_peft(llama.updates(), tmp_path / "a", **llama.export_arguments())
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["other"]
