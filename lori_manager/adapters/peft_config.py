"""The part of PEFT's `LoraConfig` that decides what an adapter computes.

Fields are refused unless proven harmless: a field that a later PEFT adds, set to
anything but nothing, is refused by name and never ignored. Read in peft 0.21:
`tuners/lora/config.py`, `tuners/lora/layer.py`, `utils/other.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lori_manager.adapters import expressions
from lori_manager.adapters.peft_format import named_by
from lori_manager.errors import ImportRefused

if TYPE_CHECKING:
    import regex

# Read below, or by the importer.
_READ = frozenset(
    {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "init_lora_weights",
        "bias",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    }
)

_HARMLESS = frozenset(
    {
        "auto_mapping",  # which class loads the base
        "peft_version",
        "revision",  # of the base; the fingerprint or the name decides
        "inference_mode",
        "lora_dropout",  # acts in training only
        "fan_in_fan_out",  # how the base's weight lies; A and B are the same either way
        "runtime_config",  # PEFT itself ignores it in a file
        # Parameters of switches that are checked themselves:
        "megatron_core",
        "qalora_group_size",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "loftq_config",
    }
)

_MERGE_FIRST = "merge it with PEFT and extract a plain LoRA, or train one without it"

# Why a field that is set cannot be imported, and what to do.
_REFUSED = {
    "modules_to_save": "it replaces whole modules of the base; train without modules_to_save",
    "trainable_token_indices": "it trains rows of the embeddings; train without it",
    "layer_replication": "it repeats layers of the base; apply it to the base first",
    "lora_bias": "B has a bias, which is no update of a weight; train with lora_bias=False",
    "target_parameters": "it updates bare parameters, not linear modules; use target_modules",
    "alora_invocation_tokens": "activated LoRA acts on some tokens only; train a plain LoRA",
    "arrow_config": "Arrow routes between several adapters; import each of them instead",
    "use_qalora": f"QA-LoRA pools the inputs of A; {_MERGE_FIRST}",
    "use_bdlora": f"BD-LoRA stores its factors as diagonal blocks; {_MERGE_FIRST}",
    "kasa_config": f"KaSA truncates the base's weights and adds a diagonal; {_MERGE_FIRST}",
    "monteclora_config": "MonteCLoRA samples its weights; train a plain LoRA",
    "velora_config": "VeLoRA stores more than A and B; train a plain LoRA",
    "megatron_config": "it belongs to Megatron's parallel layers; save it from a plain model",
    "ensure_weight_tying": "it ties adapters to the embeddings; train without it",
}

# Checked in peft 0.21 to leave the base's weights as they are.
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")
_MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class LoraSettings:
    """Rank and scaling of each module, as PEFT computes them.

    Patterns are tried in the file's order; the first that matches counts.
    """

    rank: int
    alpha: float
    rslora: bool
    dora: bool
    rank_pattern: tuple[tuple[regex.Pattern[str], int], ...]
    alpha_pattern: tuple[tuple[regex.Pattern[str], float], ...]

    def rank_of(self, module: str) -> int:
        """The module's rank."""
        found = (r for p, r in self.rank_pattern if expressions.match(p, module, "rank_pattern"))
        return next(found, self.rank)

    def scaling_of(self, module: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv:2312.03732)."""
        rank = self.rank_of(module)
        found = (a for p, a in self.alpha_pattern if expressions.match(p, module, "alpha_pattern"))
        alpha = next(found, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def lora_settings(config: Mapping[str, Any]) -> LoraSettings:
    """Check that a configuration is plain LoRA and read what it computes.

    Args:
        config: the parsed `adapter_config.json`. Not modified.
    Raises:
        ImportRefused: another method, a field that changes the mathematics or that
            is unknown here, or a value of the wrong type; one line, naming the field.
    """
    if "peft_type" not in config:
        raise ImportRefused("adapter_config.json has no peft_type: not a PEFT adapter")
    if config["peft_type"] != "LORA":
        raise ImportRefused(
            f"peft_type is {shown(config['peft_type'])}: only LORA and IA3 adapters can be imported"
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ImportRefused(
            f"task_type is {shown(config['task_type'])}: only CAUSAL_LM adapters can be imported"
        )
    for name in sorted(set(config) - _READ - _HARMLESS):
        if not config[name]:  # None, False, 0, "", [] and {}: switched off
            continue
        reason = _REFUSED.get(
            name,
            "this lori does not know what it computes; remove it from adapter_config.json "
            "if it has no effect on a trained adapter",
        )
        raise ImportRefused(f"{shown(name, 60)} is set ({shown(config[name])}): {reason}")
    if config.get("bias", "none") != "none":
        raise ImportRefused(
            f"bias is {shown(config['bias'])}: biases of the base were trained too; "
            "train with bias='none'"
        )
    _check_init(config.get("init_lora_weights", True))
    return LoraSettings(
        # PEFT's own defaults, for files that leave them out.
        rank=_rank("r", config.get("r", 8)),
        alpha=_alpha("lora_alpha", config.get("lora_alpha", 8)),
        rslora=_switch(config, "use_rslora"),
        dora=_switch(config, "use_dora"),
        rank_pattern=tuple(
            (p, _rank("rank_pattern", v)) for p, v in _patterns(config, "rank_pattern")
        ),
        alpha_pattern=tuple(
            (p, _alpha("alpha_pattern", v)) for p, v in _patterns(config, "alpha_pattern")
        ),
    )


def is_target(config: Mapping[str, Any], module: str) -> bool | None:
    """Whether PEFT would put an adapter on `module`; None where the file cannot tell.

    A tensor that the configuration does not target is ignored by PEFT but applied
    by loaders that go by the tensors.
    Raises:
        ImportRefused: a field of the wrong type or a malformed expression.
    """
    targets, excluded = _names(config, "target_modules"), _names(config, "exclude_modules")
    if targets is None or targets == "all-linear":
        return None
    if excluded and _named(excluded, module, "exclude_modules"):
        return False
    if isinstance(targets, str):
        return _named(targets, module, "target_modules")
    # A full name counts in every layer; PEFT asks for the layer after matching an ending only.
    return module in targets or (named_by(targets, module) and _in_layers(config, module))


def shown(value: object, limit: int = 80) -> str:
    """`value` for a message: on one line, without control characters, shortened."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _check_init(init: object) -> None:
    if init is None or isinstance(init, bool) or init in _HARMLESS_INITS:
        return
    name = str(init).lower()
    if not name.startswith(_MUTATING_INITS):
        raise ImportRefused(
            f"init_lora_weights is {shown(init)}: this lori does not know whether that changes "
            "the base; set it to true in adapter_config.json if it does not"
        )
    advice = (
        "merge it into the base that it was trained on"
        if name.startswith("loftq")
        else "save it again with path_initial_model_for_weight_conversion to get a plain LoRA"
    )
    raise ImportRefused(
        f"init_lora_weights is {shown(init)}: it is relative to a base that this "
        f"initialisation changed; {advice}"
    )


def _switch(config: Mapping[str, Any], field: str) -> bool:
    value = config.get(field, False)
    if not isinstance(value, bool):
        raise ImportRefused(f"{field} must be true or false, got {shown(value)}")
    return value


def _rank(field: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise ImportRefused(f"{field} must be a whole number of 1 or more, got {shown(value)}")
    return value


def _alpha(field: str, value: object) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise ImportRefused(f"{field} must be a finite number, got {shown(value)}")


def _patterns(config: Mapping[str, Any], field: str) -> list[tuple[regex.Pattern[str], object]]:
    patterns = config.get(field)
    if patterns is None:
        return []
    if not isinstance(patterns, dict):
        raise ImportRefused(f"{field} must map names to numbers, got {shown(patterns)}")
    # PEFT's get_pattern_key: a pattern stands for the last parts of a name, or all of it.
    return [
        (expressions.compiled(rf"(.*\.)?({key})$", field, key), v) for key, v in patterns.items()
    ]


def _names(config: Mapping[str, Any], field: str) -> str | list[str] | None:
    value = config.get(field)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return value
    raise ImportRefused(f"{field} must be a list of names or one expression, got {shown(value)}")


def _named(names: str | list[str], module: str, field: str) -> bool:
    if isinstance(names, str):
        pattern = expressions.compiled(names, field, names)
        return expressions.fullmatch(pattern, module, field) is not None
    return named_by(names, module)


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    layers = layers if isinstance(layers, list) else [layers]
    if not all(isinstance(n, int) for n in layers):
        raise ImportRefused(f"layers_to_transform must be layer numbers, got {shown(layers)}")
    patterns = _names(config, "layers_pattern") or []
    found = None
    for written in [patterns] if isinstance(patterns, str) else patterns:
        expression = rf"(?:^|.*?\.){written}\.(?P<idx>\d+)\."
        pattern = expressions.compiled(expression, "layers_pattern", written)
        found = found or expressions.match(pattern, module, "layers_pattern")
    if not patterns:
        # The first number in the name: a later one may count experts.
        pattern = expressions.compiled(r".*?\.[^.]*\.(?P<idx>\d+)\.", "layers_pattern", "")
        found = expressions.match(pattern, module, "layers_pattern")
    number = None if found is None else found["idx"]  # a pattern with `|` may match without it
    return number is not None and int(number) in layers
