"""Rows with labels through an encoder: in batches, to logits, to a loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lori_manager.forward import Forward
from lori_manager.models import BaseModel, ImageFormat, image_format
from lori_manager.tasks.batches import Sizes
from lori_manager.tasks.images import load_image
from lori_manager.tasks.labelled import Labelled, LabelledImage, LabelledText

ROOM = 2**30  # bytes of decoded images that are kept


class Runner(Protocol):
    """Rows -> batches -> loss: `Forward` of words, `Labelling` of labels."""

    base: BaseModel
    packed: bool

    def ready(self) -> AbstractContextManager[None]:
        """To be used around a series of calls."""

    def batch(self, rows: Any, sizes: Sizes | None = None) -> Any:
        """The rows in the form that this runs, with the `counts` that their loss is divided by."""

    def place(self, batch: Any) -> Any:
        """The batch where the model is."""

    def real(self, batch: Any, rows: Any) -> Tensor | None:
        """Which of the flattened places of a batch are the rows' own, bool; None where all are."""

    def run(self, batch: Any) -> None:
        """The model without its head, for what hooks see in it."""

    def loss(self, batch: Any) -> Tensor:
        """The sum over what `counts` counts, a scalar in nats, with gradient."""


def runner(base: BaseModel) -> Runner:
    """What runs rows through this base."""
    return Labelling(base) if base.architecture.encoder else Forward(base)


@dataclass(frozen=True)
class LabelBatch:
    """Rows as an encoder takes them.

    Attributes:
        inputs: the model's arguments by name; text padded at the end, with the mask that says so,
            images in uint8 until they are placed.
        labels: int64 (rows,), the place of each row's label.
    """

    inputs: dict[str, Tensor]
    labels: Tensor

    @property
    def counts(self) -> np.ndarray:
        """Each row counts once."""
        return np.ones(len(self.labels), np.int64)


class Labelling:
    """Runs rows with labels through an encoder as it now is, adapter layers and head included."""

    packed = False

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self._pixels: dict[str, Tensor] = {}

    @cached_property
    def _format(self) -> ImageFormat:
        return image_format(self.base.folder)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Nothing is to be made ready."""
        yield

    def batch(self, rows: Sequence[Labelled], sizes: Sizes | None = None) -> LabelBatch:
        """The rows below one another."""
        labels = torch.tensor([row.label for row in rows])
        images = [row for row in rows if isinstance(row, LabelledImage)]
        if images:
            return LabelBatch({"pixel_values": torch.stack(list(map(self._read, images)))}, labels)
        return LabelBatch(self._words([r for r in rows if isinstance(r, LabelledText)]), labels)

    def _read(self, row: LabelledImage) -> Tensor:
        """(3, size, size) uint8; kept, as far as `ROOM` goes, since every pass reads it again."""
        if row.digest in self._pixels:
            return self._pixels[row.digest]
        pixels = torch.from_numpy(load_image(row.read(), self._format.size).copy()).permute(2, 0, 1)
        if (len(self._pixels) + 1) * pixels.numel() <= ROOM:
            self._pixels[row.digest] = pixels
        return pixels

    def _words(self, rows: Sequence[LabelledText]) -> dict[str, Tensor]:
        shape = len(rows), max(row.length for row in rows)
        ids = np.full(shape, int(self.base.model.config.pad_token_id or 0), np.int64)
        mask, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for i, row in enumerate(rows):
            ids[i, : row.length] = row.ids
            mask[i, : row.length] = 1
            if row.segments is not None:
                segments[i, : row.length] = row.segments
        found = {"input_ids": ids, "attention_mask": mask}
        if any(row.segments is not None for row in rows):
            found["token_type_ids"] = segments
        return {name: torch.from_numpy(values) for name, values in found.items()}

    def place(self, batch: LabelBatch) -> LabelBatch:
        """The batch's tensors where the model is, images as it was trained to see them."""
        device = self.base.device

        def placed(tensor: Tensor) -> Tensor:
            pinned = tensor.pin_memory() if device.type == "cuda" else tensor
            there = pinned.to(device, non_blocking=True)
            return self._normal(there) if there.dtype == torch.uint8 else there

        return LabelBatch({n: placed(t) for n, t in batch.inputs.items()}, placed(batch.labels))

    def _normal(self, pixels: Tensor) -> Tensor:
        """(x / 255 - mean) / std of each colour, in the model's dtype."""
        mean, std = (
            torch.tensor(values, device=pixels.device)[:, None, None]
            for values in (self._format.mean, self._format.std)
        )
        normal: Tensor = (pixels.float() / 255 - mean) / std
        return normal.to(self.base.model.dtype)

    def real(self, batch: LabelBatch, rows: Sequence[Labelled]) -> Tensor | None:
        """Which of the flattened places are the rows' own, bool; None of images: all."""
        if "attention_mask" not in batch.inputs:
            return None
        return batch.inputs["attention_mask"].bool().flatten().to(self.base.device)

    def run(self, batch: LabelBatch) -> None:
        """The encoder alone, for what hooks see in it."""
        self.base.decoder(**batch.inputs)

    def logits(self, batch: LabelBatch) -> Tensor:
        """(rows, labels) float32."""
        out: Tensor = self.base.model(**batch.inputs).logits
        return out.float()

    def loss(self, batch: LabelBatch) -> Tensor:
        """Sum of the cross-entropy over rows, a scalar in nats, with gradient."""
        return nn.functional.cross_entropy(self.logits(batch), batch.labels, reduction="sum")
