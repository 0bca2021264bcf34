"""The size of an image as a JPEG: the rewards of arXiv 2305.13301, section 5.1, that need no model."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image


def jpeg_incompressibility(images: torch.Tensor, prompts: Any, metadata: Any) -> tuple[torch.Tensor, dict]:
    """The size of each image as a JPEG of quality 95, in kilobytes (arXiv 2305.13301, section 5.1)."""
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    return torch.tensor([_jpeg_bytes(image) / 1000 for image in pixels]), {}


def jpeg_compressibility(images: torch.Tensor, prompts: Any, metadata: Any) -> tuple[torch.Tensor, dict]:
    """The negative of `jpeg_incompressibility`."""
    rewards, info = jpeg_incompressibility(images, prompts, metadata)
    return -rewards, info


def _jpeg_bytes(pixels: Any) -> int:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
    return buffer.tell()
