"""Diffusers pipelines of the Stable Diffusion kind: their parts, files, and bare UNet.

A pipeline is a folder with `model_index.json`, which names a class for every part, and a
folder a part. Adapters act on the UNet; the VAE, the text encoder with its tokenizer and the
scheduler say what it is trained and scored on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lori_manager import foreign
from lori_manager.errors import InvalidInput, NotFound
from lori_manager.extras import check_extra

if TYPE_CHECKING:
    from torch import nn

INDEX = "model_index.json"
MODEL_TYPE = "stable-diffusion"
EXTRA = "diffusion"
CROSS_ATTENTION = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
# Where a workspace on a pipeline differs from the defaults: an image is much more work than a
# row of text, and sets of images are small.
DEFAULTS: dict[str, Any] = {
    "targets": CROSS_ATTENTION, "batch": 4, "steps": 500, "score_batch": 16,
}  # fmt: skip
# Part -> the class that it must be, None where any will do.
_PARTS: dict[str, str | None] = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": None,
    "scheduler": None,
}
_WEIGHTED = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
             "text_encoder": "model"}  # fmt: skip
_NO_MATTER = {"_diffusers_version", "_name_or_path", "transformers_version", "dtype", "torch_dtype"}
HUB_FILES = [INDEX, *(f"{part}/*.json" for part in _PARTS), "tokenizer/*.txt",
             *(f"{part}/{stem}*.safetensors" for part, stem in _WEIGHTED.items())]  # fmt: skip
HUB_VARIANTS = ["*.fp16.*", "*.non_ema.*"]


def is_pipeline(folder: Path) -> bool:
    """Whether the folder is a diffusers pipeline, of whatever kind."""
    return (folder / INDEX).is_file()


def check_pipeline(folder: Path) -> None:
    """Refuse a pipeline that is not of the Stable Diffusion kind.

    Raises:
        NotFound: its index is unreadable, or a part is missing.
        InvalidInput: a part of another class, or a second text encoder.
    """
    index = _json(folder / INDEX)
    if "text_encoder_2" in index or "image_encoder" in _used(index):
        raise InvalidInput(
            f"{folder} is a {index.get('_class_name')}: lori takes pipelines of the Stable "
            "Diffusion kind, with one text encoder and no image encoder"
        )
    for part, wanted in _PARTS.items():
        found = index.get(part)
        name = found[1] if isinstance(found, list) and len(found) == 2 else None
        if name is None or not (folder / part).is_dir():
            raise NotFound(f"{folder} lacks the part {part!r}: fetch the whole pipeline")
        if wanted is not None and name != wanted:
            raise InvalidInput(f"part {part!r} of {folder} is a {name}: expected a {wanted}")
    latent, seen = unet_config(folder).get("in_channels"), _vae(folder).get("latent_channels")
    if latent != seen:
        raise InvalidInput(
            f"the UNet of {folder} takes {latent} channels and its VAE makes {seen}: pipelines "
            "that see more than the noisy image (inpainting, depth) cannot be trained here"
        )


def _used(index: dict[str, Any]) -> set[str]:
    return {part for part, found in index.items() if isinstance(found, list) and any(found)}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the parts that hold weights, without their variants.

    Raises:
        NotFound: a part has none. Pickled weights are never loaded.
    """
    return [file for part, stem in _WEIGHTED.items() for file in _part_files(folder / part, stem)]


def _part_files(part: Path, stem: str) -> list[Path]:
    index = part / f"{stem}.safetensors.index.json"
    if index.is_file():
        try:
            files = named_files(index)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise NotFound(
                f"{index} is not an index of safetensors files beside it: fetch it again"
            ) from e
    else:
        files = [part / f"{stem}.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        what = f"lacks {missing[0]}" if missing else "names no files"
        raise NotFound(
            f"{part} {what}: save the pipeline with `save_pretrained(folder)`, which writes "
            "safetensors in full"
        )
    return files


def named_files(index: Path) -> list[Path]:
    """The files that a safetensors index names, which must stand beside it.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, OSError: it is no such index.
    """
    names = sorted(set(foreign.read_json(index)["weight_map"].values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or not name.isprintable():
            raise ValueError(f"{name!r} is no file beside it")
    return [index.parent / name for name in names]


def reading_digest(folder: Path) -> str:
    """SHA-256 of what beside the weights decides an outcome: configurations and tokenizer."""
    h = hashlib.sha256(MODEL_TYPE.encode())
    for path in _settings(folder):
        content = path.read_bytes()
        if path.name.endswith("config.json"):
            kept = {k: v for k, v in _json(path).items() if k not in _NO_MATTER}
            content = json.dumps(kept, sort_keys=True).encode()
        name = path.relative_to(folder).as_posix()
        h.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return h.hexdigest()


def _settings(folder: Path) -> Iterator[Path]:
    for part in _WEIGHTED:
        yield folder / part / "config.json"
    for part in ("scheduler", "tokenizer"):
        yield from sorted(p for p in (folder / part).iterdir() if p.is_file())


def unet_config(folder: Path) -> dict[str, Any]:
    """The UNet's configuration."""
    return _json(folder / "unet" / "config.json")


def _vae(folder: Path) -> dict[str, Any]:
    return _json(folder / "vae" / "config.json")


def resolution(folder: Path) -> int:
    """Height and width in pixels of the images that the pipeline was made for.

    Raises:
        InvalidInput: its UNet does not say.
    """
    size = unet_config(folder).get("sample_size")
    if not isinstance(size, int) or size < 1:
        raise InvalidInput(f"the UNet of {folder} names no `sample_size`, or none that is square")
    halved = len(_vae(folder).get("block_out_channels", [0])) - 1
    return size << halved


def check_library(what: str) -> None:
    """InvalidInput where diffusers or Pillow is not installed."""
    for module in ("diffusers", "PIL"):
        check_extra(module, EXTRA, what)


def bare_unet(folder: Path) -> nn.Module:
    """The UNet's modules on the meta device."""
    check_library("a diffusion pipeline")
    import diffusers
    import torch

    kind: Any = diffusers.UNet2DConditionModel
    with torch.device("meta"):
        unet: nn.Module = kind.from_config(unet_config(folder))
    return unet


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise NotFound(f"{path} is not readable JSON: {e}") from e
    if not isinstance(found, dict):
        raise NotFound(f"{path} is not a JSON object")
    return found
