"""All trained entries of all B's as one parameter: one optimizer tensor, few kernels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lori_manager.engine.siblings import Group, Member


class TrainedValues:
    """The values of layers in one 1-D parameter, and the B's made from it.

    All B's are made at once at the first use after the values changed. On a GPU the
    B's of a group are one block-diagonal matrix: fewer and wider products, whose
    zeros cost less than their launches.

    Attributes:
        parameter: float32 (number of trained entries,), group by group.
    """

    def __init__(self, layers: Sequence[Member]) -> None:
        """Take over the layers' values; their own become views of the parameter.

        Raises:
            ValueError: no layers, or layers that belong to other values already.
        """
        if not layers or any(layer.trained is not None for layer in layers):
            raise ValueError("expected at least one layer, and none that was taken over already")
        groups: list[Group] = []
        for layer in layers:
            if layer.group not in groups:
                groups.append(layer.group)
        ordered = [layer for group in groups for layer in group.layers]
        if {id(layer) for layer in ordered} != {id(layer) for layer in layers}:
            raise ValueError("a group of layers must be given whole")
        self.parameter = nn.Parameter(torch.cat([layer.values.detach() for layer in ordered]))
        device = self.parameter.device
        self._shapes: list[tuple[int, int]] = []
        self._where: dict[int, slice] = {}
        places, rests, scalings, begin = [], [], [], 0
        for group in groups:
            blocks = [group.layers] if device.type == "cuda" else [[m] for m in group.layers]
            self._where[id(group)] = slice(len(self._shapes), len(self._shapes) + len(blocks))
            for block in blocks:
                shape = (sum(m.shape[0] for m in block), sum(m.shape[1] for m in block))
                rest = torch.zeros(shape, device=device)
                row = column = 0
                for layer in block:
                    out, rank = layer.shape
                    at = layer.positions
                    if at is None:
                        at = torch.arange(out * rank, device=device)
                    places.append(begin + (row + at // rank) * shape[1] + column + at % rank)
                    scalings.append(torch.full(at.shape, layer.scaling, device=device))
                    if layer.rest is not None:
                        part = layer.rest.view(out, rank) * layer.scaling
                        rest[row : row + out, column : column + rank] = part
                    row, column = row + out, column + rank
                rests.append(rest.flatten())
                self._shapes.append(shape)
                begin += rest.numel()
        same = all(a.scaling == b.scaling for a, b in pairwise(ordered))
        self._scaling: float | Tensor = ordered[0].scaling if same else torch.cat(scalings)
        self._size = begin
        whole = begin == self.parameter.numel()  # every place is trained, in its order
        self._places = None if whole else torch.cat(places)
        rest = torch.cat(rests)
        self._rest = rest if bool(rest.any()) else None
        self._made: tuple[object, list[Tensor]] | None = None
        parts = torch.split(self.parameter.detach(), [layer.values.numel() for layer in ordered])
        for layer, part in zip(ordered, parts, strict=True):
            del layer.values
            layer.values = part
            layer.trained = self

    def factors(self, group: Group, dtype: torch.dtype) -> list[Tensor]:
        """The group's scaled B's, (out_features, rank) each, or one block-diagonal matrix."""
        return self.make(dtype)[self._where[id(group)]]

    def make(self, dtype: torch.dtype) -> list[Tensor]:
        """All B's, made anew if anything changed.

        To be called before a forward with gradient checkpointing: what is made inside a
        checkpoint would not be made again when that is repeated.
        """
        # What a graph's capture makes holds numbers only when the graph is replayed.
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        key = (self.parameter._version, torch.is_grad_enabled(), dtype, capturing)
        if self._made is None or self._made[0] != key:
            self._made = (key, self._make(dtype))
        return self._made[1]

    def forget(self) -> None:
        """Make the B's anew at the next use: after a backward their graph is gone."""
        self._made = None

    def _make(self, dtype: torch.dtype) -> list[Tensor]:
        canvas = (self.parameter * self._scaling).to(dtype)
        if self._places is not None:
            empty = canvas.new_zeros(self._size) if self._rest is None else self._rest.to(dtype)
            canvas = empty.index_copy(0, self._places, canvas)
        if canvas.requires_grad:
            canvas.register_hook(lambda _: self.forget())  # type: ignore[no-untyped-call]
        parts = torch.split(canvas, [rows * rank for rows, rank in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
