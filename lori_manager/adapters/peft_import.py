"""A PEFT LoRA, DoRA or IA3 directory as an adapter of ours, or one line that says why not.

The files come from strangers: they are parsed as JSON and safetensors, never
unpickled, and every name, shape, dtype and value is checked against the base.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lori_manager import foreign
from lori_manager.adapters import expressions
from lori_manager.adapters.ia3_import import ia3_vectors
from lori_manager.adapters.peft_config import LoraSettings, is_target, lora_settings, shown
from lori_manager.adapters.peft_format import (
    CONFIG_FILE,
    FINGERPRINT_KEY,
    FLOATS,
    HEADS,
    KEY_PREFIX,
    PICKLE_FILE,
    WEIGHTS_FILE,
    last_part,
)
from lori_manager.engine.weights import AdapterWeights, Block, KindWeights, Stored
from lori_manager.errors import DamagedObject, ImportRefused

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_MAGNITUDE = re.compile(
    r"(?P<module>.+)\.lora_(?P<factor>magnitude_vector)(?:\.(?P<adapter>[^.]+?)(?:\.weight)?)?"
)

_BASE_WEIGHT = (
    "a weight of the base itself; if it is unchanged, save again with save_embedding_layers=False"
)

# The first that occurs in a tensor's name says what the tensor is.
_FOREIGN_TENSORS = (
    ("lora_magnitude_vector", "a DoRA magnitude, and use_dora is not set"),
    ("lora_embedding_", "an adapter of the embeddings; train without targeting them"),
    ("modules_to_save", "a whole module of the base; train without modules_to_save"),
    ("original_module", "a whole module of the base; train without modules_to_save"),
    ("trainable_tokens", "trained embedding rows; train without trainable_token_indices"),
    ("token_adapter", "trained embedding rows; train without trainable_token_indices"),
    (".bias", "a bias, no update of a weight; train with bias='none' and lora_bias=False"),
    ("base_layer.", _BASE_WEIGHT),
    ("embed_tokens.weight", _BASE_WEIGHT),
    ("lm_head.weight", _BASE_WEIGHT),
)


@dataclass(frozen=True)
class ImportedAdapter:
    """What a PEFT directory holds, in our words.

    Attributes:
        weights: of a LoRA or DoRA one block per distinct scaling; A and B are the file's
            tensors bit for bit, in their own dtypes, and B has no mask. Of an IA3 its kind's.
        rank: the largest rank of any module, 0 of an IA3.
        alpha: `lora_alpha` as written. The scalings that count are the blocks'.
        config: the parsed `adapter_config.json`.
        notes: what the user should hear, one sentence each.
        magnitudes: of a DoRA, module name -> (out_features,).
    """

    weights: Stored
    rank: int
    alpha: float
    config: dict[str, Any]
    notes: list[str]
    magnitudes: dict[str, Tensor] | None = None


def read_peft(
    directory: Path,
    *,
    shapes: Mapping[str, tuple[int, int]],
    base_names: Collection[str],
    fingerprint: str,
    assume_base: bool = False,
) -> ImportedAdapter:
    """Read a PEFT LoRA, DoRA or IA3 made for this base.

    Ranks may differ per module (`rank_pattern`), so may alphas; rsLoRA is
    understood. The tensors decide which modules are updated, and the
    configuration must target each of them.

    Args:
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.
        shapes: full name -> (out_features, in_features) of every linear module of
            the base, of GPT-2's Conv1D too.
        base_names: hub id and paths that this base goes by.
        fingerprint: of this base's weights.
        assume_base: accept an adapter whose base cannot be told or has another name.
            A fingerprint that differs is refused all the same.
    Raises:
        ImportRefused: the adapter cannot be imported faithfully; says what to do.
        DamagedObject: a file is cut short, malformed or holds values that are not finite.
    """
    with expressions.one_adapter():
        return _read(directory, shapes, base_names, fingerprint, assume_base)


def _read(
    directory: Path,
    shapes: Mapping[str, tuple[int, int]],
    base_names: Collection[str],
    fingerprint: str,
    assume_base: bool,
) -> ImportedAdapter:
    try:
        config = read_config(directory)
        settings = None if config.get("peft_type") == "IA3" else lora_settings(config)
        tensors, metadata = read_header(directory / WEIGHTS_FILE)
        notes = check_base(config, metadata, base_names, fingerprint, assume_base)
        if settings is None:
            keys = ia3_vectors(config, tensors, shapes)
            vectors = _values(directory / WEIGHTS_FILE, keys, "ia3_l")
            changes = {name: v.flatten().float() - 1 for name, v in vectors.items()}
            return ImportedAdapter(KindWeights("ia3", {}, changes), 0, 0.0, config, notes)
        factors = _match(tensors, shapes, settings, config)
        left = [n for n in shapes if n not in factors and is_target(config, n)]
        weights = _load(directory / WEIGHTS_FILE, factors, settings)
        magnitudes = None
        if settings.dora:
            keys = {module: named["magnitude_vector"] for module, named in factors.items()}
            magnitudes = _values(directory / WEIGHTS_FILE, keys, "lora_magnitude_vector")
    except (ImportRefused, DamagedObject) as error:
        raise type(error)(f"{directory}: {error}") from error
    if (directory / PICKLE_FILE).exists():
        notes.append(f"{PICKLE_FILE} was ignored; {WEIGHTS_FILE} was read.")
    if left:
        notes.append(
            f"{len(left)} modules that target_modules means have no tensors and stay as in "
            f"the base, the first is {min(left)}."
        )
    if magnitudes is None and _is_zero(weights):
        notes.append("The update is zero everywhere: the adapter changes nothing.")
    return ImportedAdapter(weights, weights.rank, settings.alpha, config, notes, magnitudes)


def read_config(directory: Path) -> dict[str, Any]:
    """`adapter_config.json` of a PEFT directory whose weights are safetensors.

    Raises:
        ImportRefused: no such directory, or its weights are a pickle. DamagedObject.
    """
    path = directory / CONFIG_FILE
    try:
        if not path.is_file():
            raise ImportRefused(f"not a PEFT adapter directory: there is no {CONFIG_FILE}")
        config = foreign.read_json(foreign.file_inside(directory, CONFIG_FILE))
        if not (directory / WEIGHTS_FILE).is_file():
            if (directory / PICKLE_FILE).exists():
                raise ImportRefused(
                    f"{PICKLE_FILE} is a pickle, which can run any code and is never opened: "
                    "if you trust it, load it with PEFT and save_pretrained it as safetensors"
                )
            raise ImportRefused(f"not a PEFT adapter directory: there is no {WEIGHTS_FILE}")
    except OSError as error:
        raise ImportRefused(f"cannot be read: {error.strerror or error}") from error
    except foreign.Malformed as error:
        raise DamagedObject(f"{CONFIG_FILE} is not usable: {error}; copy it again") from error
    if not isinstance(config, dict):
        raise ImportRefused(f"{CONFIG_FILE} must hold an object, got {shown(config)}")
    return config


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Tensor name -> dtype and shape, and the metadata, before any value is read.

    Raises:
        DamagedObject: see `foreign.read_header` and `foreign.file_inside`.
    """
    try:
        header, metadata = foreign.read_header(foreign.file_inside(path.parent, path.name))
    except (foreign.Malformed, OSError) as error:
        raise DamagedObject(
            f"{path.name} is cut short or malformed: {error}; copy it again"
        ) from error
    return {n: {"dtype": t.dtype, "shape": list(t.shape)} for n, t in header.items()}, metadata


def check_base(
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
    base_names: Collection[str],
    fingerprint: str,
    assume_base: bool,
) -> list[str]:
    """Notes on how the base was recognised; ImportRefused where it is another."""
    recorded = metadata.get(FINGERPRINT_KEY)
    if recorded == fingerprint:
        return []
    if recorded is not None:
        raise ImportRefused(
            f"made for a base with fingerprint {shown(recorded, 20)}, this base has "
            f"{shown(fingerprint, 20)}: import it into a workspace of its own base"
        )
    name = config.get("base_model_name_or_path")
    if name is not None and not isinstance(name, str):
        raise ImportRefused(f"base_model_name_or_path must be a name, got {shown(name)}")
    if name and name in base_names:
        return []
    same = sorted(b for b in base_names if name and _short(name) and _short(b) == _short(name))
    if same:
        return [f"Its base {shown(name)} was taken for {shown(same[0])}: the last part is equal."]
    if assume_base:
        return [f"Its base {shown(name)} was assumed to be this one."]
    raise ImportRefused(
        f"made for the base {shown(name)}, this base is "
        f"{' or '.join(shown(base) for base in sorted(base_names)) or 'unnamed'}: import it into a "
        "workspace of its own base, or assume the base if both are the same weights"
    )


def _short(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()


def _match(
    tensors: Mapping[str, Mapping[str, Any]],
    shapes: Mapping[str, tuple[int, int]],
    settings: LoraSettings,
    config: Mapping[str, Any],
) -> dict[str, dict[str, str]]:
    """Module -> {"A": tensor name, "B": tensor name}, all checked but the values.

    A DoRA's modules have a "magnitude_vector" too.
    """
    factors: dict[str, dict[str, str]] = {}
    adapters = set()
    foreign = []
    for key in sorted(tensors):
        short = key.removeprefix(KEY_PREFIX)
        named = _FACTOR.fullmatch(short) or (_MAGNITUDE.fullmatch(short) if settings.dora else None)
        if named is None:
            foreign.append(key)
            continue
        module, factor = named["module"], named["factor"]
        if last_part(module) in HEADS:
            raise ImportRefused(
                f"module {shown(module, 120)} is an output head, which may share its weights with "
                "the embeddings; train without targeting it"
            )
        if factor in factors.setdefault(module, {}):
            raise ImportRefused(f"module {shown(module, 120)} has lora_{factor} twice")
        factors[module][factor] = key
        adapters.add(named["adapter"])
    if foreign:
        what = next((what for part, what in _FOREIGN_TENSORS if part in foreign[0]), "")
        raise ImportRefused(
            f"tensor {shown(foreign[0], 120)} is "
            f"{what or 'not part of a LoRA; remove it if it has no use'}"
        )
    if not factors:
        raise ImportRefused(f"{WEIGHTS_FILE} holds no tensors")
    if len(adapters) > 1:
        names = ", ".join(sorted(shown(name) for name in adapters))
        raise ImportRefused(f"{WEIGHTS_FILE} holds several adapters ({names}): save each alone")
    for module in sorted(factors):
        _check_module(module, factors[module], tensors, shapes, settings)
        if is_target(config, module) is False:
            raise ImportRefused(
                f"module {module} has tensors, but target_modules and its companions leave it "
                "out, so PEFT would not apply them; correct adapter_config.json or the file"
            )
    return factors


def _check_module(
    module: str,
    keys: Mapping[str, str],
    tensors: Mapping[str, Mapping[str, Any]],
    shapes: Mapping[str, tuple[int, int]],
    settings: LoraSettings,
) -> None:
    if module not in shapes:
        raise ImportRefused(
            f"module {shown(module, 120)} is not a linear module of this base: "
            "import it into a workspace of its own base"
        )
    out_features, in_features = shapes[module]
    rank = settings.rank_of(module)
    wanted = {"A": [rank, in_features], "B": [out_features, rank]}
    if settings.dora:
        wanted["magnitude_vector"] = [out_features]
    missing = sorted(set(wanted) - set(keys))
    if missing:
        raise ImportRefused(f"module {module} has no lora_{missing[0]}: save the adapter again")
    for factor, expected in wanted.items():
        found = tensors[keys[factor]]
        if found["shape"] != expected:
            raise ImportRefused(
                f"lora_{factor} of module {module} has shape {shown(found['shape'])}, expected "
                f"{expected} from this base and the rank {rank} in {CONFIG_FILE}"
            )
        if found["dtype"] not in FLOATS:
            raise ImportRefused(
                f"lora_{factor} of module {module} is {shown(found['dtype'])}, expected one of "
                f"{', '.join(FLOATS)}: convert it and save again"
            )


def _load(
    path: Path, factors: Mapping[str, Mapping[str, str]], settings: LoraSettings
) -> AdapterWeights:
    """Blocks grouped by scaling, so that no tensor has to be multiplied by it."""
    A: dict[float, dict[str, Tensor]] = {}
    B: dict[float, dict[str, Tensor]] = {}
    for factor, blocks in (("A", A), ("B", B)):
        keys = {module: named[factor] for module, named in factors.items()}
        values = _values(path, keys, f"lora_{factor}")
        for module in sorted(factors):
            scaling = settings.scaling_of(module)
            if scaling > torch.finfo(torch.float32).max:
                raise ImportRefused(
                    f"alpha over rank of module {module} is {scaling:g}, more than float32 holds: "
                    "correct lora_alpha or alpha_pattern"
                )
            blocks.setdefault(scaling, {})[module] = values[module]
    return AdapterWeights(tuple(Block(B=B[s], scaling=s, tensors=A[s]) for s in A))


def _values(path: Path, keys: Mapping[str, str], what: str) -> dict[str, Tensor]:
    """Module -> the values of the tensor that it stands for, all finite."""
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in sorted(keys):
                # Copied: the file's own memory map would break if the file changed.
                values = file.get_tensor(keys[name]).clone()
                if not bool(torch.isfinite(values).all()):
                    raise DamagedObject(
                        f"{what} of module {name} has values that are not finite: take an "
                        "earlier checkpoint"
                    )
                found[name] = values
    except (SafetensorError, OSError) as error:
        raise DamagedObject(f"{WEIGHTS_FILE} cannot be read: {error}; copy it again") from error
    return found


def _is_zero(weights: AdapterWeights) -> bool:
    return all(
        block.scaling == 0 or not bool(block.A[name].any()) or not bool(block.B[name].any())
        for block in weights.blocks
        for name in block.B
    )
