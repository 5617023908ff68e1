"""Tiny random models, and updates applied to them by hand."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lori_manager.engine.update import LowRankUpdate

BASE = "org/Tiny-Base"
FINGERPRINT = "f" * 64


class Bed:
    """A base model and what the tests ask of it."""

    base_name = BASE
    fingerprint = FINGERPRINT

    def __init__(self, model):
        self.model = model.eval()
        linear = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D)
        }
        self.transposed = {name for name, module in linear.items() if isinstance(module, Conv1D)}
        self.shapes = {
            name: tuple(module.weight.T.shape if name in self.transposed else module.weight.shape)
            for name, module in linear.items()
        }
        self.layers = [name for name in self.shapes if name != "lm_head"]
        self.all_modules = [name for name, _ in model.named_modules()]

    def copy(self):
        return copy.deepcopy(self.model)

    def updates(self, modules=None, *, ranks=(4,), scalings=(1.0,), dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for i, name in enumerate(modules or self.layers):
            out_features, in_features = self.shapes[name]
            rank = ranks[i % len(ranks)]
            made[name] = LowRankUpdate(
                torch.randn(rank, in_features, generator=generator).to(dtype),
                torch.randn(out_features, rank, generator=generator).mul(0.1).to(dtype),
                scalings[i % len(scalings)],
            )
        return made

    def merged(self, updates, dtype=torch.float32):
        """A copy of the base in `dtype` with every delta added to its weight."""
        model = self.copy().to(dtype)
        with torch.no_grad():
            for name, update in updates.items():
                delta = update.scaling * (update.B.to(dtype) @ update.A.to(dtype))
                weight = model.get_submodule(name).weight
                weight += delta.T if name in self.transposed else delta
        return model

    def export_arguments(self, **changes):
        return {
            "base_name": BASE,
            "revision": None,
            "fingerprint": FINGERPRINT,
            "all_modules": self.all_modules,
            "transposed": self.transposed,
        } | changes

    def import_arguments(self, **changes):
        return {"shapes": self.shapes, "base_names": [BASE], "fingerprint": FINGERPRINT} | changes


def _logits(model):
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12) % 61).logits.double()


def _difference(model, reference):
    """Largest difference of the logits over the reference's largest logit."""
    expected = _logits(reference)
    return float((_logits(model) - expected).abs().max() / expected.abs().max())


def _edit_config(directory, /, **fields):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _read_tensors(directory):
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def _edit_tensors(directory, change, metadata=None):
    tensors, _ = _read_tensors(directory)
    change(tensors)
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        directory / "adapter_model.safetensors",
        metadata=metadata,
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several threads on matrices this small only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tools():
    return SimpleNamespace(
        difference=_difference,
        edit_config=_edit_config,
        edit_tensors=_edit_tensors,
        read_tensors=_read_tensors,
    )


@pytest.fixture(scope="session")
def llama():
    torch.manual_seed(0)
    return Bed(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=61,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
    )


@pytest.fixture(scope="session")
def gpt2():
    torch.manual_seed(0)
    return Bed(
        GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32))
    )
