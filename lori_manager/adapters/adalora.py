"""AdaLoRA: B E A with the ranks of all modules taken from one budget (arXiv:2303.10512), by PEFT.

Training begins with more rank than is wanted everywhere. Every few steps the triplets (a column
of B, its value in E, a row of A) are ranked over all modules by their smoothed sensitivity, and
the values of the least are set to zero, until the average rank is the one wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import AdaLoraConfig
from torch import nn

from lori_manager.adapters.kind import Training, no_start
from lori_manager.adapters.lora import kept
from lori_manager.adapters.peft_layers import NAME, injected
from lori_manager.adapters.rank_budget import RankBudget, Schedule, Triplets, orthogonality
from lori_manager.config import Config
from lori_manager.engine.weights import AdapterWeights, Block, Stored
from lori_manager.errors import InvalidInput
from lori_manager.models import BaseModel, check_rank, resolve_targets

_PARTS = ("lora_A", "lora_E", "lora_B")  # in the order of `Triplets`
_TINY = 1e-5  # PEFT's layers add it to the rank that they divide by


@contextmanager
def training(
    base: BaseModel, config: Config, *, steps: int, start: Stored | None = None
) -> Iterator[Training]:
    """See `KindModule`. `rank` is the average rank at the end; what is stored is B E A folded.

    Options:
        init_rank: of every module at the beginning; 0 is one and a half times `rank`.
        tinit, tfinal: shares of the steps before the first cut and after the last.
        deltaT: steps between cuts; 0 is a hundredth of all.
        beta1, beta2: how sensitivity and its uncertainty are smoothed.
        orthogonal: weight of the penalty that keeps A and B orthogonal.
    """
    no_start("adalora", start)
    names = resolve_targets(base.linear_shapes, config.targets)
    shapes = {name: base.linear_shapes[name] for name in names}
    peft_config = _peft_config(config, steps, min(min(shape) for shape in shapes.values()))
    check_rank(shapes, peft_config.init_r)
    with injected(base, peft_config, names, config.seed) as layers:
        parameters: dict[str, nn.Parameter] = {}
        modules: dict[str, Triplets] = {}
        for name, layer in layers.items():
            own = [getattr(layer, part)[NAME] for part in _PARTS]
            parameters |= {f"{name}.{part}.{NAME}": p for part, p in zip(_PARTS, own, strict=True)}
            modules[name] = Triplets(*own)
        budget = RankBudget(modules, _schedule(peft_config, len(modules)))
        weight = peft_config.orth_reg_weight
        yield Training(
            parameters,
            lambda dtype: _folded(layers, dtype),
            penalty=(lambda: weight * orthogonality(modules)) if weight else None,
            after_step=budget.after_step,
            state=budget.state,
            load_state=budget.load_state,
            graphs=base.base_bits == 16,
        )


def _peft_config(config: Config, steps: int, most: int) -> AdaLoraConfig:
    """The options in PEFT's words.

    Raises:
        InvalidInput: an option out of its range, or too few steps for three phases.
    """
    o = config.kind_options
    init = o["init_rank"] or min(math.ceil(1.5 * config.rank), most)
    if init <= config.rank:
        raise InvalidInput(
            f"option `init_rank` must be above `rank` {config.rank}, which is what is left of it, "
            f"got {init}: lower `rank`"
        )
    for key in ("tinit", "tfinal"):
        if not 0 <= o[key] < 1:
            raise InvalidInput(f"option `{key}` must be a share of the steps in [0, 1), got "
                               f"{o[key]}")  # fmt: skip
    for key in ("beta1", "beta2"):
        if not 0 < o[key] < 1:
            raise InvalidInput(f"option `{key}` must be above 0 and below 1, got {o[key]}")
    for key in ("orthogonal", "deltaT"):
        if o[key] < 0:
            raise InvalidInput(f"option `{key}` must be 0 or more, got {o[key]}")
    tinit, tfinal = round(o["tinit"] * steps), round(o["tfinal"] * steps)
    # A step that cuts learns nothing of its own gradients: one has to come before it.
    if steps - tfinal <= max(tinit, 1):
        raise InvalidInput(
            f"of {steps} steps, `tinit` {o['tinit']} and `tfinal` {o['tfinal']} leave none to cut "
            "ranks in: train longer, or lower these options"
        )
    return AdaLoraConfig(
        init_r=init,
        target_r=config.rank,
        # PEFT divides by the rank at the beginning: the factor is alpha / rank all the same.
        lora_alpha=config.scaling * init,  # type: ignore[arg-type]
        lora_dropout=0.0,
        total_step=steps,
        tinit=tinit,
        tfinal=tfinal,
        deltaT=o["deltaT"] or max(1, steps // 100),
        beta1=o["beta1"],
        beta2=o["beta2"],
        orth_reg_weight=o["orthogonal"],
    )


def _schedule(config: AdaLoraConfig, modules: int) -> Schedule:
    return Schedule(
        begin=config.init_r * modules,
        end=config.target_r * modules,
        tinit=config.tinit,
        last=int(config.total_step or 0) - config.tfinal,
        every=config.deltaT,
        beta1=config.beta1,
        beta2=config.beta2,
    )


def _folded(layers: Mapping[str, Any], dtype: torch.dtype) -> AdapterWeights:
    """B E A of the triplets that are left; modules that have none are left out."""
    A, B, scalings = {}, {}, set()
    for name, layer in layers.items():
        E = layer.lora_E[NAME].detach().flatten()
        left = E != 0
        scalings.add(layer.scaling[NAME] / (float(layer.ranknum[NAME]) + _TINY))
        if bool(left.any()):
            A[name] = layer.lora_A[NAME][left]
            B[name] = layer.lora_B[NAME][:, left] * E[left]
    if not A:
        raise InvalidInput("the training moved nothing: raise the learning rate or the steps")
    return AdapterWeights((Block(kept(B, dtype), scalings.pop(), tensors=kept(A, dtype)),))
