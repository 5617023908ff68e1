"""Prefix tuning: keys and values of virtual tokens before every sequence (arXiv:2101.00190).

They stand in the cache of each layer, as PEFT puts them: the tokens of a sequence have the
positions behind them, so that an export gives the same logits in PEFT. With `projection` they come
out of a small network in training, which is folded away once they are stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PrefixEncoder, PrefixTuningConfig
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor, nn

from lori_manager.adapters.kind import Training, own_start
from lori_manager.adapters.peft_config import shown
from lori_manager.adapters.peft_export import model_card
from lori_manager.adapters.peft_format import (
    CARD_FILE,
    CONFIG_FILE,
    FINGERPRINT_KEY,
    FLOATS,
    WEIGHTS_FILE,
)
from lori_manager.adapters.peft_import import check_base, read_config, read_header
from lori_manager.adapters.staging import staged_directory
from lori_manager.architectures import context_of
from lori_manager.config import Config
from lori_manager.engine.weights import KindWeights, Stored
from lori_manager.errors import DamagedObject, ImportRefused, InvalidInput, WrongBase
from lori_manager.models import BaseModel

KIND = "prefix"
PEFT_TYPE = "PREFIX_TUNING"
TENSOR = "prompt_embeddings"  # PEFT's name
SHORTEST = 2  # tokens of a row: a prompt of one and what is learned
# Of the configuration: what changes nothing of a stored prefix.
_HARMLESS = frozenset(
    {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode",
     "auto_mapping", "peft_version", "init_weights", "encoder_hidden_size", "prefix_projection"}
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Of a model's cache: layers, heads of keys and values, features of each."""

    layers: int
    heads: int
    size: int

    @property
    def token_dim(self) -> int:
        """Features of one token's keys in one layer."""
        return self.heads * self.size

    @property
    def width(self) -> int:
        """Of one virtual token: keys and values of all layers."""
        return 2 * self.layers * self.token_dim


@contextmanager
def training(
    base: BaseModel, config: Config, *, steps: int, start: Stored | None = None
) -> Iterator[Training]:
    """See `KindModule`.

    Options: `num_virtual_tokens`; `projection`, train them through tanh and two linear layers;
    `hidden`, the width of these, 0 for that of a token's keys. Begins as PEFT does: values from
    N(0, 1), or the network's own.
    """
    count, hidden = config.kind_options["num_virtual_tokens"], config.kind_options["hidden"]
    if count < 1 or hidden < 0:
        raise InvalidInput(
            f"kind `{KIND}` wants `num_virtual_tokens` of at least 1 and `hidden` of at least 0, "
            f"got {count} and {hidden}"
        )
    if config.checkpointing == "on":
        raise InvalidInput(
            f"kind `{KIND}` puts keys into a cache, and gradient checkpointing computes layers "
            "twice: leave --checkpointing out"
        )
    context = context_of(base.model.config.get_text_config().to_dict())
    if context is not None and count + SHORTEST > context:
        raise InvalidInput(
            f"{count} virtual tokens leave no room for rows in the model's context of {context} "
            "tokens: lower --option num_virtual_tokens"
        )
    shape = cache_shape(base.model)
    begun = own_start(KIND, start)
    projected = config.kind_options["projection"] and begun is None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder: Any = PrefixEncoder(  # type: ignore[no-untyped-call]
            _peft(shape, count, projected, hidden or shape.token_dim)
        )
    if begun is not None:
        check(base.model, begun)
        values = begun.tensors[TENSOR]
        if len(values) != count:
            raise InvalidInput(
                f"the parent has {len(values)} virtual tokens, this training {count}: give the "
                "parent's number, or leave --from out"
            )
        encoder.embedding.weight.data.copy_(values)
    encoder.to(base.device, torch.float32)
    places = torch.arange(count, device=base.device)

    def weights(dtype: torch.dtype) -> KindWeights:
        with torch.no_grad():
            kept = encoder(places).to("cpu", dtype).contiguous()
        return KindWeights(KIND, _options(shape), {TENSOR: kept})

    with _prefixed(base, shape, lambda: encoder(places)):
        parameters = dict(encoder.named_parameters())
        yield Training(parameters, weights, packs=False, graphs=False)


@contextmanager
def applied(base: BaseModel, weights: KindWeights) -> Iterator[None]:
    """See `KindModule`.

    Raises:
        WrongBase: the adapter is of another model.
    """
    check(base.model, weights)
    values = weights.tensors[TENSOR].to(base.device, torch.float32)
    with _prefixed(base, cache_shape(base.model), lambda: values):
        yield


def write(weights: KindWeights, directory: Path, told: Mapping[str, Any]) -> None:
    """See `KindModule`: PEFT's directory of prefix tuning."""
    shape = Shape(*(int(weights.options[key]) for key in ("layers", "heads", "size")))
    values = weights.tensors[TENSOR]
    doc = {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": told["base_name"],
        "revision": told["revision"],
        "inference_mode": True,
        "num_virtual_tokens": len(values),
        "token_dim": shape.token_dim,
        "num_transformer_submodules": 1,
        "num_attention_heads": shape.heads,
        "num_layers": shape.layers,
        "encoder_hidden_size": shape.token_dim,
        "prefix_projection": False,
    }
    what = f"A prefix of {len(values)} virtual tokens"
    card = model_card(told["label"], told["base_name"], told["revision"], what, tag="prefix-tuning")
    with staged_directory(directory, CONFIG_FILE) as staged:
        (staged / CARD_FILE).write_text(card, encoding="utf-8")
        (staged / CONFIG_FILE).write_text(json.dumps(doc, indent=2) + "\n", encoding="utf-8")
        save_file(
            {TENSOR: values.detach().cpu().clone().contiguous()},
            staged / WEIGHTS_FILE,
            metadata={"format": "pt", FINGERPRINT_KEY: told["fingerprint"]},
        )


def read(
    directory: Path,
    model: nn.Module,
    *,
    base_names: Collection[str],
    fingerprint: str,
    assume_base: bool = False,
) -> tuple[KindWeights, dict[str, Any], tuple[str, ...]]:
    """A directory of PEFT's prefix tuning: the weights, its configuration, what to tell.

    Args:
        model: the base, on the meta device or not.
        directory, base_names, fingerprint, assume_base: as for `peft_import.read_peft`.
    Raises:
        ImportRefused, DamagedObject, WrongBase.
    """
    try:
        config = read_config(directory)
        header, metadata = read_header(directory / WEIGHTS_FILE)
        notes = check_base(config, metadata, base_names, fingerprint, assume_base)
        if set(header) != {TENSOR}:
            raise ImportRefused(
                f"{WEIGHTS_FILE} must hold {TENSOR!r} alone: save it with PEFT again"
            )
        _check_described(config, header[TENSOR], cache_shape(model))
        try:
            values = load_tensors((directory / WEIGHTS_FILE).read_bytes())[TENSOR]
        except (SafetensorError, OSError) as e:
            raise DamagedObject(f"{WEIGHTS_FILE} cannot be read: {e}; copy it again") from e
        if not bool(torch.isfinite(values).all()):
            raise DamagedObject(f"{TENSOR} has values that are not finite")
    except (ImportRefused, DamagedObject) as e:
        raise type(e)(f"{directory}: {e}") from e
    weights = KindWeights(KIND, _options(cache_shape(model)), {TENSOR: values})
    check(model, weights)
    return weights, config, tuple(notes)


def _check_described(config: Mapping[str, Any], found: Mapping[str, Any], shape: Shape) -> None:
    """Refuse values that are not what the configuration and this model have.

    Raises:
        ImportRefused: names the field.
    """
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ImportRefused(
            f"task_type is {shown(config['task_type'])}: only CAUSAL_LM adapters can be imported"
        )
    if found["dtype"] not in FLOATS:
        raise ImportRefused(f"{TENSOR} is {found['dtype']}: convert it and save again")
    rows = found["shape"][0] if found["shape"] else 0
    if rows < 1 or found["shape"] != [rows, shape.width]:
        raise ImportRefused(
            f"{TENSOR} has shape {found['shape']}, expected [virtual tokens, {shape.width}] from "
            "this base: it was made for another model"
        )
    expected = {
        "num_virtual_tokens": rows,
        "num_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "token_dim": shape.token_dim,
        "num_transformer_submodules": 1,
    }
    for field, value in expected.items():
        given = config.get(field)
        if given is not None and (type(given) is not int or given != value):
            raise ImportRefused(
                f"{field} is {shown(given)}, and the tensor and this base have {value}: correct "
                f"{CONFIG_FILE} or the file"
            )
    for field in sorted(config.keys() - expected.keys() - _HARMLESS):
        if config[field]:
            raise ImportRefused(
                f"{shown(field, 60)} is set ({shown(config[field])}): this lori does not know "
                "what it computes; train without it"
            )


def check(model: nn.Module, weights: KindWeights) -> None:
    """Refuse what does not fit the model, which may be on the meta device.

    Raises:
        WrongBase: it was made for another.
    """
    shape = cache_shape(model)
    values = weights.tensors.get(TENSOR)
    told = dict(weights.options)
    if values is None or len(weights.tensors) > 1 or told != _options(shape) or (
        values.ndim != 2 or values.shape[1] != shape.width
    ):  # fmt: skip
        raise WrongBase(
            f"this prefix of {told} does not fit the cache of this {type(model).__name__}, "
            f"{_options(shape)}: it was made for another model"
        )


def cache_shape(model: nn.Module) -> Shape:
    """What the model's layers keep of a token, as PEFT reads it off the settings.

    Raises:
        InvalidInput: layers that differ in it.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    plain = config.to_dict()
    if any(plain.get(k) for k in ("per_layer_config", "global_head_dim", "num_kv_shared_layers")):
        raise InvalidInput(
            f"kind `{KIND}` wants layers alike, and those of {type(model).__name__} keep different "
            "keys: train another kind"
        )
    queries = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // queries)
    heads = int(getattr(config, "num_key_value_heads", None) or queries)
    return Shape(int(config.num_hidden_layers), heads, size)


def _options(shape: Shape) -> dict[str, int]:
    return {"layers": shape.layers, "heads": shape.heads, "size": shape.size}


def _peft(shape: Shape, count: int, projected: bool, hidden: int) -> PrefixTuningConfig:
    return PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=count,
        token_dim=shape.token_dim,
        num_attention_heads=shape.heads,
        num_layers=shape.layers,
        num_transformer_submodules=1,
        encoder_hidden_size=hidden,
        prefix_projection=projected,
        inference_mode=False,
    )


@contextmanager
def _prefixed(base: BaseModel, shape: Shape, values: Callable[[], Tensor]) -> Iterator[None]:
    """Put the virtual tokens before whatever the decoder is given; no rows are packed meanwhile.

    A cache that is empty, as `generate` makes it, is filled; without one a call gets its own.
    Masks grow on the left, positions begin behind the virtual tokens.

    Args:
        values: gives (virtual tokens, `shape.width`) float32.
    """
    from transformers import DynamicCache

    text = base.model.config.get_text_config()
    absolute, window = _positions(base), getattr(text, "sliding_window", None)
    own: list[bool] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        rows = len(ids)
        cache = kwargs.get("past_key_values")
        own.append(cache is None)
        if cache is None:
            cache = kwargs["past_key_values"] = DynamicCache(config=text)
        tokens = values()
        count = len(tokens)
        if cache.get_seq_length() == 0:
            parts = tokens.to(next(base.model.parameters()).dtype)
            parts = parts.view(count, 2 * shape.layers, shape.heads, shape.size)
            parts = parts.permute(1, 2, 0, 3)[:, None].expand(-1, rows, -1, -1, -1)
            for layer in range(shape.layers):
                cache.update(parts[2 * layer], parts[2 * layer + 1], layer)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            if window and count + mask.shape[1] > window and not bool(mask.all()):
                raise InvalidInput(
                    f"the model's window of {window} tokens would lose virtual tokens behind what "
                    f"pads a row: {count} and {mask.shape[1]} columns are more; generate one row "
                    "at a time (`score_batch` 1)"
                )
            kwargs["attention_mask"] = torch.cat([mask.new_ones(rows, count), mask], dim=1)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + count
        end = cache.get_seq_length() + ids.shape[1]
        if absolute is not None and end > absolute:
            raise InvalidInput(
                f"{count} virtual tokens and {end - count} of a row are more than the {absolute} "
                "positions of this model: lower `max_length` or --option num_virtual_tokens"
            )
        return args, kwargs

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        if own.pop():  # a caller who asked for no cache must not go on with this one
            output.past_key_values = None
        return output

    known = base.model.__dict__.get("_lori_packs")
    base.model._lori_packs = False
    hooks = [
        base.decoder.register_forward_pre_hook(before, with_kwargs=True),
        base.decoder.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        base.model._lori_packs = known


def _positions(base: BaseModel) -> int | None:
    """How many positions the model has learned embeddings for; None where it has none."""
    words = base.model.get_input_embeddings()
    tables = [m for m in base.decoder.modules() if isinstance(m, nn.Embedding) and m is not words]
    return min((table.num_embeddings for table in tables), default=None)
