"""Bottleneck adapters: a small network behind sublayers, y + up(f(down(y))).

Houlsby et al. (arXiv:1902.00751) put one behind the attention and one behind the feed-forward
of every layer, Pfeiffer et al. (arXiv:2005.00247) the latter alone. Both before the sublayer's
output joins the residual stream, and before anything scales it (BEiT, DINOv2). Layer norms stay
frozen, and none is added; `up` begins at zero and not near it, so that training begins at the
base to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lori_manager.adapters.kind import Training, own_start
from lori_manager.adapters.own_form import write_own
from lori_manager.config import Config
from lori_manager.engine.layers import attached, linear_shape
from lori_manager.engine.weights import KindWeights, Stored
from lori_manager.errors import InvalidInput, WrongBase
from lori_manager.models import BaseModel

KIND = "bottleneck"
PLACEMENTS = ("houlsby", "pfeiffer")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh,
}  # fmt: skip
PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")

# Where a layer keeps the last linear of its attention and its feed-forward, by architecture.
ATTENTION = (
    "self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "attn.c_proj", "attn.out_proj",
    "attention.dense", "attention.wo", "self_attention.dense",
    # of encoders
    "attention.output.dense", "attention.o_proj", "attention.out_lin", "attention.attn.o",
    "attn.Wo",
)  # fmt: skip
FEED_FORWARD = ("mlp", "feed_forward", "block_sparse_moe", "output.dense", "ffn.lin2")


class Bottleneck(nn.Module):
    """y + up(f(down(y))) of what a module gives; float32 parameters, products in y's dtype.

    Shapes: y (..., features), down.weight (width, features), up.weight (features, width).
    """

    def __init__(self, base: nn.Module, values: Mapping[str, Tensor], activation: str) -> None:
        super().__init__()
        width, features = values["down.weight"].shape
        self.base = base
        self.activation = ACTIVATIONS[activation]
        self.down = nn.Linear(features, width, device="meta")  # nothing is drawn
        self.up = nn.Linear(width, features, device="meta")
        for part in PARTS:
            linear, _, which = part.partition(".")
            setattr(self.get_submodule(linear), which, nn.Parameter(values[part].clone()))

    def parts(self) -> dict[str, nn.Parameter]:
        """Its own parameters, by the names of `PARTS`."""
        return {part: self.get_parameter(part) for part in PARTS}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the module gives, and on top what the network makes of it."""
        y: Tensor = self.base(*args, **kwargs)
        down, down_bias, up, up_bias = (p.to(y.dtype) for p in self.parts().values())
        return y + F.linear(self.activation(F.linear(y, down, down_bias)), up, up_bias)


@contextmanager
def training(
    base: BaseModel, config: Config, *, steps: int, start: Stored | None = None
) -> Iterator[Training]:
    """See `KindModule`.

    Options: `placement`, "houlsby" or "pfeiffer"; `reduction`, the model's width over that of
    the small networks; `activation`, f: "relu", "gelu", "silu" or "tanh".
    """
    options = {key: config.kind_options[key] for key in ("placement", "reduction", "activation")}
    _check_options(options)
    places = find_places(base.model, options["placement"])
    begun = own_start(KIND, start)
    if begun is None:
        tensors = _fresh(places, options["reduction"], config.seed)
    else:
        if dict(begun.options) != options:
            raise InvalidInput(
                f"the parent's options are {dict(begun.options)}, this training's {options}: give "
                "the parent's, or leave --from out"
            )
        check(base.model, begun)
        tensors = {name: t.float() for name, t in begun.tensors.items()}
    layers = _layers(base, tensors, list(places), options["activation"])
    parameters = {
        f"{name}.{part}": parameter
        for name, layer in layers.items()
        for part, parameter in layer.parts().items()
    }

    def weights(dtype: torch.dtype) -> KindWeights:
        kept = {n: p.detach().to("cpu", dtype).contiguous() for n, p in parameters.items()}
        return KindWeights(KIND, options, kept)

    with attached(base.model, layers):
        yield Training(parameters, weights)


@contextmanager
def applied(base: BaseModel, weights: KindWeights) -> Iterator[None]:
    """See `KindModule`.

    Raises:
        WrongBase: the adapter is of another model.
    """
    check(base.model, weights)
    places = find_places(base.model, weights.options["placement"])
    layers = _layers(base, weights.tensors, list(places), weights.options["activation"])
    for layer in layers.values():
        for parameter in layer.parts().values():
            parameter.requires_grad_(False)
    with attached(base.model, layers):
        yield


def write(weights: KindWeights, directory: Path, told: Mapping[str, Any]) -> None:
    """See `KindModule`: the form of `own_form`."""
    write_own(weights, directory, told)


def check(model: nn.Module, weights: KindWeights) -> None:
    """Refuse what does not fit the model, which may be on the meta device.

    Raises:
        WrongBase: options or tensors are not those of an adapter of this model.
    """
    try:
        _check_options(weights.options)
        places = find_places(model, weights.options["placement"])
        expected = {
            f"{name}.{part}": shape
            for name, features in places.items()
            for part, shape in _shapes(features, weights.options["reduction"]).items()
        }
    except (InvalidInput, KeyError) as e:
        raise WrongBase(f"this bottleneck adapter fits no {type(model).__name__}: {e}") from e
    found = {name: tuple(t.shape) for name, t in weights.tensors.items()}
    if found != expected:
        odd = sorted(dict(expected.items() ^ found.items()))[0]
        raise WrongBase(
            f"tensor {odd[:120]!r} of this bottleneck adapter is {found.get(odd, 'missing')}, this "
            f"{type(model).__name__} has {expected.get(odd, 'no such place')}: it was made for "
            "another model"
        )


def find_places(model: nn.Module, placement: str) -> dict[str, int]:
    """Name of the module that a small network goes behind -> how many features it gives.

    Raises:
        InvalidInput: a layer whose sublayers have other names than those that are known.
    """
    count = int(model.config.get_text_config().num_hidden_layers)  # type: ignore[operator,union-attr]
    stacks = [(name, m) for name, m in model.named_modules()
              if isinstance(m, nn.ModuleList) and len(m) == count]  # fmt: skip
    if len(stacks) != 1:
        raise InvalidInput(
            f"bottleneck adapters need a model with one list of {count} layers, and this "
            f"{type(model).__name__} has {len(stacks)}"
        )
    (stack, layers), *_ = stacks
    width = int(model.config.get_text_config().hidden_size)  # type: ignore[operator,union-attr]
    wanted = (ATTENTION, FEED_FORWARD) if placement == "houlsby" else (FEED_FORWARD,)
    places = {}
    for number, layer in enumerate(layers):
        inside = dict(layer.named_modules())
        for names in wanted:
            found = next((name for name in names if name in inside), None)
            shape = None if found is None else linear_shape(inside[found])
            if found is None or (shape is not None and shape[0] != width):
                held = ", ".join(name for name, _ in layer.named_children())
                raise InvalidInput(
                    f"bottleneck adapters go behind one of {', '.join(names)}, and a layer of this "
                    f"{type(model).__name__} holds {held}"
                )
            places[f"{stack}.{number}.{found}"] = width
    return places


def _check_options(options: Mapping[str, Any]) -> None:
    if (
        set(options) != {"placement", "reduction", "activation"}
        or not all(isinstance(options[key], str) for key in ("placement", "activation"))
        or options["placement"] not in PLACEMENTS
        or options["activation"] not in ACTIVATIONS
        or type(options["reduction"]) is not int
        or options["reduction"] < 1
    ):
        raise InvalidInput(
            f"kind `{KIND}` wants `placement` of {', '.join(PLACEMENTS)}, `activation` of "
            f"{', '.join(ACTIVATIONS)} and `reduction` of at least 1, got "
            f"{str(dict(options))[:200]}"
        )


def _shapes(features: int, reduction: int) -> dict[str, tuple[int, ...]]:
    width = max(1, features // reduction)
    return dict(zip(PARTS, ((width, features), (width,), (features, width), (features,)),
                    strict=True))  # fmt: skip


def _fresh(places: Mapping[str, int], reduction: int, seed: int) -> dict[str, Tensor]:
    """`down` uniform in +-1/sqrt(features), as torch's own linear layers; all else zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, features in places.items():
        for part, shape in _shapes(features, reduction).items():
            tensors[f"{name}.{part}"] = torch.zeros(shape)
        down = tensors[f"{name}.down.weight"]
        down.uniform_(-1 / math.sqrt(features), 1 / math.sqrt(features), generator=generator)
    return tensors


def _layers(
    base: BaseModel, tensors: Mapping[str, Tensor], names: list[str], activation: str
) -> dict[str, Bottleneck]:
    return {
        name: Bottleneck(
            base.model.get_submodule(name),
            {part: tensors[f"{name}.{part}"].to(base.device, torch.float32) for part in PARTS},
            activation,
        )
        for name in names
    }
