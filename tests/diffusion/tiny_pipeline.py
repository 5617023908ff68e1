"""A random Stable Diffusion pipeline of a few thousand weights, and pictures for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

CLIP = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 16,
}  # fmt: skip


def make_pipeline(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Images of 16 x 16 pixels, latents of 8 x 8, two levels, cross-attention at both."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=1, **CLIP
    )
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def make_tokenizer(folder: Path):
    """CLIP's, of single letters."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    words = ["<|startoftext|>", "<|endoftext|>"]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789,.")
    words += letters + [f"{letter}</w>" for letter in letters]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=16
    )


def write_images(folder: Path, style: str, count: int, *, metadata: bool = False) -> Path:
    """Images of one colour each with noise on it; captions beside them, or in metadata.jsonl."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(sum(style.encode()))
    lines = []
    for i in range(count):
        colour = draw.integers(0, 256, 3)
        pixels = np.clip(colour + draw.normal(0, 20, (20, 24, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
        caption = f"a {style} picture {i % 3}"
        lines.append(json.dumps({"file_name": f"{i:02}.png", "text": caption}))
        if not metadata:
            (folder / f"{i:02}.txt").write_text(caption + "\n", encoding="utf-8")
    if metadata:
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
