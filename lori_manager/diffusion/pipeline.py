"""A loaded pipeline: the frozen UNet that adapters act on, and what makes its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lori_manager import pipelines
from lori_manager.engine.frozen import freeze_convolutions
from lori_manager.errors import InvalidInput, NotFound, first_line
from lori_manager.models import best_device, linear_shapes, resolve_precision
from lori_manager.tasks.images import Picture, load_image

if TYPE_CHECKING:
    from PIL.Image import Image

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PREDICTIONS = ("epsilon", "v_prediction")
AT_ONCE = 4  # images that the VAE encodes together


@dataclass
class DiffusionBase:
    """A frozen UNet with the parts around it; the others are loaded when they are needed.

    Attributes:
        model: the UNet, in eval mode, nothing requiring gradients.
        folder: the pipeline's.
        precision: "fp32" or "bf16", of the UNet's weights. The VAE and the text encoder
            work in float32, once an image and a caption.
        base_bits: always 16.
    """

    model: Any
    folder: Path
    precision: str
    base_bits: int = 16
    _latents: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _texts: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of the UNet's weights and inputs."""
        return DTYPES[self.precision]

    @property
    def decoder(self) -> Any:
        """What runs in training: the UNet."""
        return self.model

    @cached_property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Full name in the UNet -> (out_features, in_features) of every linear layer."""
        return linear_shapes(self.model)

    @cached_property
    def size(self) -> int:
        """Height and width of its images, pixels."""
        return pipelines.resolution(self.folder)

    @cached_property
    def scheduler(self) -> Any:
        """The forward process of the pipeline's scheduler (DDPM, arXiv:2006.11239).

        Raises:
            InvalidInput: its UNet predicts neither noise nor velocity.
        """
        import diffusers

        kind: Any = diffusers.DDPMScheduler
        made = kind.from_pretrained(self.folder, subfolder="scheduler")
        if (predicts := made.config.prediction_type) not in PREDICTIONS:
            raise InvalidInput(
                f"the UNet of {self.folder} predicts {predicts!r}: expected "
                + " or ".join(PREDICTIONS)
            )
        return made

    @cached_property
    def tokenizer(self) -> Any:
        """The text encoder's."""
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self.folder, subfolder="tokenizer")

    @cached_property
    def text_encoder(self) -> Any:
        """float32, on the CPU or the UNet's GPU."""
        from transformers import CLIPTextModel

        found: Any = CLIPTextModel
        return self._loaded(found, "text_encoder")

    @cached_property
    def vae(self) -> Any:
        """float32, where the UNet is."""
        from diffusers import AutoencoderKL

        return self._loaded(AutoencoderKL, "vae")

    def _loaded(self, kind: Any, part: str) -> Any:
        model = load_part(kind, self.folder, part, torch.float32)
        return model.to(self.device)

    def release(self) -> None:
        """Let go of VAE and text encoder until they are needed again."""
        for part in ("vae", "text_encoder"):
            self.__dict__.pop(part, None)

    def probe(self) -> None:
        """Run the UNet once on the smallest input that it takes, for hooks to see it at work."""
        side = 2 ** (len(self.model.config.block_out_channels) - 1)
        channels = self.model.config.in_channels
        options: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        x = torch.zeros(1, channels, side, side, **options)
        text = torch.zeros(1, 2, self._text_width, **options)
        self.predict(x, torch.zeros(1, dtype=torch.long, device=self.device), text)

    @cached_property
    def _text_width(self) -> int:
        width = self.model.config.cross_attention_dim
        return int(width if isinstance(width, int) else width[0])

    def predict(self, noisy: Tensor, at: Tensor, texts: Tensor) -> Tensor:
        """The UNet's prediction, in its own dtype.

        Shapes: noisy (n, channels, h, w), at (n,) int64 timesteps, texts (n, tokens, width).
        """
        out: Tensor = self.model(
            noisy.to(self.dtype), at, encoder_hidden_states=texts.to(self.dtype), return_dict=False
        )[0]
        return out

    def latents(self, pictures: Sequence[Picture]) -> Tensor:
        """(n, channels, h, w) float32 on the CPU: the means that the VAE gives, scaled.

        Each image goes through it once. Differs from diffusers' training scripts, which draw
        around the mean anew at every step.
        """
        new = {p.digest: p for p in pictures if p.digest not in self._latents}
        numbers = list(new.values())
        for i in range(0, len(numbers), AT_ONCE):
            part = numbers[i : i + AT_ONCE]
            pixels = np.stack([load_image(p.read(), self.size) for p in part])
            x = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.no_grad():
                mean = self.vae.encode(x).latent_dist.mode()
            made = (mean * self.vae.config.scaling_factor).cpu()
            self._latents |= {p.digest: m.clone() for p, m in zip(part, made, strict=True)}
        return torch.stack([self._latents[p.digest] for p in pictures])

    def decoded(self, latents: Tensor) -> Image:
        """The image that latents (1, channels, h, w) stand for."""
        from PIL import Image as Images

        with torch.no_grad():
            pixels = self.vae.decode(latents.float() / self.vae.config.scaling_factor).sample[0]
        levels = (pixels * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        return Images.fromarray(levels.permute(1, 2, 0).cpu().numpy())

    def texts(self, captions: Sequence[str]) -> Tensor:
        """(n, tokens, width) in the UNet's dtype on the CPU; each caption is encoded once.

        What is longer than the text encoder reads is cut at its end.
        """
        new = list(dict.fromkeys(c for c in captions if c not in self._texts))
        for i in range(0, len(new), 16):
            part = new[i : i + 16]
            told = self.tokenizer(
                part,
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            with torch.no_grad():
                found = self.text_encoder(told.input_ids.to(self.device))[0]
            made = found.to(self.dtype).cpu()
            self._texts |= {c: m.clone() for c, m in zip(part, made, strict=True)}
        return torch.stack([self._texts[c] for c in captions])


def load_part(kind: Any, folder: Path, part: str, dtype: torch.dtype) -> Any:
    """A part of the pipeline from its safetensors, frozen, in eval mode.

    Raises:
        NotFound: it cannot be loaded.
    """
    names = {"dtype": dtype} if kind.__module__.startswith("transformers") else {
        "torch_dtype": dtype
    }  # fmt: skip
    try:
        model = kind.from_pretrained(folder, subfolder=part, use_safetensors=True, **names)
    except (OSError, ValueError) as e:
        raise NotFound(f"{folder} holds no usable {part}: {first_line(e)}") from e
    model.requires_grad_(False)
    return model.eval()


def check_precision(precision: str, base_bits: int) -> None:
    """InvalidInput for what is for language models alone; `precision` is a resolved one."""
    if precision not in DTYPES or base_bits != 16:
        known = precision in DTYPES
        asked = f"`base_bits` {base_bits}" if known else f"`precision` {precision}"
        raise InvalidInput(f"{asked} needs a language model: a UNet is fp32 or bf16, of 16 bits")


def load_pipeline(
    folder: Path, precision: str = "auto", device: str | None = None, base_bits: int = 16
) -> DiffusionBase:
    """Load the pipeline's UNet frozen, on the best device there is.

    Args:
        folder: the pipeline's.
        precision: "auto" (bf16 on an accelerator that has it, else fp32), "fp32" or "bf16".
        device: "cpu", "cuda", "mps"; None chooses by itself.
        base_bits: 16.
    Raises:
        InvalidInput: another precision or other bits, diffusers is not installed.
        NotFound: no UNet there.
    """
    pipelines.check_library("a diffusion pipeline")
    precision = resolve_precision(precision)
    check_precision(precision, base_bits)
    from diffusers import UNet2DConditionModel

    device = device or best_device()
    model: nn.Module = load_part(UNet2DConditionModel, folder, "unet", DTYPES[precision])
    if device == "cuda":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = model.to(device)
    freeze_convolutions(model)
    return DiffusionBase(model, folder, precision)
