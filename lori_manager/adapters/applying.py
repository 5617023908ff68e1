"""A stored adapter of any kind, acting in the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lori_manager.adapters.kind import module_of
from lori_manager.engine.layers import attached, low_rank_layers
from lori_manager.engine.weights import KindWeights, Stored
from lori_manager.models import BaseModel


@contextmanager
def applied(base: BaseModel, weights: Stored | None) -> Iterator[None]:
    """Let an adapter act; None is the base alone.

    Raises:
        InvalidInput: the adapter is routed, or its kind is unknown here.
    """
    if isinstance(weights, KindWeights):
        with module_of(weights.kind).applied(base, weights):
            yield
        return
    layers = {} if weights is None else low_rank_layers(base.model, weights.updates())
    with attached(base.model, layers):
        yield
