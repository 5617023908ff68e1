"""Heads: what stands between an encoder's last layer and a task's labels, trained whole."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lori_manager import base_files
from lori_manager.adapters.kind import Training
from lori_manager.engine.layers import attached
from lori_manager.engine.weights import Head
from lori_manager.errors import DamagedObject
from lori_manager.models import BaseModel, bare_model, head_names


class InFloat32(nn.Module):
    """A float32 module behind an encoder of any precision."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Whatever the module makes of x, float32."""
        y: Tensor = self.module(x.float())
        return y


@dataclass(frozen=True)
class HeadTraining:
    """A head in the model, as training sees it.

    Attributes:
        labels: see `Head`.
        parameters: full name in the model -> float32 parameter.
    """

    labels: tuple[str, ...]
    parameters: Mapping[str, nn.Parameter]

    def head(self, dtype: torch.dtype) -> Head:
        """As it is now, its values in that dtype."""
        values = {n: p.detach().to("cpu", dtype).contiguous() for n, p in self.parameters.items()}
        return Head(self.labels, values)


def with_head(training: Training, head: HeadTraining | None, rate: float) -> Training:
    """What trains, the head with it at a peak learning rate of its own; None adds nothing."""
    if head is None:
        return training
    return replace(
        training,
        parameters={**training.parameters, **head.parameters},
        rates={**training.rates, **dict.fromkeys(head.parameters, rate)},
    )


def fresh_head(base: BaseModel, labels: Sequence[str], seed: int) -> Head:
    """The head that a training begins with, float32.

    Parameters that the base's folder holds in the shape wanted begin with these (a pooler, the
    inner layer of a masked language model's head). The others are drawn: matrices from a normal
    distribution of the model's `initializer_range`, biases 0, norms 1.

    Args:
        base: not modified.
        labels: at least two.
        seed: of what is drawn; each parameter's also depends on its name.
    """
    std = float(getattr(base.model.config, "initializer_range", 0.02))
    found = dict(base.model.named_parameters())
    values = {}
    for name, like in _parameters(_modules(base, len(labels))).items():
        own = found.get(name)
        if own is not None and name not in base.drawn and own.shape == like.shape:
            values[name] = own.detach().float().cpu().clone()
        elif like.ndim > 1:
            digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
            g = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            values[name] = torch.normal(0.0, std, tuple(like.shape), generator=g)
        else:
            values[name] = torch.full(tuple(like.shape), float(name.endswith("weight")))
    return Head(tuple(labels), values)


@contextmanager
def head_attached(base: BaseModel, head: Head) -> Iterator[HeadTraining]:
    """Put a task's head behind the encoder, float32, and take it out after.

    Raises:
        DamagedObject: the head is no such base's.
    """
    modules = _modules(base, len(head.labels))
    shapes = {name: tuple(like.shape) for name, like in _parameters(modules).items()}
    if shapes != {name: tuple(t.shape) for name, t in head.tensors.items()}:
        raise DamagedObject(f"a head of {len(head.tensors)} tensors is not one of this base")
    for name, module in modules.items():
        begin = len(name) + 1
        own = {
            full[begin:]: t.to(base.device, torch.float32, copy=True)
            for full, t in head.tensors.items()
            if full.startswith(f"{name}.")
        }
        module.load_state_dict(own, assign=True)
        module.requires_grad_(True)
    with attached(base.model, {name: InFloat32(module) for name, module in modules.items()}):
        yield HeadTraining(head.labels, _parameters(modules))


def _modules(base: BaseModel, labels: int) -> dict[str, nn.Module]:
    """The head's modules for that many labels, without values."""
    config = copy.deepcopy(base.model.config)
    config.num_labels = labels
    config.quantization_config = None
    run_code = base_files.may_run_code(base.folder, base.code)
    model = bare_model(config, run_code=run_code)
    return {name: model.get_submodule(name).eval() for name in head_names(model)}


def _parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {f"{name}.{own}": p for name, m in modules.items() for own, p in m.named_parameters()}
