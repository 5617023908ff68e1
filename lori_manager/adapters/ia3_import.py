"""The vectors of a PEFT IA3 directory, checked against the base; what they are is in `ia3.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lori_manager.adapters import expressions
from lori_manager.adapters.peft_config import is_target, shown
from lori_manager.adapters.peft_format import FLOATS, HEADS, KEY_PREFIX, last_part
from lori_manager.errors import ImportRefused

_VECTOR = re.compile(r"(?P<module>.+)\.ia3_l(?:\.(?P<adapter>[^.]+))?")
_KNOWN = frozenset(
    {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "target_modules",
        "exclude_modules",
        "feedforward_modules",
        # What does not change the mathematics of a stored adapter:
        "fan_in_fan_out",
        "init_ia3_weights",
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
    }
)


def ia3_vectors(
    config: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Any]],
    shapes: Mapping[str, tuple[int, int]],
) -> dict[str, str]:
    """What each vector scales: `module.outputs` or `module.inputs` -> tensor name.

    Args:
        config: the parsed `adapter_config.json`.
        tensors: tensor name -> dtype and shape, of the file.
        shapes: module -> (out_features, in_features) of the base's linear layers.
    Raises:
        ImportRefused: a field that this lori does not know, or a tensor that is none of
            this base's; says which.
    """
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ImportRefused(
            f"task_type is {shown(config['task_type'])}: only CAUSAL_LM adapters can be imported"
        )
    for field in sorted(set(config) - _KNOWN):
        if config[field]:
            raise ImportRefused(
                f"{shown(field, 60)} is set ({shown(config[field])}): this lori does not know "
                "what it computes; train without it"
            )
    found: dict[str, str] = {}
    adapters = set()
    for key in sorted(tensors):
        named = _VECTOR.fullmatch(key.removeprefix(KEY_PREFIX))
        if named is None:
            raise ImportRefused(f"tensor {shown(key, 120)} is not part of an IA3 adapter")
        module = named["module"]
        if last_part(module) in HEADS:
            raise ImportRefused(
                f"module {shown(module, 120)} is an output head, which may share its weights with "
                "the embeddings; train without targeting it"
            )
        if module not in shapes:
            raise ImportRefused(
                f"module {shown(module, 120)} is not a linear module of this base: "
                "import it into a workspace of its own base"
            )
        if is_target(config, module) is False:
            raise ImportRefused(
                f"module {module} has a vector, but target_modules leaves it out, so PEFT would "
                "not apply it; correct adapter_config.json or the file"
            )
        outputs, inputs = shapes[module]
        fed = _feeds(config, module)
        expected = [1, inputs] if fed else [outputs, 1]
        if tensors[key]["shape"] != expected or tensors[key]["dtype"] not in FLOATS:
            raise ImportRefused(
                f"ia3_l of module {module} is {shown(tensors[key]['dtype'])} of shape "
                f"{shown(tensors[key]['shape'])}, expected {expected} from this base and "
                f"feedforward_modules, in one of {', '.join(FLOATS)}"
            )
        adapters.add(named["adapter"])
        found[f"{module}.{'inputs' if fed else 'outputs'}"] = key
    if not found:
        raise ImportRefused("the file holds no tensors")
    if len(adapters) > 1 or len(found) < len(tensors):
        raise ImportRefused("the file holds several adapters: save each alone")
    return found


def _feeds(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT scales the module's inputs: by the ending of its name, dots or not."""
    fed = config.get("feedforward_modules") or []
    if isinstance(fed, str):
        pattern = expressions.compiled(fed, "feedforward_modules", fed)
        return expressions.fullmatch(pattern, module, "feedforward_modules") is not None
    if not isinstance(fed, list) or not all(isinstance(name, str) for name in fed):
        raise ImportRefused(f"feedforward_modules must be a list of names, got {shown(fed)}")
    return module.endswith(tuple(fed))
