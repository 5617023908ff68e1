"""The whole road on SmolLM2-135M-Instruct, with few rows and few steps."""

import math
from itertools import islice
from pathlib import Path

import pytest
import torch

from lori_manager.workspace import Workspace

pytestmark = pytest.mark.real

EXAMPLES = Path(__file__).parents[2] / "examples"
TASKS = ("clinc_domain", "snips", "sentiment_uci")
ROWS = {"train": 160, "eval": 24}
SETTINGS = """
[defaults]
steps = 6
calibration_steps = 2
batch = 4
seed = 7
"""


@pytest.fixture(scope="module")
def road(base_folder, tmp_path_factory):
    """init, add-task, a sequence of two stages, one single adapter, a merge."""
    folder = tmp_path_factory.mktemp("road") / "ws"
    ws = Workspace.create(folder, base_folder)
    (folder / "lori.toml").write_text(SETTINGS)
    for task in TASKS:
        for split, count in ROWS.items():
            target = folder / "tasks" / task / f"{split}.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
            with (EXAMPLES / "data" / task / f"{split}.jsonl").open(encoding="utf-8") as rows:
                target.write_text("".join(islice(rows, count)), encoding="utf-8")
        ws.add_task(task, probe_rows=6)
    ws.train(["clinc_domain", "snips"], sequence="support")
    ws.train(["sentiment_uci"])
    ws.merge(["support@2"], names=["sentiment_uci"])
    yield ws
    ws.close()


@pytest.fixture(scope="module")
def ids(road):
    """Four training prompts, cut to one length."""
    _, rows = road.rows(road.store.task("snips"), "train")
    length = min(len(row.ids) for row in rows[:4])
    return torch.tensor([[int(i) for i in row.ids[:length]] for row in rows[:4]])


def ours(ws, ref, ids):
    """Logits of the base with an adapter as it is stored."""
    from lori_manager.engine.layers import attached, low_rank_layers

    base = ws.base_model(ws.settings.config)
    layers = low_rank_layers(base.model, ws.weights(ws.adapter(ref)).updates())
    with attached(base.model, layers), torch.inference_mode():
        return base.model(input_ids=ids.to(base.device)).logits.float().cpu()


def test_every_training_lowers_its_loss(road):
    for adapter in road.store.adapters():
        if adapter.origin == "trained":
            assert adapter.facts["last_loss"] < adapter.facts["first_loss"], adapter.ref
            assert adapter.facts["steps"] == 6


def test_the_audit_has_every_stage_and_every_task(road):
    audit = road.audit()
    (sequence,) = audit.sequences
    assert sequence.stages == ("support@1", "support@2")
    assert sequence.tasks[:2] == ("clinc_domain#1", "snips#1")
    assert all(math.isfinite(v) for row in (*sequence.R, sequence.base) for v in row[:2])
    assert {t.task for t in audit.tasks} == set(TASKS)
    merged = [e for t in audit.tasks for e in t.entries if e.subject == "main@1"]
    assert len(merged) == 3
    assert all(e.rows == ROWS["eval"] for e in merged)
    assert list(road.verify()) == []


def test_masks_keep_a_tenth_exactly_and_the_second_stage_leaves_the_rest(road):
    first, second = (road.weights(a).blocks[0] for a in road.store.adapters("support"))
    mask = road.store.mask("snips", 1)
    assert mask.kept == round(0.1 * mask.total)
    kept = road.mask_tensors(mask)
    for name, B in first.B.items():
        before, after = (b.view(torch.int16)[~kept[name]] for b in (B, second.B[name]))
        assert torch.equal(before, after)


def test_a_is_made_again_from_its_seed_and_the_file_is_lossless(road):
    from lori_manager.engine.codec import decode_adapter, encode_adapter

    adapter = road.adapter("support@2")
    content = road.store.adapter_bytes(adapter)
    weights, meta = decode_adapter(content)
    (block,) = weights.blocks
    assert block.tensors is None
    assert (block.projection.seed, block.projection.line) == (7, "support")
    assert block.projection_digest == adapter.projection == road.adapter("support@1").projection
    assert encode_adapter(weights, meta) == content


def test_peft_loads_the_export_and_gives_our_logits(road, base_folder, ids, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if road.base_model(road.settings.config).precision != "fp32":
        pytest.skip("the bound is for float32, and scores here are made in bf16")
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    model = None
    for ref in ("sentiment_uci@1", "main@1"):
        road.export(ref, tmp_path / ref.partition("@")[0])
        folder = str(tmp_path / ref.partition("@")[0])
        if model is None:
            model = PeftModel.from_pretrained(base, folder, adapter_name=ref)
        else:
            model.load_adapter(folder, adapter_name=ref)
        model.set_adapter(ref)
        with torch.inference_mode():
            theirs = model(input_ids=ids).logits
            with model.disable_adapter():
                plain = model(input_ids=ids).logits
        difference = float((theirs - ours(road, ref, ids)).abs().max() / theirs.abs().max())
        assert difference <= 1e-5
        assert float((theirs - plain).abs().max() / theirs.abs().max()) > 1e-2


def test_a_stored_adapter_is_a_thirteenth_of_pefts_file_of_that_rank(road, base_folder, tmp_path):
    """Rank 32, sparsity .9, bf16 values: the whole file."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
    lora = LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    theirs = (tmp_path / "adapter_model.safetensors").stat().st_size
    adapter = road.adapter("sentiment_uci@1")
    assert adapter.rank == 32
    assert adapter.bytes <= theirs / 13
