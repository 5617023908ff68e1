"""Fused GPU kernels for a model's norms, rotary positions and gating, where they are installed."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from lori_manager.engine import kernels as own
from lori_manager.errors import first_line
from lori_manager.models import BaseModel

if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

logger = logging.getLogger(__name__)

_PLAIN = "_lori_plain"  # where a function that chooses keeps the one that it began as


def accelerate(base: BaseModel, kernels: str = "auto") -> bool:
    """Let a model on a GPU run liger-kernel's norm, rotary and SwiGLU kernels.

    The loss is not replaced: it is computed at completion positions alone, see
    `engine/head.py`. A model that was changed stays so.

    Args:
        base: changed in place, once.
        kernels: "auto" or "off", which also switches off this package's own kernels.
    Returns:
        Whether the model runs liger's kernels; why not is told in one line of log.
    """
    own.enable(kernels == "auto")
    model: Any = base.model
    if kernels != "auto" or base.device.type != "cuda":
        return False
    if not hasattr(model, "_lori_fused"):
        model._lori_fused = _apply(model)
    return bool(model._lori_fused)


def _apply(model: Any) -> bool:
    kind = model.config.get_text_config().model_type
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError as e:
        logger.info("no fused kernels (%s): `pip install 'lori-manager[cuda]'` brings them", e)
        return False
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        logger.info("no fused kernels: liger-kernel has none for %s", kind)
        return False
    liger = logging.getLogger(monkey_patch.__name__)
    level = liger.level
    liger.setLevel(logging.WARNING)  # it lists its settings
    try:
        with _of_this_model_alone(sys.modules[type(model).__module__]):
            monkey_patch._apply_liger_kernel_to_instance(
                model=model, cross_entropy=False, fused_linear_cross_entropy=False
            )
    except (TypeError, AttributeError, ValueError, RuntimeError) as e:
        logger.info("no fused kernels: %s", first_line(e))
        return False
    finally:
        liger.setLevel(level)
    return True


@contextmanager
def _of_this_model_alone(module: ModuleType) -> Iterator[None]:
    """What liger puts into a module of transformers acts on no other model of the process.

    Its classes are taken out again, the model has them in place. Its functions stay, for GPUs.
    """
    before = dict(vars(module))
    try:
        yield
    finally:
        for name, fused in list(vars(module).items()):
            plain = before.get(name)
            if plain is None or fused is plain:
                continue
            if isinstance(plain, type):
                setattr(module, name, plain)
            elif callable(plain):
                setattr(module, name, _on_gpus(fused, getattr(plain, _PLAIN, plain)))


def _on_gpus(fused: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """The fused function where kernels are on and what it is given on a GPU, else the plain one."""

    @functools.wraps(plain)
    def either(*args: Any, **named: Any) -> Any:
        given = next((a for a in (*args, *named.values()) if isinstance(a, Tensor)), None)
        chosen = fused if given is not None and own.enabled() and given.is_cuda else plain
        return chosen(*args, **named)

    setattr(either, _PLAIN, plain)
    return either
