"""AdapterWeights and masks <-> bytes: one file each, lossless.

`engine.container` is the file, `engine.bits` the codes. An adapter's record lists
per block of factors

    modules      [[out_features, in_features, rank, [names]], ...]
    scaling      a float
    projection   ProjectionSpec.to_json(), or null where A is in the file
    digest       SHA-256 of A
    kept         how many entries of B the mask keeps, or null where B is dense
    B, A         {"dtype", "common"} of the stored values; A is null with a projection

and block i has the tensors

    b{i}.mask                    the mask, modules in sorted order, row by row
    b{i}.B.codes, b{i}.B.rest    B in that order, only where the mask is True
    b{i}.A.codes, b{i}.A.rest    A in that order

A routed adapter's record has also

    router       {"reads", "parts", "features", "held_out", "values"}: how many blocks each
                 member has, how many features there are, and how weights and bias are stored

and the tensors router.codes, router.rest, both matrices in that code.

An adapter of an encoder has also, in either format,

    heads        [{"task", "labels", "shapes", "values"}, ...], by task, as `lori-kind` below

and head i the tensors head{i}.codes and head{i}.rest.

What is no low-rank update is a file of another format, `lori-kind`. Its record lists

    kind         the name
    options      plain JSON
    shapes       [[*sizes, [names]], ...]
    values       {"dtype", "common"}

and its tensors are values.codes and values.rest, in sorted order of the names.

A mask's record lists `modules` as [[out_features, rank, [names]], ...] and `kept`;
its one tensor is `mask`.

The decoders trust nothing. Whatever is wrong with a file, they raise DamagedObject,
and what they allocate is bounded by the file's size, not by what it says of itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lori_manager.engine import bits
from lori_manager.engine.container import (
    Container,
    read_container,
    read_format,
    read_meta,
    write_container,
)
from lori_manager.engine.projection import FIELDS, ProjectionSpec
from lori_manager.engine.router import Router
from lori_manager.engine.weights import AdapterWeights, Block, Head, KindWeights, Stored
from lori_manager.errors import DamagedObject, IncompatibleStore

ADAPTER_FORMAT = "lori-adapter"
KIND_FORMAT = "lori-kind"
MASK_FORMAT = "lori-mask"

# A file of n bytes may describe FREE_ENTRIES + ENTRIES_PER_BYTE * n entries of B, and
# as many of A. That is enough for an 8B model's mask at sparsity .999; a tiny file can
# claim 200 MB.
FREE_ENTRIES = 2**25
ENTRIES_PER_BYTE = 256

DIMENSIONS = 8  # of a tensor of a kind, at most
_SIZE_LIMIT = 2**31
_WIDEST = 2**18  # inputs of a module whose A is made: the time for an entry grows with them
_SEED_LIMIT = 2**64

# name -> dtype, integers of its size, and the bits that are all ones in inf and nan,
# among the eight after the sign
_DTYPES = {
    "bfloat16": (torch.bfloat16, torch.int16, 0b11111111),
    "float16": (torch.float16, torch.int16, 0b11111000),
    "float32": (torch.float32, torch.int32, 0b11111111),
}

_NULL = type(None)
_BLOCK_FIELDS = {
    "modules": (list,),
    "scaling": (float,),
    "projection": (dict, _NULL),
    "digest": (str,),
    "kept": (int, _NULL),
    "B": (dict,),
    "A": (dict, _NULL),
}
_PROJECTION_TYPES = {"seed": (int,), "line": (str,), "first_row": (int,), "rank": (int,)}
_VALUES_FIELDS = {"dtype": (str,), "common": (list,)}
_MASK_FIELDS = {"modules": (list,), "kept": (int,)}
_KIND_FIELDS = {"kind": (str,), "options": (dict,), "shapes": (list,), "values": (dict,)}
_HEAD_FIELDS = {"task": (str,), "labels": (list,), "shapes": (list,), "values": (dict,)}
_ROUTER_FIELDS = {
    "reads": (str,),
    "parts": (list,),
    "features": (int,),
    "held_out": (list,),
    "values": (dict,),
}

Tensors = dict[str, bits.Bytes]
Sizes = dict[str, tuple[int, ...]]  # sorted by name


def encode_adapter(weights: AdapterWeights, meta: Mapping[str, Any] | None = None) -> bytes:
    """An adapter as the bytes of a file.

    Args:
        weights: any blocks. The B of a block share one dtype, and so do its A where
            no projection makes them: bfloat16, float16 or float32. Not modified.
        meta: what the caller wants to find again, as plain JSON values.
    Returns:
        Bytes from which `decode_adapter` restores every value bit for bit, save that
        a -0.0 outside a mask returns as 0.0. Equal for equal content.
    Raises:
        ValueError: B is not zero outside its mask, a value is not finite, shapes,
            dtypes or names do not fit, or meta is not plain JSON.
    """
    sizes = [_block_sizes(block) for block in weights.blocks]
    tensors: Tensors = {}
    blocks = [
        _encode_block(block, s, f"b{i}", tensors)
        for i, (block, s) in enumerate(zip(weights.blocks, sizes, strict=True))
    ]
    record: dict[str, Any] = {"blocks": blocks}
    if weights.router is not None:
        record["router"] = _encode_router(weights.router, weights.parts, tensors)
    record |= _encode_heads(weights.heads, tensors)
    data = write_container(ADAPTER_FORMAT, Container(dict(meta or {}), record, tensors))
    if not _fits(sizes, len(data)):
        raise ValueError(
            f"B is too large to be kept in {len(data)} bytes: its masks keep too little"
        )
    return data


def decode_adapter(
    data: bytes, *, check_projection: bool = True
) -> tuple[AdapterWeights, dict[str, Any]]:
    """Inverse of `encode_adapter`.

    Args:
        data: the whole file.
        check_projection: make A and compare it with the digest of the A that B was
            trained on. The weights keep it, so it is not made twice.
    Returns:
        The weights, on the CPU, and the caller's meta.
    Raises:
        DamagedObject: not an adapter's file, or altered in any bit.
        IncompatibleStore: written by a newer lori.
    """
    meta, record, tensors = read_container(data, ADAPTER_FORMAT)
    also = {"router": (dict,), "heads": (list,)}
    also = {name: types for name, types in also.items() if name in record}
    record = _fields(record, "the file", {"blocks": (list,), **also})
    records = [_fields(r, f"block {i}", _BLOCK_FIELDS) for i, r in enumerate(record["blocks"])]
    if not records:
        raise DamagedObject("the file has no blocks")
    sizes = [_ungroup(r["modules"], 3, f"block {i}") for i, r in enumerate(records)]
    if not _fits(sizes, len(data)):
        raise DamagedObject(f"{len(data)} bytes cannot hold modules as large as the file names")
    blocks = tuple(
        _decode_block(r, s, f"b{i}", tensors)
        for i, (r, s) in enumerate(zip(records, sizes, strict=True))
    )
    router: Router | None = None
    parts: tuple[int, ...] = ()
    if "router" in record:
        router, parts = _decode_router(record["router"], len(blocks), tensors)
    heads = _decode_heads(record, len(data), tensors)
    _expect_no_more(tensors)
    if check_projection:
        for i, (block, r) in enumerate(zip(blocks, records, strict=True)):
            if block.projection_digest != r["digest"]:
                raise DamagedObject(f"block {i}: A is not the one that B was trained on")
    return AdapterWeights(blocks, router, parts, heads), meta


def encode_kind(weights: KindWeights, meta: Mapping[str, Any] | None = None) -> bytes:
    """What is no low-rank update, as the bytes of a file.

    Args:
        weights: its tensors share one dtype: bfloat16, float16 or float32. Not modified.
        meta: what the caller wants to find again, as plain JSON values.
    Returns:
        Bytes from which `decode_kind` restores every value bit for bit.
    Raises:
        ValueError: an empty tensor, a value that is not finite, names that cannot be
            printed, options or meta that are not plain JSON.
    """
    coded: Tensors = {}
    record = {
        "kind": weights.kind,
        "options": dict(weights.options),
        **_encode_whole(weights.tensors, "values", coded),
        **_encode_heads(weights.heads, coded),
    }
    return write_container(KIND_FORMAT, Container(dict(meta or {}), record, coded))


def decode_kind(data: bytes) -> tuple[KindWeights, dict[str, Any]]:
    """Inverse of `encode_kind`.

    Returns:
        The weights, on the CPU, and the caller's meta.
    Raises:
        DamagedObject: not such a file, or altered in any bit.
        IncompatibleStore: written by a newer lori.
    """
    meta, record, tensors = read_container(data, KIND_FORMAT)
    also = {"heads": (list,)} if "heads" in record else {}
    record = _fields(record, "the file", {**_KIND_FIELDS, **also})
    values = _decode_whole(record, "the file", "values", len(data), tensors)
    heads = _decode_heads(record, len(data), tensors)
    _expect_no_more(tensors)
    if not _is_name(record["kind"]):
        raise DamagedObject("the file does not say its kind")
    return KindWeights(record["kind"], record["options"], values, heads), meta


def encode(weights: Stored, meta: Mapping[str, Any] | None = None) -> bytes:
    """`encode_adapter` or `encode_kind`, by what it is."""
    if isinstance(weights, KindWeights):
        return encode_kind(weights, meta)
    return encode_adapter(weights, meta)


def decode(data: bytes) -> tuple[Stored, dict[str, Any]]:
    """The inverse of `encode`; raises as `decode_adapter` and `decode_kind`."""
    if read_format(data) == KIND_FORMAT:
        return decode_kind(data)
    return decode_adapter(data)


def encode_mask(mask: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> bytes:
    """A mask as the bytes of a file.

    Args:
        mask: module name -> bool (out_features, rank). Not modified.
        meta: what the caller wants to find again, as plain JSON values.
    Returns:
        Bytes for `decode_mask`; equal for equal content.
    Raises:
        ValueError: no names or unprintable ones, not boolean matrices, or meta is
            not plain JSON.
    """
    _check_names(mask)
    for name, m in mask.items():
        if m.dtype != torch.bool or m.ndim != 2 or m.numel() == 0:
            raise ValueError(f"mask of {name!r}: expected a boolean matrix, got {_kind(m)}")
    sizes: Sizes = {name: tuple(mask[name].shape) for name in sorted(mask)}
    flat = _flatten(mask)
    record = {"modules": _group(sizes), "kept": int(np.count_nonzero(flat))}
    container = Container(dict(meta or {}), record, {"mask": bits.mask_encode(flat)})
    data = write_container(MASK_FORMAT, container)
    if not _fits([sizes], len(data)):
        raise ValueError(f"{len(flat)} entries are too many for a mask that is all but empty")
    return data


def decode_mask(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inverse of `encode_mask`.

    Returns:
        Module name -> bool (out_features, rank), on the CPU, and the caller's meta.
    Raises:
        DamagedObject: not a mask's file, or altered in any bit.
        IncompatibleStore: written by a newer lori.
    """
    meta, record, tensors = read_container(data, MASK_FORMAT)
    record = _fields(record, "the file", _MASK_FIELDS)
    sizes = _ungroup(record["modules"], 2, "the file")
    if not _fits([sizes], len(data)):
        raise DamagedObject(f"{len(data)} bytes cannot hold a mask as large as the file names")
    flat = bits.mask_decode(_take(tensors, "mask"), _count(sizes), record["kept"])
    _expect_no_more(tensors)
    return _split(flat, sizes), meta


def decode_meta(data: bytes) -> dict[str, Any]:
    """The caller's meta of an adapter or a mask, from the file's header alone.

    Nothing else is decoded or checked; the beginning of a file will do.

    Raises:
        DamagedObject: the header is not one of lori's.
        IncompatibleStore: written by a newer lori.
    """
    return read_meta(data)


# Blocks. Their sizes are (out_features, in_features, rank) of each module.


def _block_sizes(block: Block) -> Sizes:
    """The sizes of a block, once it is known that the block can be stored."""
    _check_names(block.B)
    spec, A, mask = block.projection, block.tensors or {}, block.mask
    if not math.isfinite(block.scaling):
        raise ValueError(f"`scaling` must be finite, got {block.scaling}")
    if spec is not None and not (
        max(spec.seed, spec.first_row) < _SEED_LIMIT and spec.line.isprintable()
    ):
        raise ValueError(f"seed {spec.seed} or line {spec.line!r} cannot be stored")
    if mask is not None and set(mask) != set(block.B):
        raise ValueError("mask and B of a block name different modules")
    sizes: Sizes = {}
    for name in sorted(block.B):
        B = block.B[name]
        A_shape = (spec.rank, spec.modules[name]) if spec is not None else tuple(A[name].shape)
        if B.ndim != 2 or len(A_shape) != 2 or B.shape[1] != A_shape[0] or B.numel() == 0:
            raise ValueError(
                f"{name!r}: expected A (rank, in_features) and B (out_features, rank), got "
                f"A {A_shape} and B {tuple(B.shape)}"
            )
        if mask is not None:
            m = mask[name].to(B.device)
            if m.dtype != torch.bool or m.shape != B.shape:
                raise ValueError(f"mask of {name!r}: expected bool like B, got {_kind(m)}")
            if bool(torch.any((B != 0) & ~m)):
                raise ValueError(f"B of {name!r} is not zero outside its mask")
        if spec is not None and A_shape[1] > _WIDEST:
            raise ValueError(f"{name!r} has {A_shape[1]} inputs: at most {_WIDEST} can be stored")
        sizes[name] = (B.shape[0], A_shape[1], A_shape[0])
    return sizes


def _encode_block(block: Block, sizes: Sizes, at: str, tensors: Tensors) -> dict[str, Any]:
    mask = None
    if block.mask is not None:
        mask = _flatten(block.mask)
        tensors[f"{at}.mask"] = bits.mask_encode(mask)
    spec, A = block.projection, block.tensors
    return {
        "modules": _group(sizes),
        "scaling": float(block.scaling),
        "projection": None if spec is None else spec.to_json(),
        "digest": block.projection_digest,
        "kept": None if mask is None else int(np.count_nonzero(mask)),
        "B": _encode_values(block.B, f"{at}.B", tensors, mask),
        "A": None if A is None else _encode_values(A, f"{at}.A", tensors),
    }


def _decode_block(record: dict[str, Any], sizes: Sizes, at: str, tensors: Tensors) -> Block:
    if not math.isfinite(record["scaling"]):
        raise DamagedObject(f"the scaling of {at} is not finite")
    if (record["projection"] is None) == (record["A"] is None):
        raise DamagedObject(f"{at} must have either a projection or a stored A")
    spec = A = mask = flat = None
    B_sizes: Sizes = {name: (rows, rank) for name, (rows, _, rank) in sizes.items()}
    if record["projection"] is not None:
        spec = _decode_projection(record["projection"], sizes, at)
    else:
        A_sizes: Sizes = {name: (rank, columns) for name, (_, columns, rank) in sizes.items()}
        A = _decode_values(record["A"], A_sizes, f"{at}.A", tensors)
    if record["kept"] is not None:
        flat = bits.mask_decode(_take(tensors, f"{at}.mask"), _count(B_sizes), record["kept"])
        mask = _split(flat, B_sizes)
    B = _decode_values(record["B"], B_sizes, f"{at}.B", tensors, flat)
    return Block(B, record["scaling"], spec, A, mask)


def _decode_projection(record: dict[str, Any], sizes: Sizes, at: str) -> ProjectionSpec:
    at = f"the projection of {at}"
    generator = record.get("generator")
    if type(generator) is not str:
        raise DamagedObject(f"{at} must record its generator")
    if generator not in FIELDS:
        raise IncompatibleStore(
            f"A was made by generator {short(generator)}, this lori has {', '.join(FIELDS)}"
        )
    types = {name: _PROJECTION_TYPES[name] for name in FIELDS[generator]}
    record = _fields(record, at, {"generator": (str,), **types})
    numbers = (record["seed"], record.get("first_row", 0))
    if any(not 0 <= n < _SEED_LIMIT for n in numbers) or not record.get("line", "").isprintable():
        raise DamagedObject(f"{at} has an impossible seed or line")
    if any(rank != record["rank"] for _, _, rank in sizes.values()):
        raise DamagedObject(f"{at} and its modules have different ranks")
    if any(columns > _WIDEST for _, columns, _ in sizes.values()):
        raise DamagedObject(f"{at} is for more than {_WIDEST} inputs")
    return ProjectionSpec.from_json(record, {n: columns for n, (_, columns, _) in sizes.items()})


def _encode_router(router: Router, parts: tuple[int, ...], tensors: Tensors) -> dict[str, Any]:
    if not _is_name(router.reads):
        raise ValueError(f"what a router reads must be printable text, got {short(router.reads)}")
    values = {"bias": router.bias[:, None], "weights": router.weights}
    return {
        "reads": router.reads,
        "parts": list(parts),
        "features": int(router.weights.shape[1]),
        "held_out": [list(row) for row in router.held_out],
        "values": _encode_values(values, "router", tensors),
    }


def _decode_router(record: Any, blocks: int, tensors: Tensors) -> tuple[Router, tuple[int, ...]]:
    record = _fields(record, "the router", _ROUTER_FIELDS)
    parts, features, held_out = record["parts"], record["features"], record["held_out"]
    members = len(parts)
    if any(type(n) is not int or n < 1 for n in parts) or members < 1 or sum(parts) != blocks:
        raise DamagedObject(f"the router's members {short(parts)} do not make up {blocks} blocks")
    tables = [row for row in held_out if isinstance(row, list) and len(row) == members]
    if len(tables) != len(held_out) or len(tables) != members:
        raise DamagedObject(f"the router's `held_out` is no table of {members} by {members}")
    if any(type(n) is not int or not 0 <= n < _SIZE_LIMIT for row in tables for n in row):
        raise DamagedObject("the router's `held_out` holds what is no count")
    if not _is_name(record["reads"]) or not 0 < features < _SIZE_LIMIT:
        raise DamagedObject("the router does not say what it reads")
    sizes: Sizes = {"bias": (members, 1), "weights": (members, features)}
    values = _decode_values(record["values"], sizes, "router", tensors)
    if values["weights"].dtype != torch.float32:
        raise DamagedObject("the router's values are not float32")
    table = tuple(map(tuple, held_out))
    return Router(record["reads"], values["weights"], values["bias"][:, 0], table), tuple(parts)


# Heads, and what else is stored whole.


def _encode_heads(heads: Mapping[str, Head], tensors: Tensors) -> dict[str, Any]:
    """`heads` of a record; nothing where there are none, so that files without are as ever."""
    records = []
    for i, task in enumerate(sorted(heads)):
        head = heads[task]
        _check_names([task, *head.labels])
        told = {"task": task, "labels": list(head.labels)}
        records.append(told | _encode_whole(head.tensors, f"head{i}", tensors))
    return {"heads": records} if records else {}


def _decode_heads(record: dict[str, Any], size: int, tensors: Tensors) -> dict[str, Head]:
    heads: dict[str, Head] = {}
    for i, told in enumerate(record.get("heads", [])):
        at = f"head {i}"
        told = _fields(told, at, _HEAD_FIELDS)
        task, labels = told["task"], told["labels"]
        if not all(map(_is_name, [task, *labels])):
            raise DamagedObject(f"{at} has malformed names")
        if len(labels) < 2 or len(set(labels)) != len(labels) or task <= max(heads, default=""):
            raise DamagedObject(f"{at} repeats a label or a task, or has too few")
        heads[task] = Head(tuple(labels), _decode_whole(told, at, f"head{i}", size, tensors))
    if "heads" in record and not heads:
        raise DamagedObject("the file has a list of heads and none in it")
    return heads


def _encode_whole(values: Mapping[str, Tensor], at: str, tensors: Tensors) -> dict[str, Any]:
    """`shapes` and `values` of tensors of any shape."""
    _check_names(values)
    empty = [name for name, t in values.items() if t.numel() == 0 or t.ndim == 0]
    if empty:
        raise ValueError(f"{empty[0]!r} has no values in rows")
    shapes: Sizes = {name: tuple(values[name].shape) for name in sorted(values)}
    return {"shapes": _group(shapes), "values": _encode_values(values, at, tensors)}


def _decode_whole(
    record: dict[str, Any], where: str, at: str, size: int, tensors: Tensors
) -> dict[str, Tensor]:
    shapes = _ungroup(record["shapes"], None, where)
    if _count(shapes) > FREE_ENTRIES + ENTRIES_PER_BYTE * size:
        raise DamagedObject(f"{size} bytes cannot hold tensors as large as {where} names")
    return _decode_values(record["values"], shapes, at, tensors)


# Matrices by name <-> one row of bits.


def _encode_values(
    values: Mapping[str, Tensor], at: str, tensors: Tensors, mask: NDArray[np.bool_] | None = None
) -> dict[str, Any]:
    """Add the code of the values, only where `mask` is True if there is one."""
    dtypes = {v.dtype for v in values.values()}
    names = [name for name, (dtype, _, _) in _DTYPES.items() if dtypes == {dtype}]
    if not names:
        found = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"{at}: expected one dtype among {', '.join(_DTYPES)}, got {found}")
    _, integers, special = _DTYPES[names[0]]
    words = _flatten({name: v.detach().contiguous().view(integers) for name, v in values.items()})
    words = words.view(f"u{words.itemsize}")
    common, codes, rest = bits.floats_encode(words if mask is None else words[mask])
    if any(group & special == special for group in common):
        raise ValueError(f"{at} has values that are not finite")
    tensors[f"{at}.codes"], tensors[f"{at}.rest"] = codes, rest
    return {"dtype": names[0], "common": common}


def _decode_values(
    record: Any, sizes: Sizes, at: str, tensors: Tensors, mask: NDArray[np.bool_] | None = None
) -> dict[str, Tensor]:
    record = _fields(record, at, _VALUES_FIELDS)
    dtype, common = record["dtype"], record["common"]
    if dtype not in _DTYPES:
        raise DamagedObject(f"{at} has dtype {short(dtype)}, expected one of {', '.join(_DTYPES)}")
    torch_dtype, integers, special = _DTYPES[dtype]
    if any(type(g) is not int or not 0 <= g < 256 for g in common) or len(set(common)) < len(
        common
    ):
        raise DamagedObject(f"{at} has an impossible list of exponents")
    if any(group & special == special for group in common):
        raise DamagedObject(f"{at} has values that are not finite")
    codes, rest = _take(tensors, f"{at}.codes"), _take(tensors, f"{at}.rest")
    n = _count(sizes) if mask is None else int(np.count_nonzero(mask))
    words = bits.floats_decode(common, codes, rest, n, integers.itemsize)
    if mask is not None:
        scattered = np.zeros(len(mask), words.dtype)
        scattered[mask] = words
        words = scattered
    matrices = _split(words.view(f"i{words.itemsize}"), sizes)
    return {name: matrix.view(torch_dtype) for name, matrix in matrices.items()}


def _flatten(matrices: Mapping[str, Tensor]) -> NDArray[Any]:
    """Matrices of one dtype, in sorted order of names and row by row, as one array."""
    return np.concatenate([matrices[n].detach().cpu().numpy().ravel() for n in sorted(matrices)])


def _split(flat: NDArray[Any], sizes: Sizes) -> dict[str, Tensor]:
    """Inverse of `_flatten`. The matrices are views, which do not overlap."""
    out, start = {}, 0
    for name, shape in sizes.items():
        stop = start + math.prod(shape)
        out[name] = torch.from_numpy(flat[start:stop].reshape(shape))
        start = stop
    return out


def _group(sizes: Sizes) -> list[Any]:
    """Names by their common sizes: [[*sizes, [names]], ...]."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, size in sizes.items():
        groups.setdefault(size, []).append(name)
    return [[*size, groups[size]] for size in sorted(groups)]


def _ungroup(groups: list[Any], dimensions: int | None, where: str) -> Sizes:
    """The inverse of `_group`; `dimensions` None takes any number from one to `DIMENSIONS`."""
    lengths = range(2, DIMENSIONS + 2) if dimensions is None else (dimensions + 1,)
    sizes: Sizes = {}
    for group in groups:
        if not isinstance(group, list) or len(group) not in lengths:
            raise DamagedObject(f"{where} has a malformed list of modules")
        *size, names = group
        if any(type(x) is not int or not 0 < x < _SIZE_LIMIT for x in size):
            raise DamagedObject(f"{where} has modules of size {short(size)}")
        if not isinstance(names, list) or not all(map(_is_name, names)):
            raise DamagedObject(f"{where} has malformed names of modules")
        if len(set(names)) < len(names) or not sizes.keys().isdisjoint(names):
            raise DamagedObject(f"{where} names a module twice")
        sizes.update(dict.fromkeys(names, tuple(size)))
    if not sizes:
        raise DamagedObject(f"{where} names no modules")
    return dict(sorted(sizes.items()))


def _count(sizes: Sizes) -> int:
    return sum(map(math.prod, sizes.values()))


def _fits(blocks: Iterable[Sizes], size: int) -> bool:
    """Whether a file of `size` bytes may describe these blocks; see FREE_ENTRIES."""
    modules = [module for sizes in blocks for module in sizes.values()]
    B = sum(module[0] * module[-1] for module in modules)
    A = sum(math.prod(module[1:]) for module in modules)
    return max(A, B) <= FREE_ENTRIES + ENTRIES_PER_BYTE * size


# Checks.


def _fields(record: Any, where: str, expected: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """The record, which has exactly the expected keys with values of exactly those types."""
    if not isinstance(record, dict) or set(record) != set(expected):
        raise DamagedObject(f"{where} must record exactly {', '.join(expected)}")
    for key, types in expected.items():
        if type(record[key]) not in types:  # bool is an int
            raise DamagedObject(f"{key!r} of {where} is {short(record[key])}")
    return record


def _take(tensors: Tensors, name: str) -> bits.Bytes:
    if name not in tensors:
        raise DamagedObject(f"tensor {name!r} is missing")
    return tensors.pop(name)


def _expect_no_more(tensors: Tensors) -> None:
    if tensors:
        raise DamagedObject(f"unexpected tensor {short(min(tensors))}")


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name != "" and name.isprintable()


def _check_names(names: Iterable[str]) -> None:
    bad = [name for name in names if not _is_name(name)]
    if bad or not list(names):
        raise ValueError(f"module names must be printable text, got {short(bad)}")


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
