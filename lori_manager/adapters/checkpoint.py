"""Which tensors of a base's files an adapter changes, and where a module's weight is stored."""

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lori_manager import models
from lori_manager.engine.layers import linear_shape
from lori_manager.engine.update import Change, Rescaled
from lori_manager.errors import InvalidInput, NotFound, WrongBase
from lori_manager.models import StoredTensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Part:
    """One tensor of a new file.

    Attributes:
        name: in the new file.
        source: where its bytes come from.
        update: what becomes of it, None for a copy.
        transposed: it is stored (in_features, out_features), as GPT-2's Conv1D is.
        difference: what is added to it, of its own shape.
    """

    name: str
    source: StoredTensor
    update: Change | None = None
    transposed: bool = False
    difference: torch.Tensor | None = None


@dataclass(frozen=True)
class Shard:
    """A new safetensors file: its name, its metadata and its tensors in order."""

    name: str
    metadata: dict[str, str]
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.source.nbytes for part in self.parts)


@dataclass(frozen=True)
class Plan:
    """What the new model folder holds.

    Attributes:
        shards: the weights.
        texts: name -> content, of the files that are made anew.
        copies: path in the folder -> the base's file.
    """

    shards: tuple[Shard, ...]
    texts: dict[str, str]
    copies: dict[str, Path]


def plan_full(base: Path, updates: Mapping[str, Change]) -> Plan:
    """Find every update's tensor in the base's files, of which only the headers are read.

    A tensor keeps its name, dtype, shape and place. An output head that is tied to the
    embeddings gets a tensor of its own behind theirs, and the config says so.

    Args:
        base: a model folder with safetensors weights, in one file or several.
        updates: module name -> update. Not modified.
    Raises:
        NotFound: no weights there that transformers loads.
        WrongBase: a module, its shape or its tensor is not what the update needs; a
            damaged file.
        InvalidInput: a module or a tensor that nothing can be added to.
    """
    shards, index = _read(base)
    skeleton = models.load_skeleton(base)
    model: Any = skeleton.model
    weights = {name: _weight(model, name, update) for name, update in updates.items()}
    parameters = {name: _parameters(model, name) for name in updates}
    tied = {name: mates for name in updates if (mates := _mates(model, parameters[name]))}
    whole = shards
    for name, mates in tied.items():
        if model.get_submodule(name) is not model.get_output_embeddings():
            raise InvalidInput(
                f"module {name!r} shares its weight with {mates[0]!r}, which only an output head "
                "may: train without targeting it, or export without `full`"
            )
        whole = _untied(model, whole, [parameters[name][0], *mates])
    stored = _stored(model, whole)
    changed: dict[str, Part] = {}
    for name, update in updates.items():
        keys = [key for p in parameters[name] for key in stored.get(p, ())]
        if not keys:
            placed = (key for keys in stored.values() for key in keys)
            raise WrongBase(_nowhere(base, name, whole, placed))
        for part in (part for shard in whole for part in shard.parts if part.name in keys):
            _check_stored(name, part.source, tuple(weights[name].shape))
            transposed = name in skeleton.transposed
            changed[part.name] = replace(part, update=update, transposed=transposed)
        if isinstance(update, Rescaled) and update.bias:
            keys = stored.get(f"{name}.bias", [])
            for part in (part for shard in whole for part in shard.parts if part.name in keys):
                _check_stored(name, part.source, update.shape[:1])
                changed[part.name] = replace(part, update=update)
    made = tuple(
        replace(shard, parts=tuple(changed.get(part.name, part) for part in shard.parts))
        for shard in whole
    )
    texts = {}
    if index is not None:
        index["weight_map"] = {p.name: shard.name for shard in made for p in shard.parts}
        if isinstance(metadata := index.get("metadata"), dict) and whole != shards:
            metadata["total_size"] = sum(shard.nbytes for shard in made)
        texts[INDEX] = _json(index)
    if tied:
        texts[CONFIG] = _untied_config(base, [parameters[name][0] for name in tied])
    return Plan(made, texts, _copies(base, {*texts, *(shard.name for shard in made)}))


def plan_differences(base: Path, differences: Mapping[str, torch.Tensor]) -> Plan:
    """Find the tensors of parameters in the base's files, of which only the headers are read.

    Args:
        base: a model folder with safetensors weights, in one file or several.
        differences: parameter name -> what is added, of its shape; of tied ones one name
            stands for all. Not modified.
    Raises:
        NotFound, WrongBase: see `plan_full`.
        InvalidInput: a tensor that nothing can be added to.
    """
    shards, index = _read(base)
    model: Any = models.load_skeleton(base).model
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    stored = _stored(model, shards)
    changed: dict[str, torch.Tensor] = {}
    for name, difference in differences.items():
        if shapes.get(name) != tuple(difference.shape):
            raise WrongBase(
                f"the base, a {type(model).__name__}, has {shapes.get(name, 'no parameter')} as "
                f"{name!r}, the difference {tuple(difference.shape)}: it was made for another model"
            )
        keys = [key for p in (name, *_mates(model, [name])) for key in stored.get(p, ())]
        if not keys:
            placed = (key for keys in stored.values() for key in keys)
            raise WrongBase(_nowhere(base, name.rpartition(".")[0], shards, placed))
        changed |= dict.fromkeys(keys, difference)
        for part in (part for shard in shards for part in shard.parts if part.name in keys):
            _check_stored(name, part.source, shapes[name])
    made = tuple(
        replace(shard, parts=tuple(replace(p, difference=changed.get(p.name)) for p in shard.parts))
        for shard in shards
    )
    texts = {} if index is None else {INDEX: _json(index)}
    return Plan(made, texts, _copies(base, {*texts, *(shard.name for shard in made)}))


def _read(base: Path) -> tuple[list[Shard], dict[str, Any] | None]:
    """The base's files as transformers picks them, and its index where it has several."""
    index = None
    if (base / WEIGHTS).is_file():
        files = [base / WEIGHTS]
    else:
        files = models.weight_files(base)
        if not (base / INDEX).is_file():
            raise NotFound(
                f"{base} holds {files[0].name} but neither {WEIGHTS} nor {INDEX}: "
                "convert the weights with `save_pretrained` first"
            )
        index = json.loads((base / INDEX).read_text("utf-8"))
    shards = []
    for file in files:
        tensors, metadata = models.stored_tensors(file)
        parts = tuple(Part(tensor.name, tensor) for tensor in tensors)
        # transformers' own; some loaders refuse a file without it
        shards.append(Shard(file.name, {"format": "pt"} | metadata, parts))
    return shards, index


def _weight(model: Any, name: str, update: Change) -> Any:
    """The weight of the linear module that the update is for, without values."""
    try:
        module = model.get_submodule(name)
    except AttributeError as e:
        raise WrongBase(
            f"the base, a {type(model).__name__}, has no module {name!r}: "
            "the adapter was made for another model; export it with that base"
        ) from e
    shape = linear_shape(module)
    if shape is None:
        raise InvalidInput(
            f"module {name!r} is a {type(module).__name__}, expected a linear layer: "
            "train without targeting it"
        )
    if shape != update.shape:
        raise WrongBase(
            f"module {name!r} has (out, in) features {shape}, the update {update.shape}: "
            "the adapter was made for another model; export it with that base"
        )
    return module.weight


def _parameters(model: Any, name: str) -> list[str]:
    """The names of a module's weight: several where the model uses the module in more places."""
    module = model.get_submodule(name)
    everywhere = model.named_modules(remove_duplicate=False)
    return [f"{name}.weight", *(f"{n}.weight" for n, m in everywhere if m is module and n != name)]


def _mates(model: Any, parameters: list[str]) -> list[str]:
    """Other modules' parameters that hold the same values as `parameters`, being tied."""
    sources: dict[str, str] = model.all_tied_weights_keys
    roots = {sources.get(p, p) for p in parameters}
    group = {p for pair in sources.items() for p in pair if sources.get(p, p) in roots}
    return sorted(group.difference(parameters))


def _stored(model: Any, shards: Iterable[Shard]) -> dict[str, list[str]]:
    """Parameter name -> the stored tensors that transformers loads into it as they are.

    Checkpoints may carry other prefixes than the model's modules, or older names: each name
    goes through the loader's own renaming. A tensor that the loader converts (splits,
    merges, permutes) on its way is none of them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    prefix = model.base_model_prefix
    found: dict[str, list[str]] = defaultdict(list)
    # In the loader's order: some renamings depend on what they met before.
    for key in sorted((p.name for s in shards for p in s.parts), key=dot_natural_key):
        name, converted = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, converted = rename_source_key(key, [], [], prefix, known)
        if name in known and converted is None:
            found[name].append(key)
    return found


def _untied(model: Any, shards: list[Shard], tied: list[str]) -> list[Shard]:
    """Give every one of the tied parameters a tensor, a copy of the one that is stored."""
    stored = _stored(model, shards)
    kept = next((stored[p][0] for p in tied if stored.get(p)), None)
    missing = [p for p in tied if not stored.get(p)]
    out = []
    for shard in shards:
        parts = list(shard.parts)
        at = next((i for i, part in enumerate(parts) if part.name == kept), None)
        if at is not None:
            parts[at + 1 : at + 1] = [replace(parts[at], name=name) for name in missing]
        out.append(replace(shard, parts=tuple(parts)))
    return out


def _untied_config(base: Path, parameters: list[str]) -> str:
    """The base's config with ties taken off; loaded once to see that this is what it says."""
    text = _json(models.read_config(base) | {"tie_word_embeddings": False})
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(text, encoding="utf-8")
        model: Any = models.load_skeleton(Path(folder)).model
    still = [name for name in parameters if _mates(model, [name])]
    if still:
        raise InvalidInput(
            f"{still[0]!r} stays tied to the embeddings of this {type(model).__name__} whatever "
            "its config says: train without targeting it, or export without `full`"
        )
    return text


def _nowhere(base: Path, name: str, shards: Iterable[Shard], placed: Iterable[str]) -> str:
    """What to tell of a module whose weight is stored nowhere, or in another form."""
    keys = [part.name for shard in shards for part in shard.parts]
    over = sorted(set(keys).difference(placed)) or keys
    near = next((key for key in over if name.rpartition(".")[2] in key), over[0] if over else "")
    return (
        f"no tensor in {base} is the weight of module {name!r} as it is: expected "
        f"'{name}.weight' or a name that transformers maps to it, found {len(keys)} others such as "
        f"{near!r}; load the base with transformers, save it with `save_pretrained` and use that"
    )


def _check_stored(name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor that the update of module `name` cannot be added to."""
    if tensor.dtype not in DTYPES:
        raise InvalidInput(
            f"tensor {tensor.name!r} of module {name!r} is {tensor.dtype}, expected one of "
            f"{', '.join(DTYPES)}: use the base's weights before they were quantised"
        )
    itemsize = DTYPES[tensor.dtype].itemsize
    if tensor.shape != shape or tensor.nbytes != math.prod(shape) * itemsize:
        raise WrongBase(
            f"tensor {tensor.name!r} has the shape {tensor.shape}, module {name!r} {shape}: "
            "config.json and the weights are of different models; fetch the base again"
        )


# Weights in any format, checkpoints of training, and an adapter that would be loaded on top.
_NOT_COPIED = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data",
    ".gguf", ".ot", ".npz", ".npy", ".tflite", ".pkl", ".index.json", ".part",
)  # fmt: skip
_NOT_OURS = ("adapter_config.json", "README.md")
_FOLDERS = ("additional_chat_templates",)


def _copies(base: Path, made: set[str]) -> dict[str, Path]:
    """Config, tokenizer, templates, licence: all but weights, hidden files and the model's card."""
    files = [*base.iterdir(), *(f for folder in _FOLDERS for f in (base / folder).glob("*"))]
    return {
        str(file.relative_to(base)): file
        for file in sorted(files)
        if file.is_file()
        and not file.name.startswith(".")
        and not file.name.lower().endswith(_NOT_COPIED)
        and file.name not in _NOT_OURS
        and file.name not in made
    }


def _json(doc: dict[str, Any]) -> str:
    return json.dumps(doc, indent=2, ensure_ascii=False) + "\n"
