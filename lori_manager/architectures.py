"""What a base is, by the `model_type` of its config.json: what it reads and answers with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lori_manager.errors import InvalidInput
from lori_manager.pipelines import MODEL_TYPE


@dataclass(frozen=True)
class Architecture:
    """A family of models that are taught in the same way.

    Attributes:
        title: in words. article: before it.
        auto: the transformers class that loads one; an encoder's brings a head behind it.
        encoder: whether it gives a label rather than text; each task has a head of its own.
    """

    title: str
    auto: str
    encoder: bool = True
    article: str = "a"


CAUSAL = Architecture("causal language model", "AutoModelForCausalLM", encoder=False)
TEXT_ENCODER = Architecture("text encoder", "AutoModelForSequenceClassification")
IMAGE_ENCODER = Architecture("image encoder", "AutoModelForImageClassification", article="an")
DIFFUSION = Architecture("diffusion pipeline", "", encoder=False)  # diffusers loads it

# Those whose positions begin behind the padding token's number: so many fewer tokens fit.
_SHIFTED = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta"})
_TEXT = frozenset({"albert", "bert", "deberta-v2", "distilbert", "electra", "ernie", "modernbert"})
_IMAGES = frozenset({"beit", "deit", "dinov2", "swin", "vit"})


def architecture_of(model_type: str) -> Architecture:
    """Of a model type as transformers names it; what is no known encoder is a language model."""
    if model_type == MODEL_TYPE:
        return DIFFUSION
    if model_type in _TEXT | _SHIFTED:
        return TEXT_ENCODER
    return IMAGE_ENCODER if model_type in _IMAGES else CAUSAL


def check_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json.

    Raises:
        InvalidInput: an encoder that is set up as a decoder.
    """
    kind = str(config.get("model_type", ""))
    found = architecture_of(kind)
    if found.encoder and config.get("is_decoder"):
        raise InvalidInput(
            f"this {kind} is set up as a decoder, and lori takes it as a {found.title}: set "
            "`is_decoder` to false in its config.json"
        )
    return found


def context_of(config: Mapping[str, Any]) -> int | None:
    """The longest input in tokens, None where the model has no limit."""
    found = config.get("max_position_embeddings")
    if found is None:
        return None
    shifted = config.get("model_type") in _SHIFTED
    return int(found) - (int(config.get("pad_token_id") or 0) + 1 if shifted else 0)
