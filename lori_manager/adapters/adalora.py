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
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

from lori_manager.adapters.kind import Training, no_start
from lori_manager.adapters.lora import kept
from lori_manager.adapters.peft_layers import NAME, injected
from lori_manager.config import Config
from lori_manager.engine.weights import AdapterWeights, Block, Stored
from lori_manager.errors import InvalidInput
from lori_manager.models import BaseModel, check_rank, resolve_targets

_PARTS = ("lora_A", "lora_E", "lora_B")
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
        parameters = {
            f"{name}.{part}.{NAME}": getattr(layer, part)[NAME]
            for name, layer in layers.items()
            for part in _PARTS
        }
        budget = _Budget(parameters, peft_config)

        def penalty() -> Tensor:
            terms = []
            for name, p in parameters.items():
                if ".lora_E." not in name:
                    product = p @ p.T if ".lora_A." in name else p.T @ p
                    eye = torch.eye(len(product), dtype=p.dtype, device=p.device)
                    terms.append(torch.linalg.norm(product - eye))
            return peft_config.orth_reg_weight * torch.stack(terms).mean()

        yield Training(
            parameters,
            lambda dtype: _folded(layers, dtype),
            penalty=penalty if peft_config.orth_reg_weight else None,
            after_step=budget.after_step,
            state=budget.state,
            load_state=budget.load_state,
            graphs=False,
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


class _Budget:
    """PEFT's allocator over our parameters, with a state that can be kept.

    As `AdaLoraModel.update_and_allocate`, which is called after the optimizer's step with the
    gradients in place.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: AdaLoraConfig) -> None:
        self._parameters = parameters
        self._last = int(config.total_step or 0) - config.tfinal
        self._allocator: Any = RankAllocator(self, config, NAME)  # type: ignore[no-untyped-call]
        self._pattern: dict[str, list[bool]] = {}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the allocator asks a model for."""
        yield from self._parameters.items()

    def after_step(self, step: int) -> None:
        """Learn from the gradients, and cut where it is time."""
        if step > self._last:
            self._allocator.mask_using_rank_pattern(self, self._pattern)
            return
        last = step == self._last
        _, pattern = self._allocator.update_and_allocate(self, step, force_mask=last)
        self._pattern = pattern or self._pattern
        if last:
            self._allocator.reset_ipt()

    def state(self) -> dict[str, Tensor]:
        """Smoothed sensitivities, their uncertainties, and which triplets are left."""
        held = {f"pattern|{n}": torch.tensor(left) for n, left in self._pattern.items()}
        for key in ("exp_avg_ipt", "exp_avg_unc"):
            held |= {f"{key}|{n}": t for n, t in getattr(self._allocator, key).items()}
        return held

    def load_state(self, held: Mapping[str, Tensor]) -> None:
        """What `state` gave."""
        for key, value in held.items():
            what, _, name = key.partition("|")
            if what == "pattern":
                self._pattern[name] = value.tolist()
            else:
                like = self._parameters[name]
                getattr(self._allocator, what)[name] = value.to(like.device)
                self._allocator.ipt[name] = torch.zeros_like(like)


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
