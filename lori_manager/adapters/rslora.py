"""rsLoRA: LoRA with the factor alpha / sqrt(r) (arXiv:2312.03732), trained as `lora` is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lori_manager.adapters.kind import Training
from lori_manager.adapters.lora import low_rank_training
from lori_manager.config import Config
from lori_manager.engine.weights import Stored
from lori_manager.models import BaseModel


@contextmanager
def training(
    base: BaseModel, config: Config, *, steps: int, start: Stored | None = None
) -> Iterator[Training]:
    """See `KindModule`."""
    with low_rank_training(base, config, start, use_rslora=True) as found:
        yield found
