"""Images out of a pipeline, by diffusers' own sampling, from noise that a seed decides."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

import torch

from lori_manager import pipelines
from lori_manager.diffusion.noise import normals
from lori_manager.diffusion.pipeline import DiffusionBase
from lori_manager.errors import InvalidInput

if TYPE_CHECKING:
    from PIL.Image import Image


class Painter:
    """Paints prompts with the UNet as it is at the time, adapter layers included.

    Captions are encoded and latents are decoded in float32, as in training.
    """

    def __init__(self, base: DiffusionBase, *, steps: int, guidance: float, seed: int) -> None:
        """Put diffusers' pipeline together around the base's UNet.

        Args:
            steps: of the pipeline's own scheduler.
            guidance: classifier-free; 1 is off.
            seed: of the noise that an image starts from, and of what the scheduler adds.
        """
        import diffusers

        kind: Any = diffusers.StableDiffusionPipeline
        self._base, self._steps, self._guidance, self._seed = base, steps, guidance, seed
        self._pipe = kind(
            vae=None,
            text_encoder=None,
            tokenizer=base.tokenizer,
            unet=base.model,
            scheduler=_scheduler(base),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self._pipe.set_progress_bar_config(disable=True)

    def paint(self, prompt: str, number: int = 0) -> Image:
        """One image.

        Args:
            number: of the noise: the same number and seed start from the same.
        """
        base = self._base
        config = base.model.config
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        start = normals(f"{self._seed}|sample|{number}", shape)
        with torch.inference_mode():
            latents = self._pipe(
                prompt_embeds=base.texts([prompt]).to(base.device),
                negative_prompt_embeds=base.texts([""]).to(base.device),
                latents=start.to(base.device, base.dtype),
                generator=torch.Generator("cpu").manual_seed(self._seed + number),
                num_inference_steps=self._steps,
                guidance_scale=self._guidance,
                output_type="latent",
            ).images
        return base.decoded(latents)


def _scheduler(base: DiffusionBase) -> Any:
    """The scheduler that the pipeline's index names."""
    import diffusers

    mixin: Any = diffusers.SchedulerMixin
    index = json.loads((base.folder / pipelines.INDEX).read_text("utf-8"))
    kind: Any = getattr(diffusers, str(index["scheduler"][1]), None)
    if not (inspect.isclass(kind) and issubclass(kind, mixin)):
        raise InvalidInput(f"{base.folder} names no scheduler that diffusers has")
    known: Any = kind
    return known.from_pretrained(base.folder, subfolder="scheduler")
