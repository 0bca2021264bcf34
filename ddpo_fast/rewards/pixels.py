"""Images as bytes, for libraries and servers that do not take tensors."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image


def as_uint8(images: torch.Tensor) -> np.ndarray:
    """Images [B, 3, H, W] in [0, 1] on any device as [B, H, W, 3] in uint8, rounded; values beyond are clamped.

    Raises `ValueError` for NaN and infinity, which have no colour.
    """
    images = images.detach().float()
    if not images.isfinite().all():
        broken = (~images.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        raise ValueError(f"the images must be finite, but of {len(images)} these have NaN or infinity: {broken}")
    rounded = (images * 255).round().clamp(0, 255).to("cpu", torch.uint8)
    return rounded.permute(0, 2, 3, 1).contiguous().numpy()


def png_base64(pixels: np.ndarray) -> str:
    """One image [H, W, 3] in uint8 as the base64 text of a PNG file."""
    buffer = io.BytesIO()
    # the lightest compression: a third of the default's time, and an image is sent once
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
