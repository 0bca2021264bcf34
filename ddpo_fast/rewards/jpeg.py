"""The size of an image as a JPEG: the rewards of arXiv 2305.13301, section 5.1, that need no model."""

from __future__ import annotations

import functools
import io
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image


def jpeg_incompressibility(images: torch.Tensor, prompts: Any, metadata: Any) -> tuple[torch.Tensor, dict]:
    """The size of each image as a JPEG of quality 95, in kilobytes (arXiv 2305.13301, section 5.1).

    Raises `ValueError` for images with NaN or infinity, which no file can hold.
    """
    if not images.isfinite().all():
        raise ValueError("an image has values that are not finite, of which no JPEG can be made")
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    # Pillow encodes without Python's lock
    sizes = map(_jpeg_bytes, pixels) if len(pixels) == 1 or _cores() == 1 else _threads().map(_jpeg_bytes, pixels)
    return torch.tensor([size / 1000 for size in sizes]), {}


def jpeg_compressibility(images: torch.Tensor, prompts: Any, metadata: Any) -> tuple[torch.Tensor, dict]:
    """The negative of `jpeg_incompressibility`."""
    rewards, info = jpeg_incompressibility(images, prompts, metadata)
    return -rewards, info


def _jpeg_bytes(pixels: Any) -> int:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
    return buffer.tell()


def _cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), "jpeg")
