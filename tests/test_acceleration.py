"""Fused kernels: switched, told in one line where there are none, and with the same logits."""

import copy
import logging
import sys
import types

import architectures
import pytest
import torch
from transformers.models.llama import modeling_llama

from lori_manager.acceleration import accelerate
from lori_manager.engine import kernels
from lori_manager.forward import Forward, place
from lori_manager.models import BaseModel
from lori_manager.tasks.encoding import Encoded

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def kernels_as_before():
    yield
    kernels.enable(True)


class OnGpu(BaseModel):
    """Says that it is on a GPU; nothing is run."""

    device = torch.device("cuda")


def test_a_model_on_the_cpu_is_left_alone(tmp_path):
    base = BaseModel(architectures.llama(), tmp_path, "fp32")
    assert accelerate(base) is False
    assert not hasattr(base.model, "_lori_fused")


def test_the_switch_turns_our_own_kernels_off_too(tmp_path):
    base = OnGpu(architectures.llama(), tmp_path, "bf16")
    assert accelerate(base, "off") is False
    assert not kernels._enabled
    assert not hasattr(base.model, "_lori_fused")


def test_without_liger_one_line_says_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    base = OnGpu(architectures.llama(), tmp_path, "bf16")
    with caplog.at_level(logging.INFO, "lori_manager"):
        assert accelerate(base) is False
        assert accelerate(base) is False
    (record,) = caplog.records
    assert "pip install 'lori-manager[cuda]'" in record.message
    assert kernels._enabled


def test_what_is_fused_for_one_model_leaves_the_others_of_the_process_alone(tmp_path, monkeypatch):
    """liger-kernel replaces names in transformers' modules, which all models of a kind share."""
    plain = BaseModel(architectures.llama(), tmp_path, "fp32")
    own, rotary = vars(modeling_llama)["LlamaRMSNorm"], modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotary)  # is there again after
    expected = plain.model(torch.arange(6)[None]).logits

    def fused(*_, **__):
        raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")

    def patch(model, **_):
        modeling_llama.LlamaRMSNorm = type("Fused", (torch.nn.Module,), {"forward": fused})
        modeling_llama.apply_rotary_pos_emb = fused

    liger = types.ModuleType("liger_kernel.transformers")
    liger.monkey_patch = types.SimpleNamespace(
        __name__="liger", MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": patch},
        _apply_liger_kernel_to_instance=patch,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    for _ in range(2):
        assert accelerate(OnGpu(architectures.llama(), tmp_path, "bf16"))
    assert torch.equal(plain.model(torch.arange(6)[None]).logits, expected)
    assert modeling_llama.LlamaRMSNorm is own
    assert modeling_llama.apply_rotary_pos_emb._lori_plain is rotary
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with pytest.raises(ValueError, match="Triton"):
        modeling_llama.apply_rotary_pos_emb(torch.ones(1), torch.ones(1), None, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make", architectures.PACKS)
def test_logits_with_fused_kernels_are_those_without(tmp_path, make):
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False).to("cuda", torch.bfloat16)
    rows = [Encoded(torch.randint(0, 61, (n,)).tolist(), 1) for n in (9, 5, 30)]
    found = []
    for base in (BaseModel(copy.deepcopy(model), tmp_path, "bf16") for _ in range(2)):
        if found:
            pytest.importorskip("liger_kernel")
            accelerate(base)
        forward = Forward(base)
        with torch.no_grad(), forward.ready():
            found.append(forward.scores(place(forward.batch(rows), base.device))[1])
    assert (found[0] - found[1]).abs().mean() < 0.02 * found[0].mean()
