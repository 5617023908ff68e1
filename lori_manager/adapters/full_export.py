"""An adapter merged into its base, as a model folder of its own, written as a stream."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from lori_manager.adapters.checkpoint import (
    CONFIG,
    DTYPES,
    Part,
    Plan,
    Shard,
    plan_differences,
    plan_full,
)
from lori_manager.adapters.resuming import Kept, resumed_directory
from lori_manager.engine.update import Change, LowRankUpdate, Rescaled
from lori_manager.errors import InvalidInput, WrongBase
from lori_manager.store.files import storing

_VALUES = 1 << 19  # of a weight, summed at a time
_ROWS = 64  # at least: with a few, BLAS takes another kernel and may round otherwise
_BYTES = 4 * _VALUES  # of a tensor that is copied, read at a time
_AHEAD = 32  # blocks that wait for the disk
_WRITTEN = 1 << 18  # bytes at a time: of more, the system's own work for each byte multiplies
_FLUSHED = 16 << 20  # bytes after which the disk is asked to begin with what was written
_MB = 10**6


def write_full(
    base: Path,
    updates: Mapping[str, Change],
    directory: Path,
    *,
    fingerprint: str,
    told: Callable[[int, int], None] | None = None,
) -> None:
    """Write base + update: the base's files, tensor by tensor, with what they say in between.

    Every tensor keeps its dtype; what becomes of it is made in float32 and rounded once. In
    memory are the update and a few blocks of some MB. Started again after an interruption, it
    goes on behind the last whole file.

    Args:
        base: the base's folder.
        updates: module name -> update. Not modified.
        directory: made if missing; whole or without a config.json.
        fingerprint: of the base's weights, to know them again after an interruption.
        told: called with (MB done, MB in all).
    Raises:
        Conflict: `directory` is not empty, or being written by another process.
        StorageFailed: it cannot be written; what is finished is kept for the next run.
        WrongBase: a module, its shape or its tensor is not what the update needs.
        NotFound: no safetensors weights that transformers loads.
        InvalidInput: a sum that nothing can hold, or a tensor that nothing can be added to.
    """
    plan = plan_full(base, updates)
    _write_plan(plan, directory, _digest(plan, updates, fingerprint), told)


def write_differences(
    base: Path,
    differences: Mapping[str, Tensor],
    directory: Path,
    *,
    fingerprint: str,
    told: Callable[[int, int], None] | None = None,
) -> None:
    """As `write_full`, of base + dense differences by parameter name.

    Raises:
        As `write_full`.
    """
    plan = plan_differences(base, differences)
    h = hashlib.sha256(_digest(plan, {}, fingerprint).encode())
    for name, difference in sorted(differences.items()):
        values = difference.detach().cpu().contiguous()
        h.update(json.dumps([name, str(values.dtype), list(values.shape)]).encode())
        h.update(values.flatten().view(torch.uint8).numpy().data)
    _write_plan(plan, directory, h.hexdigest(), told)


def _write_plan(
    plan: Plan, directory: Path, digest: str, told: Callable[[int, int], None] | None
) -> None:
    """Write all files of a plan, or go on with it."""
    with resumed_directory(directory, CONFIG, digest) as kept:
        for name, file in plan.copies.items():
            (kept.folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, kept.folder / name)
        for name, text in plan.texts.items():
            (kept.folder / name).write_text(text, encoding="utf-8")
        with _one_thread():
            _write_shards(plan.shards, kept, told)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One of torch's threads, which is faster than a disk.

    Several would wait for one another after every small block, spinning: several times slower
    where another process, or the thread that writes, takes one of the cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _digest(plan: Plan, updates: Mapping[str, Change], fingerprint: str) -> str:
    """Of all that the files depend on.

    Raises:
        InvalidInput: an update that is not finite.
    """
    h = hashlib.sha256(fingerprint.encode())
    for name, update in sorted(updates.items()):
        kind, tensors = _described(update)
        h.update(json.dumps([name, *kind]).encode())
        for tensor in tensors:
            values = tensor.detach().float().cpu().contiguous()
            if not bool(torch.isfinite(values).all()):
                raise InvalidInput(f"the update of module {name!r} is not finite: train it again")
            h.update(values.numpy().data)
    for shard in plan.shards:
        parts = [[p.name, p.source.file.name, p.source.begin, p.transposed] for p in shard.parts]
        h.update(json.dumps([shard.name, shard.metadata, parts]).encode())
    for name, file in plan.copies.items():
        with storing(file), file.open("rb") as f:
            h.update(f"{name} {hashlib.file_digest(f, 'sha256').hexdigest()}".encode())
    h.update(json.dumps(plan.texts).encode())
    return h.hexdigest()


def _described(update: Change) -> tuple[list[object], list[Tensor]]:
    """Plain values that tell what an update is, and its tensors."""
    if isinstance(update, LowRankUpdate):
        return [update.scaling, update.shape, update.rank], [update.A, update.B]
    kind, tensors = ([], []) if update.update is None else _described(update.update)
    vectors = [update.rows, update.columns]
    told = [update.shape, update.bias, *(v is not None for v in vectors)]
    return [*kind, *told], [*tensors, *(v for v in vectors if v is not None)]


def _write_shards(
    shards: tuple[Shard, ...], kept: Kept, told: Callable[[int, int], None] | None
) -> None:
    """Write those that are not finished: this thread sums, each file's own writes behind it."""
    total = sum(shard.nbytes for shard in shards)
    done = 0
    files: deque[_File] = deque()
    try:
        for shard in shards:
            if kept.finished(shard.name) and _is(kept.folder / shard.name, shard):
                done += shard.nbytes
            else:
                file = _File(kept, shard.name)
                files.append(file)
                for block in _content(shard):
                    file.put(block)
                    done += len(block)
                    if told is not None and done >= _MB:
                        told(min(done, total) // _MB, total // _MB)
                file.end()
            if len(files) > 1:  # one is being flushed while the next is summed
                files.popleft().wait()
        while files:
            files.popleft().wait()
    finally:
        for file in files:
            file.drop()


def _is(path: Path, shard: Shard) -> bool:
    """Whether a file is what the shard must be: it is made once more and compared."""
    with storing(path), path.open("rb", buffering=0) as f:
        for block in _content(shard):
            if f.read(len(block)) != bytes(block):
                return False
        return not f.read(1)


class _File:
    """A file on its way to the disk, written by a thread of its own."""

    def __init__(self, kept: Kept, name: str) -> None:
        self._kept = kept
        self._name = name
        self._path = kept.folder / f"{name}.part"
        self._file = FileIO(self._path, "wb")
        self._thread = ThreadPoolExecutor(1, "lori-write")
        self._waiting: deque[Future[None]] = deque()
        self._unflushed = 0
        self._failed = self._dropped = False

    def put(self, block: bytes | memoryview) -> None:
        """Have it written after all before it; waits while too many are not."""
        while len(self._waiting) >= _AHEAD:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._write, block))

    def end(self) -> None:
        """Have the file flushed, named and recorded after its last block."""
        self._waiting.append(self._thread.submit(self._finish))

    def wait(self) -> None:
        """Until all that was asked for is done."""
        try:
            while self._waiting:
                self._waiting.popleft().result()
        finally:
            self.drop()

    def drop(self) -> None:
        """Stop, and remove what is not finished."""
        self._dropped = True  # the end must not come behind blocks that are cancelled here
        self._thread.shutdown(cancel_futures=True)
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _write(self, block: bytes | memoryview) -> None:
        if self._failed:
            return
        self._failed = True  # unless this block gets there: what follows it must not
        left = memoryview(block)
        while left:
            left = left[self._file.write(left[:_WRITTEN]) :]
        self._failed = False
        self._unflushed += len(block)
        if self._unflushed >= _FLUSHED and hasattr(os, "posix_fadvise"):
            # Else the disk would wait until the file is whole, and then all would wait for it.
            at = self._file.tell() - self._unflushed
            os.posix_fadvise(self._file.fileno(), at, self._unflushed, os.POSIX_FADV_DONTNEED)
            self._unflushed = 0

    def _finish(self) -> None:
        if self._failed or self._dropped:
            return
        os.fsync(self._file.fileno())
        self._file.close()
        self._path.replace(self._kept.folder / self._name)
        self._kept.finish(self._name)


def _content(shard: Shard) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, block by block."""
    yield _header(shard)
    for part in shard.parts:
        yield from _blocks(part)


def _header(shard: Shard) -> bytes:
    """The safetensors header, padded as safetensors does it."""
    header: dict[str, object] = {"__metadata__": shard.metadata}
    end = 0
    for part in shard.parts:
        begin, end = end, end + part.source.nbytes
        header[part.name] = {
            "dtype": part.source.dtype,
            "shape": part.source.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(part: Part) -> Iterator[memoryview]:
    """The bytes of a tensor with its change, block by block."""
    if part.difference is not None:
        yield from _shifted(part, part.difference)
        return
    source, change = part.source, part.update
    if change is None:
        sizes = [min(_BYTES, source.nbytes - at) for at in range(0, source.nbytes, _BYTES)]
        for raw in _read(part, sizes):
            yield raw.numpy().data
        return
    dtype = DTYPES[source.dtype]
    update, down, across = _in_place(part, change)
    rows, columns = source.shape if len(source.shape) == 2 else (source.shape[0], 1)
    count = max(1, min(rows // _ROWS, -(-rows * columns // _VALUES)))
    bounds = [rows * i // count for i in range(count + 1)]
    heights = [end - begin for begin, end in pairwise(bounds)]
    sums = torch.empty(max(heights), columns)
    deltas = torch.empty(max(heights), columns)
    sizes = [height * columns * dtype.itemsize for height in heights]
    for begin, height, raw in zip(bounds, heights, _read(part, sizes), strict=False):
        weight = raw.view(dtype).view(height, columns)
        total = sums[:height].copy_(weight)
        if update is not None:
            left, right = update.B, update.A
            delta = torch.mm(left[begin : begin + height], right, out=deltas[:height])
            delta.mul_(update.scaling)
            total.add_(delta)
        if down is not None:
            total.mul_(down[begin : begin + height, None])
        if across is not None:
            total.mul_(across)
        weight.copy_(total)
        _check_range(weight, part.name)
        yield raw.numpy().data


def _in_place(
    part: Part, change: Change
) -> tuple[LowRankUpdate | None, Tensor | None, Tensor | None]:
    """An update, and factors down and across, of the tensor as it lies; float32 on the CPU."""
    scaled = change if isinstance(change, Rescaled) else None
    update = change if isinstance(change, LowRankUpdate) else change.update
    down, across = (None, None) if scaled is None else (scaled.rows, scaled.columns)
    if len(part.source.shape) == 1:  # a bias
        update, across = None, None
    if part.transposed:
        down, across = across, down
    if update is not None:
        A, B = update.A.detach().float().cpu(), update.B.detach().float().cpu()
        update = LowRankUpdate(*((B.T, A.T) if part.transposed else (A, B)), update.scaling)
    wide = [None if t is None else t.detach().float().cpu() for t in (down, across)]
    return update, wide[0], wide[1]


def _shifted(part: Part, difference: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor with a difference of its shape added, block by block."""
    dtype = DTYPES[part.source.dtype]
    flat = difference.detach().cpu().flatten()
    bounds = [*range(0, len(flat), _VALUES), len(flat)]
    sizes = [(end - begin) * dtype.itemsize for begin, end in pairwise(bounds)]
    for begin, raw in zip(bounds, _read(part, sizes), strict=False):
        weight = raw.view(dtype)
        weight.copy_(weight.float() + flat[begin : begin + len(weight)].float())
        _check_range(weight, part.name)
        yield raw.numpy().data


def _check_range(weight: Tensor, name: str) -> None:
    """float16 alone has so small a range that a sensible update can leave it."""
    if weight.dtype == torch.float16 and not bool(torch.isfinite(weight).all()):
        raise InvalidInput(
            f"base and update make tensor {name!r} larger than float16 holds: convert the base "
            "to bfloat16 or float32"
        )


def _read(part: Part, sizes: list[int]) -> Iterator[Tensor]:
    """The tensor's bytes in pieces of those sizes, each (n,) uint8 and its own memory.

    Read, not mapped: pages of a mapped file count as ours until the system takes them
    back, and a disk that fails to read them kills the process.
    """
    file = part.source.file
    with storing(file), file.open("rb", buffering=0) as f:
        f.seek(part.source.begin)
        for size in sizes:
            raw = torch.empty(size, dtype=torch.uint8)
            left = raw.numpy().data
            while left:
                got = f.readinto(left)
                if not got:
                    raise WrongBase(f"{file} was cut short while it was read: fetch it again")
                left = left[got:]
            yield raw
