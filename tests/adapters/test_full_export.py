import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lori_manager.adapters import full_export, resuming
from lori_manager.adapters.full_export import write_full
from lori_manager.errors import Conflict, InvalidInput, NotFound, StorageFailed, WrongBase

IDS = torch.arange(24).reshape(2, 12) % 61
Q = "model.layers.0.self_attn.q_proj"


def export(base, updates, directory, **changes):
    write_full(base, updates, directory, **{"fingerprint": "f" * 64} | changes)
    return directory


def save(model, folder, dtype=torch.float32, **options):
    """The base's folder; its weights in one file, or in many with `max_shard_size`."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(dtype).save_pretrained(folder, **options)
    return folder


def summed(base, updates, transposed=()):
    """The base loaded by transformers, every delta added whole, in float32, and rounded once."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    with torch.no_grad():
        for name, update in updates.items():
            weight = model.get_submodule(name).weight
            delta = update.scaling * (update.B.float() @ update.A.float())
            delta = delta.T if name in transposed else delta
            weight.copy_((weight.float() + delta).to(weight.dtype))
    return model


def loaded(folder):
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not any(told[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def assert_same(model, expected):
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype
        assert torch.equal(ours[key], value), key


def tensors(folder):
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= load_file(file)
    return out


def stamps(folder):
    return {f.name: (f.stat().st_ino, f.stat().st_mtime_ns) for f in folder.glob("*.safetensors")}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that end inside every tensor."""
    monkeypatch.setattr(full_export, "_VALUES", 300)
    monkeypatch.setattr(full_export, "_ROWS", 8)
    monkeypatch.setattr(full_export, "_BYTES", 500)
    monkeypatch.setattr(full_export, "_FLUSHED", 2000)


@pytest.fixture
def sharded(llama, tmp_path):
    base = save(llama.model, tmp_path / "base", max_shard_size="10KB")
    assert len(list(base.glob("*.safetensors"))) > 4
    return base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", ["1GB", "10KB"])
def test_every_bit_is_that_of_adding_to_the_loaded_model(
    llama, small_blocks, tmp_path, dtype, size
):
    base = save(llama.model, tmp_path / "base", dtype, max_shard_size=size)
    updates = llama.updates(ranks=(4, 7), scalings=(2.0, 1 / 3))
    before = {n: (u.A.clone(), u.B.clone()) for n, u in updates.items()}
    export(base, updates, tmp_path / "full")
    assert_same(loaded(tmp_path / "full"), summed(base, updates))
    for name, (A, B) in before.items():
        assert torch.equal(updates[name].A, A)
        assert torch.equal(updates[name].B, B)
    names = sorted(f.name for f in base.glob("*.safetensors*"))
    assert sorted(f.name for f in (tmp_path / "full").glob("*.safetensors*")) == names
    for file in (tmp_path / "full").glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            assert f.metadata() == {"format": "pt"}


def test_every_bit_is_the_same_at_sizes_that_take_several_blocks(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=61, hidden_size=1030, intermediate_size=2600, num_hidden_layers=1,
                    num_attention_heads=1, num_key_value_heads=1, head_dim=1030)
    )  # fmt: skip
    base = save(model, tmp_path / "base", torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    updates = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            updates[name] = full_export.LowRankUpdate(
                torch.randn(32, module.in_features, generator=generator),
                torch.randn(module.out_features, 32, generator=generator) * 0.01,
                0.7,
            )
    assert max(u.B.shape[0] * u.A.shape[1] for u in updates.values()) > 2 * full_export._VALUES
    assert_same(loaded(export(base, updates, tmp_path / "full")), summed(base, updates))


def test_the_exported_model_gives_the_logits_of_base_and_adapter(llama, tools, tmp_path):
    base = save(llama.model, tmp_path / "base")
    updates = llama.updates(scalings=(1.5,))
    model = AutoModelForCausalLM.from_pretrained(export(base, updates, tmp_path / "full")).eval()
    merged = llama.merged(updates)
    assert tools.difference(llama.model, merged) > 0.1
    assert tools.difference(model, merged) <= 1e-5


@pytest.mark.parametrize("prefix", [True, False])
def test_gpt2s_transposed_layers_are_right_whatever_prefix_the_names_have(
    gpt2, small_blocks, tools, tmp_path, prefix
):
    base = save(gpt2.model, tmp_path / "base")
    if not prefix:  # as the hub's own file has them
        file = base / "model.safetensors"
        bare = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
        bare["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)  # a buffer of old: nobody's weight
        save_file(bare, file, metadata={"format": "pt"})
    updates = gpt2.updates(scalings=(2.0,))
    square = "transformer.h.0.attn.c_proj"
    assert gpt2.shapes[square] == (32, 32)
    assert square in gpt2.transposed
    export(base, updates, tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    assert_same(model, summed(base, updates, gpt2.transposed))
    assert tools.difference(model, gpt2.merged(updates)) <= 1e-5
    assert tensors(tmp_path / "full").keys() == tensors(base).keys()


def test_names_that_transformers_changes_on_load_are_found(tmp_path):
    """Mixtral's file says block_sparse_moe where the model says mlp; experts are merged."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                      num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)
    )  # fmt: skip
    model.save_pretrained(tmp_path / "base")
    stored = tensors(tmp_path / "base")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in stored
    o = "model.layers.0.self_attn.o_proj"
    update = full_export.LowRankUpdate(torch.randn(4, 32), torch.randn(32, 4))
    export(tmp_path / "base", {o: update}, tmp_path / "full")
    assert_same(loaded(tmp_path / "full"), summed(tmp_path / "base", {o: update}))


def test_a_weight_that_the_loader_puts_together_is_refused(llama, tmp_path, monkeypatch):
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    def fused(model, *_, **__):
        return [
            WeightConverter(
                ["self_attn.qkv.weight"],
                [f"self_attn.{x}_proj.weight" for x in "qkv"],
                operations=[Chunk(dim=0)],
            )
        ]

    base = save(llama.model, tmp_path / "base")
    file = base / "model.safetensors"
    stored = load_file(file)
    for i in range(2):
        parts = [stored.pop(f"model.layers.{i}.self_attn.{x}_proj.weight") for x in "qkv"]
        stored[f"model.layers.{i}.self_attn.qkv.weight"] = torch.cat(parts)
    save_file(stored, file, metadata={"format": "pt"})
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", fused)
    for name in (Q, "model.layers.0.self_attn.k_proj"):
        with pytest.raises(
            WrongBase, match=rf"weight of module '{name}' as it is.*others such as 'model.*qkv"
        ):
            export(base, llama.updates([name]), tmp_path / "full")
    other = "model.layers.0.mlp.up_proj"
    export(base, llama.updates([other]), tmp_path / "full")
    old, new = tensors(base), tensors(tmp_path / "full")
    assert [k for k in old if not torch.equal(old[k], new[k])] == [f"{other}.weight"]


def refused(base, updates, tmp_path, error, match, target="new/full"):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=match) as caught:
        export(base, updates, tmp_path / target)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_what_does_not_fit_the_base_is_refused_with_nothing_written(llama, sharded, tmp_path):
    update = llama.updates([Q])[Q]
    refused(sharded, {"model.layers.9.q": update}, tmp_path, WrongBase, "has no module 'model.lay")
    refused(sharded, {"model.norm": update}, tmp_path, InvalidInput, "LlamaRMSNorm, expected a lin")
    refused(sharded, {"model.layers.0.mlp.up_proj": update}, tmp_path, WrongBase,
            r"\(48, 32\), the update \(32, 32\)")  # fmt: skip
    bad = replace(update, B=update.B * torch.inf)
    refused(sharded, {Q: bad}, tmp_path, InvalidInput, "not finite")
    index = sharded / "model.safetensors.index.json"
    kept = index.read_text()
    doc = json.loads(kept)
    shutil.copy(sharded / doc["weight_map"][f"{Q}.weight"], tmp_path / "away.safetensors")
    doc["weight_map"][f"{Q}.weight"] = "../away.safetensors"
    index.write_text(json.dumps(doc))
    refused(sharded, {Q: update}, tmp_path, NotFound, "not an index of safetensors files beside it")
    index.unlink()
    refused(sharded, {Q: update}, tmp_path, NotFound, r"neither model.safetensors nor model.safe")


def edit(base, change):
    stored = load_file(base / "model.safetensors")
    change(stored)
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})


def test_tensors_that_nothing_can_be_added_to_are_refused(llama, tmp_path):
    base = save(llama.model, tmp_path / "base")
    update = llama.updates([Q])
    key = f"{Q}.weight"
    edit(base, lambda t: t.update({key: t[key].to(torch.float8_e4m3fn)}))
    refused(base, update, tmp_path, InvalidInput, "is F8_E4M3, expected one of F32, BF16, F16")
    edit(base, lambda t: t.update({key: torch.zeros(16, 32)}))
    refused(base, update, tmp_path, WrongBase, r"has the shape \(16, 32\), module .*\(32, 32\)")
    edit(base, lambda t: t.update({"renamed.q_proj.weight": t.pop(key)}))
    refused(base, update, tmp_path, WrongBase, f"expected '{key}' or a name that.*'renamed.q_proj")
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(base, update, tmp_path, WrongBase, "cut short: its tensors need")


def test_a_sum_that_float16_cannot_hold_is_refused_and_leaves_nothing(llama, tmp_path):
    base = save(llama.model, tmp_path / "base", torch.float16, max_shard_size="10KB")
    last = "model.layers.1.mlp.up_proj"
    updates = llama.updates([Q, last])
    updates[last] = replace(updates[last], scaling=1e7)
    refused(base, updates, tmp_path, InvalidInput, f"{last}.weight' larger than float16", "full")


# Tied embeddings


@pytest.fixture
def tied(llama, tmp_path):
    torch.manual_seed(5)
    model = LlamaForCausalLM(
        LlamaConfig(**llama.model.config.to_diff_dict() | {"tie_word_embeddings": True})
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return save(model, tmp_path / "base", torch.bfloat16, max_shard_size="10KB")


def head_update(seed=7):
    generator = torch.Generator().manual_seed(seed)
    return full_export.LowRankUpdate(
        torch.randn(4, 32, generator=generator), torch.randn(61, 4, generator=generator)
    )


def test_tied_weights_are_stored_once_still(llama, tied, tmp_path):
    updates = llama.updates()
    export(tied, updates, tmp_path / "full")
    assert tensors(tmp_path / "full").keys() == tensors(tied).keys()
    assert "lm_head.weight" not in tensors(tied)
    model = loaded(tmp_path / "full")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(model, summed(tied, updates))
    for name in ("config.json", "model.safetensors.index.json"):
        assert json.loads((tmp_path / "full" / name).read_text()) == json.loads(
            (tied / name).read_text()
        )


@pytest.mark.parametrize("stored", ["embeddings", "head", "both"])
def test_an_update_of_a_tied_head_leaves_the_embeddings_alone(llama, tied, tmp_path, stored):
    base = tied
    if stored != "embeddings":
        base = save(AutoModelForCausalLM.from_pretrained(tied), tmp_path / "one", torch.bfloat16)
        embeddings = "model.embed_tokens.weight"
        edit(base, lambda t: t.update({"lm_head.weight": t[embeddings].clone()}))
        if stored == "head":
            edit(base, lambda t: t.pop(embeddings))
    original = AutoModelForCausalLM.from_pretrained(base, dtype="auto").lm_head.weight.detach()
    updates = llama.updates([Q]) | {"lm_head": head_update()}
    model = loaded(export(base, updates, tmp_path / "full"))
    assert model.config.tie_word_embeddings is False
    assert torch.equal(model.model.embed_tokens.weight, original)
    delta = updates["lm_head"].delta()
    assert torch.equal(model.lm_head.weight, (original.float() + delta).bfloat16())
    assert_same(model.get_submodule(Q), summed(base, llama.updates([Q])).get_submodule(Q))
    if stored == "embeddings":
        index = json.loads((tmp_path / "full" / "model.safetensors.index.json").read_text())
        where = index["weight_map"]
        assert where["lm_head.weight"] == where["model.embed_tokens.weight"]
        assert index["metadata"]["total_size"] == sum(
            t.nbytes for t in tensors(tmp_path / "full").values()
        )


def test_gpt2s_head_is_untied_though_its_config_says_nothing_of_ties(gpt2, tmp_path):
    base = save(gpt2.model, tmp_path / "base")
    file = base / "config.json"
    config = json.loads(file.read_text())
    config.pop("tie_word_embeddings", None)
    file.write_text(json.dumps(config))
    updates = {"lm_head": head_update()}
    model = loaded(export(base, updates, tmp_path / "full"))
    wte = gpt2.model.transformer.wte.weight
    assert torch.equal(model.transformer.wte.weight, wte)
    assert torch.equal(model.lm_head.weight, wte + updates["lm_head"].delta())


def test_a_head_that_no_config_unties_is_refused(llama, tied, tmp_path, monkeypatch):
    def always(self, all_submodels=False):
        return {"lm_head.weight": "model.embed_tokens.weight"}

    monkeypatch.setattr(LlamaForCausalLM, "get_expanded_tied_weights_keys", always)
    refused(tied, {"lm_head": head_update()}, tmp_path, InvalidInput, "stays tied")


def test_an_update_of_a_head_of_its_own_is_added_in_place(llama, tmp_path):
    base = save(llama.model, tmp_path / "base")
    updates = {"lm_head": head_update()}
    assert_same(loaded(export(base, updates, tmp_path / "full")), summed(base, updates))


# The other files


def test_all_a_user_needs_is_copied_and_no_other_weights(llama, tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    for name in ("LICENSE", "vocab.txt", "tokenizer.model", "generation_config.json"):
        (base / name).write_text(f'{{"_note": "{name}"}}')
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ x }}")
    for name in ("pytorch_model.bin", "model.gguf", "extra.safetensors", "tf_model.h5",
                 "pytorch_model.bin.index.json", ".gitattributes", "README.md",
                 "adapter_config.json"):  # fmt: skip
        (base / name).write_text("x")
    (base / "onnx").mkdir()
    (base / "adapter_config.json").unlink()
    export(base, {}, tmp_path / "full")
    got = {str(f.relative_to(tmp_path / "full")): f for f in (tmp_path / "full").rglob("*")}
    assert sorted(got) == sorted([
        "LICENSE", "additional_chat_templates", "additional_chat_templates/tools.jinja",
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.txt",
    ])  # fmt: skip
    for name, file in got.items():
        assert file.is_dir() or file.read_bytes() == (base / name).read_bytes()
    assert (got["model.safetensors"].stat().st_mode & 0o777) == (
        got["config.json"].stat().st_mode & 0o777
    )


# Interruptions


class Killed(BaseException):
    """Stands for a kill: no handler of ours may clean up after it."""


def interrupt(monkeypatch, after, error=Killed):
    """Let `after` files be finished and the next fail on its way."""
    finish = full_export._File._finish
    count = 0

    def counted(self):
        nonlocal count
        count += 1
        if count > after:
            raise error
        finish(self)

    monkeypatch.setattr(full_export._File, "_finish", counted)


@pytest.fixture(params=["new", "empty"])
def target(request, tmp_path):
    folder = tmp_path / "full"
    if request.param == "empty":
        folder.mkdir()
    return folder


def kept_folder(target):
    inside = target / ".lori-export"
    return (inside if inside.exists() else target.parent / ".lori-export-full") / "files"


def test_started_again_it_goes_on_behind_the_last_whole_file(llama, sharded, target, monkeypatch):
    updates = llama.updates()
    with monkeypatch.context() as patched:
        interrupt(patched, 3)
        with pytest.raises(Killed):
            export(sharded, updates, target)
    assert not (target / "config.json").exists()
    finished = stamps(kept_folder(target))
    assert len(finished) == 3
    export(sharded, updates, target)
    whole = stamps(target)
    assert {name: whole[name] for name in finished} == finished  # the same files, not written again
    assert_same(loaded(target), summed(sharded, updates))
    assert [f.name for f in target.parent.glob(".lori*")] == []
    assert [f.name for f in target.glob(".lori*")] == []
    with pytest.raises(Conflict, match="not empty"):
        export(sharded, updates, target)


def test_a_killed_process_leaves_files_that_the_next_one_goes_on_with(llama, sharded, tmp_path):
    """The real thing: SIGKILL in the middle of a file, a torn one and a stale lock left behind."""
    torch.save({n: (u.A, u.B) for n, u in llama.updates().items()}, tmp_path / "updates.pt")
    script = textwrap.dedent("""
        import os, signal, sys, time, torch
        from pathlib import Path
        from lori_manager.adapters import full_export
        finish = full_export._File._finish
        done = []
        def killed(self):
            if "00003" in self._name:
                while len(done) < 2:  # files are flushed beside one another
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(finish(self))
        full_export._File._finish = killed
        made = torch.load(sys.argv[1])
        updates = {n: full_export.LowRankUpdate(A, B) for n, (A, B) in made.items()}
        full_export.write_full(Path(sys.argv[2]), updates, Path(sys.argv[3]), fingerprint="f" * 64)
    """)
    arguments = [tmp_path / "updates.pt", sharded, tmp_path / "full"]
    result = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=False)
    assert result.returncode == -9
    assert not (tmp_path / "full").exists()
    record = json.loads((kept_folder(tmp_path / "full").parent / "record.json").read_text())
    there = stamps(kept_folder(tmp_path / "full"))
    finished = {name: there[name] for name in record["finished"]}
    assert len(finished) >= 2
    assert list(kept_folder(tmp_path / "full").glob("*.part"))
    export(sharded, llama.updates(), tmp_path / "full")
    whole = stamps(tmp_path / "full")
    assert {name: whole[name] for name in finished} == finished
    assert not list((tmp_path / "full").glob("*.part"))
    assert_same(loaded(tmp_path / "full"), summed(sharded, llama.updates()))


@pytest.mark.parametrize("damage", ["flip", "cut", "longer"])
def test_a_damaged_finished_file_is_made_again(llama, sharded, tmp_path, monkeypatch, damage):
    updates = llama.updates()
    with monkeypatch.context() as patched:
        interrupt(patched, 3)
        with pytest.raises(Killed):
            export(sharded, updates, tmp_path / "full")
    folder = kept_folder(tmp_path / "full")
    finished = stamps(folder)
    hurt = folder / sorted(finished)[1]
    content = bytearray(hurt.read_bytes())
    content[-5] ^= 1
    hurt.write_bytes({"flip": content, "cut": content[:-8], "longer": content + b"x"}[damage])
    export(sharded, updates, tmp_path / "full")
    whole = stamps(tmp_path / "full")
    assert [name for name in finished if whole[name] != finished[name]] == [hurt.name]
    assert_same(loaded(tmp_path / "full"), summed(sharded, updates))


@pytest.mark.parametrize("change", ["adapter", "base", "scaling", "config"])
def test_nothing_of_another_plan_is_taken_over(llama, sharded, tmp_path, monkeypatch, change):
    updates = llama.updates()
    with monkeypatch.context() as patched:
        interrupt(patched, 3)
        with pytest.raises(Killed):
            export(sharded, updates, tmp_path / "full")
    before = stamps(kept_folder(tmp_path / "full"))
    other = "f" * 64
    if change == "adapter":
        updates = llama.updates(seed=1)
    elif change == "scaling":
        updates[Q] = replace(updates[Q], scaling=3.0)
    elif change == "base":
        other = "e" * 64
    else:
        (sharded / "generation_config.json").write_text("{}")
    seen = []
    monkeypatch.setattr(full_export, "_is", lambda *_: seen.append(1) or True)
    export(sharded, updates, tmp_path / "full", fingerprint=other)
    assert seen == []
    assert before
    assert_same(loaded(tmp_path / "full"), summed(sharded, updates))


def test_a_publication_that_was_interrupted_is_done_again(llama, sharded, tmp_path, monkeypatch):
    target = tmp_path / "full"
    target.mkdir()
    updates = llama.updates()
    for stop in range(1, 12):
        with monkeypatch.context() as patched:
            move = Path.replace
            count = 0

            def torn(self, goal, stop=stop, move=move):
                nonlocal count
                if Path(goal).parent == target:
                    count += 1
                    if count == stop:
                        raise Killed
                return move(self, goal)

            patched.setattr(Path, "replace", torn)
            with pytest.raises(Killed):
                export(sharded, updates, target)
        assert not (target / "config.json").exists()
        if stop == 3:
            (target / "mine.txt").touch()
            with pytest.raises(Conflict, match="not empty"):
                export(sharded, updates, target)
            (target / "mine.txt").unlink()
    built = []
    monkeypatch.setattr(
        full_export._File, "__init__", lambda *_: built.append(1)
    )  # no file may be needed any more
    export(sharded, updates, target)
    assert built == []
    assert_same(loaded(target), summed(sharded, updates))
    assert not list(target.glob(".lori*"))


def test_a_full_disk_is_told_and_costs_nothing_that_was_finished(
    llama, sharded, target, monkeypatch
):
    updates = llama.updates()
    with monkeypatch.context() as patched:
        write = full_export._File._write
        room = 3 * 10_000

        class Full(full_export.FileIO):
            def write(self, block):
                nonlocal room
                if room < len(block):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                room -= len(block)
                return super().write(block)

        patched.setattr(full_export, "FileIO", Full)
        assert full_export._File._write is write
        with pytest.raises(StorageFailed, match=r"No space left.*run it again.*finished stays in"):
            export(sharded, updates, target)
    finished = stamps(kept_folder(target))
    assert finished
    assert not list(kept_folder(target).glob("*.part"))
    export(sharded, updates, target)
    whole = stamps(target)
    assert {name: whole[name] for name in finished} == finished
    assert_same(loaded(target), summed(sharded, updates))


def test_a_file_that_is_dropped_is_never_taken_for_finished(tmp_path, monkeypatch):
    """Its blocks are cancelled one by one, while the thread that writes goes on with the next."""
    going = threading.Event()

    class Waiting(full_export.FileIO):
        def write(self, block):
            going.wait()
            return super().write(block)

    def shutdown(thread, cancel_futures, whole=full_export.ThreadPoolExecutor.shutdown):
        file._waiting[1].cancel()
        going.set()
        whole(thread)  # the end is not cancelled in time

    monkeypatch.setattr(full_export, "FileIO", Waiting)
    monkeypatch.setattr(full_export.ThreadPoolExecutor, "shutdown", shutdown)
    kept = resuming.Kept(tmp_path, "plan")
    file = full_export._File(kept, "shard")
    file.put(b"one")
    file.put(b"two")
    file.end()
    file.drop()
    assert not kept.finished("shard")
    assert list(kept.folder.iterdir()) == []


def test_a_disk_that_is_full_at_once_leaves_nothing(llama, sharded, target, monkeypatch):
    interrupt(monkeypatch, 0, OSError(errno.ENOSPC, "No space left on device"))
    there = sorted(target.parent.rglob("*"))
    with pytest.raises(StorageFailed, match="No space left"):
        export(sharded, llama.updates(), target)
    assert sorted(target.parent.rglob("*")) == there


def test_a_torn_block_never_makes_a_finished_file(llama, sharded, tmp_path, monkeypatch):
    """The disk fails once and works again at the next block, as when somebody frees space."""
    failed = []

    class Once(full_export.FileIO):
        def write(self, block):
            if not failed and len(block) > 1000:
                failed.append(Path(self.name).stem)
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(block)

    monkeypatch.setattr(full_export, "FileIO", Once)
    recorded = []
    monkeypatch.setattr(resuming.Kept, "finish", lambda self, name: recorded.append(name))
    with pytest.raises(StorageFailed):
        export(sharded, llama.updates(), tmp_path / "full")
    assert len(failed) == 1
    assert failed[0] not in recorded


def test_foreign_folders_files_and_other_writers_are_conflicts(llama, sharded, tmp_path):
    updates = llama.updates([Q])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").touch()
    (tmp_path / "file").touch()
    for name, match in (("mine", "not empty"), ("file", "is a file")):
        with pytest.raises(Conflict, match=match):
            export(sharded, updates, tmp_path / name)
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["a.txt"]
    with resuming.resumed_directory(tmp_path / "full", "config.json", "plan") as kept:
        (kept.folder / "config.json").touch()
        with pytest.raises(Conflict, match="being written by another process"):
            export(sharded, updates, tmp_path / "full")
    assert [f.name for f in (tmp_path / "full").iterdir()] == ["config.json"]


def test_progress_counts_megabytes_up_to_all(llama, sharded, tmp_path, monkeypatch):
    monkeypatch.setattr(full_export, "_MB", 1000)
    told = []
    export(sharded, llama.updates(), tmp_path / "full", told=lambda *x: told.append(x))
    total = sum(t.nbytes for t in tensors(sharded).values()) // 1000
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_memory_stays_far_below_one_file(tmp_path):
    """A file of 400 MB, with an update of everything, through a few MB of memory."""
    script = textwrap.dedent("""
        import json, sys, torch
        from pathlib import Path
        from safetensors.torch import save_file
        from lori_manager import models
        from lori_manager.adapters.full_export import LowRankUpdate, write_full

        def peak():
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line[:6] == "VmHWM:")

        base, full = map(Path, sys.argv[1:])
        torch.set_num_threads(1)
        updates = {
            f"model.layers.{i}.mlp.{n}_proj": LowRankUpdate(torch.randn(8, b), torch.randn(a, 8))
            for i in range(4) for n, (a, b) in
            {"up": (8192, 2048), "gate": (8192, 2048), "down": (2048, 8192)}.items()
        }
        models.load_skeleton(base)
        torch.ones(512, 512) @ torch.ones(512, 512)
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = peak()
        write_full(base, updates, full, fingerprint="f")
        print(peak() - before, (full / "model.safetensors").stat().st_size)
    """)
    base = tmp_path / "base"
    LlamaConfig(
        vocab_size=64, hidden_size=2048, intermediate_size=8192, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=1,
    ).save_pretrained(base)  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(base))
    save_file(
        {k: torch.zeros(v.shape, dtype=torch.bfloat16) for k, v in model.state_dict().items()},
        base / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not tell a process's peak memory")
    out = subprocess.run(
        [sys.executable, "-c", script, str(base), str(tmp_path / "full")],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    grown, size = map(int, out.split())
    assert size > 400e6
    assert grown < 100e6


def test_the_base_is_read_as_transformers_picks_its_files(gpt2, tmp_path):
    """One whole file goes before an index, whatever the index says."""
    base = save(gpt2.model, tmp_path / "base")
    other = save(GPT2LMHeadModel(gpt2.model.config), tmp_path / "other", max_shard_size="10KB")
    for file in other.glob("model*"):
        shutil.copy(file, base)
    updates = gpt2.updates(["transformer.h.0.mlp.c_fc"])
    model = loaded(export(base, updates, tmp_path / "full"))
    assert_same(model, summed(base, updates, gpt2.transposed))
