"""The singular values and vectors of a base's weights, computed once and kept.

A file a weight, under $LORI_CACHE or ~/.cache/lori, named after the digest of the weight's own
bytes and of all else that decides the result. So every workspace on a base shares them, and
another base, revision or precision never gets them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from lori_manager.engine.layers import linear_weight
from lori_manager.engine.svd import Spectrum, choose_method, top_svd
from lori_manager.errors import InvalidInput, StorageFailed
from lori_manager.models import BaseModel
from lori_manager.ranks import ranks
from lori_manager.store.files import write_atomic

logger = logging.getLogger(__name__)

_DIGEST = 32  # bytes of SHA-256 behind a file's content

Told = Callable[[int, int], None]
_begin: ContextVar[Callable[[], Told] | None] = ContextVar("_begin", default=None)


@contextmanager
def progress_told(begin: Callable[[], Told]) -> Iterator[None]:
    """Tell how far singular values are, whatever asks for them meanwhile.

    Args:
        begin: called when a computation begins; what it gives is called with (modules done,
            modules in all).
    """
    token = _begin.set(begin)
    try:
        yield
    finally:
        _begin.reset(token)


def cache_folder() -> Path:
    """Where they are kept: `svd` in $LORI_CACHE, else in ~/.cache/lori."""
    return Path(os.environ.get("LORI_CACHE") or Path.home() / ".cache" / "lori") / "svd"


def spectra(
    base: BaseModel,
    counts: Mapping[str, int],
    method: str = "auto",
) -> dict[str, Spectrum]:
    """Module name -> the leading singular triples of its weight, on the CPU.

    Args:
        base: its linear layers must hold plain weights. Not modified.
        counts: module name -> how many.
        method: "auto" by size, or one of `engine.svd`.
    Raises:
        InvalidInput: a layer's weight is packed (4 bits, fp8).
    """
    out = {}
    begin = _begin.get()
    told = None if begin is None else begin()
    for done, (name, count) in enumerate(counts.items(), 1):
        out[name] = ranks().led(partial(_of, base, name, count, method), f"the SVD of {name}")
        if told is not None:
            told(done, len(counts))
    return out


def _of(base: BaseModel, name: str, count: int, method: str) -> Spectrum:
    return _spectrum(plain_weight(base.model.get_submodule(name)), count, method)


def plain_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as (out_features, in_features), a view.

    Raises:
        InvalidInput: it is packed.
    """
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1:
        return linear_weight(layer)
    raise InvalidInput(
        "this needs the base's plain weights, and they are packed: leave --base-bits 4 and "
        "--precision fp8 out"
    )


def _spectrum(W: Tensor, rank: int, method: str) -> Spectrum:
    shape = (int(W.shape[0]), int(W.shape[1]))
    chosen = choose_method(shape, rank) if method == "auto" else method
    path = cache_folder() / f"{_key(W, rank, chosen)}.safetensors"
    found = _read(path, shape, rank)
    if found is None:
        made = top_svd(W, rank, chosen)
        found = Spectrum(made.U.cpu(), made.s.cpu(), made.V.cpu(), made.energy)
        _write(path, found)
    return found


def _key(W: Tensor, rank: int, method: str) -> str:
    """SHA-256 of all that the result depends on."""
    told = [rank, method, str(W.dtype), list(W.shape), W.device.type, torch.__version__]
    h = hashlib.sha256(json.dumps(told).encode())
    h.update(W.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    return h.hexdigest()


def _write(path: Path, spectrum: Spectrum) -> None:
    """Keep it, or say why not: a result that cannot be kept is a result all the same."""
    tensors = {"U": spectrum.U, "s": spectrum.s, "V": spectrum.V}
    data = save_tensors(tensors, metadata={"energy": repr(spectrum.energy)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data + hashlib.sha256(data).digest())
    except (OSError, StorageFailed) as e:
        logger.warning("singular values are not kept: %s", e)


def _read(path: Path, shape: tuple[int, int], rank: int) -> Spectrum | None:
    """What is kept at `path`; None where nothing usable is."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    data, digest = stored[:-_DIGEST], stored[-_DIGEST:]
    try:
        if hashlib.sha256(data).digest() != digest:
            raise ValueError("it is not what was written")
        tensors = load_tensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        found = Spectrum(
            tensors["U"], tensors["s"], tensors["V"], float(header["__metadata__"]["energy"])
        )
        if (found.U.shape, found.V.shape) != ((shape[0], rank), (shape[1], rank)):
            raise ValueError("it is of another matrix")
    except Exception as e:  # noqa: BLE001 - whatever is wrong with it, it is computed again
        logger.warning("%s is unusable (%s): computed again", path.name, e)
        return None
    return found
