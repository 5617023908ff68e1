"""QLoRA: LoRA over a base packed to 4-bit NormalFloat (arXiv:2305.14314), trained as `lora` is."""

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
    """See `KindModule`. That the base is packed is said by the kind's row, see `kinds.KINDS`."""
    with low_rank_training(base, config, start) as found:
        yield found
