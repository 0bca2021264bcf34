"""A pipeline of Stable Diffusion 1.5's size with random weights, for machines that cannot download the original."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from ddpo_fast.ops.extension import private_cache
from ddpo_fast.tiny_sd import MODEL as BUNDLED

TOKENS = 77


def default_model(device: str, size: str) -> Path:
    """The folder of the bundled model on a CPU or at tiny size, else of one of Stable Diffusion 1.5's size."""
    return sd15(device) if device == "cuda" and size == "full" else BUNDLED


def sd15(device: str) -> Path:
    """The folder of the random pipeline, which the first call makes in the cache of compiled ops."""
    cache = private_cache()
    folder = cache / "sd15_random"
    if not folder.exists():
        made = Path(tempfile.mkdtemp(dir=cache))
        # half precision, in which the original is usually downloaded
        make_sd15(device).to("cpu", torch.float16).save_pretrained(made)
        try:
            made.rename(folder)
        except OSError:
            # another process has made it meanwhile
            shutil.rmtree(made)
    return folder


def make_sd15(device: str) -> Any:
    """The pipeline, in fp32 on a device; on `meta` it has shapes and no values."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from ddpo_fast.tiny_sd.build import pipeline

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer", model_max_length=TOKENS)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=TOKENS,
        **special,
    )
    with torch.device(device):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=768,
            attention_head_dim=8,
            sample_size=64,
            layers_per_block=2,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            latent_channels=4,
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            sample_size=512,
        )
        text_encoder = CLIPTextModel(text)
    return pipeline(vae, text_encoder, tokenizer, unet)
