"""Images as a CLIP takes them, made on the images' device by torch alone.

The published processors work on 8-bit images through Pillow. The resizing filter here is the same, in fp32 and without
rounding to 8 bits, so that a pixel differs from theirs by about one of 255 steps at most.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

# OpenAI's, which most CLIPs keep
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# Pillow's number of its bicubic filter
BICUBIC = 3


@dataclass(frozen=True)
class ImageFormat:
    """The images that a CLIP takes.

    Args:
        resize: the edge that an image is resized to, in pixels: the shorter one, or with `pads` the longer one.
        size: height and width of the square that is cut out of the centre, or with `pads` filled up with black.
        mean, std: of the three colours, subtracted and divided by.
    """

    resize: int
    size: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    pads: bool = False

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, size, size] in fp32 of images [B, 3, H, W] in [0, 1]. NaN stays NaN."""
        height, width = images.shape[-2:]
        short, long = sorted((height, width))
        if self.pads:
            edges = (round(height * self.resize / long), round(width * self.resize / long))
        else:
            # rounded down, as by transformers
            edges = (self.resize * height // short, self.resize * width // short)
        edges = max(edges[0], 1), max(edges[1], 1)
        # The width first, as Pillow does. The filter overshoots at edges, which 8-bit images do not keep.
        for part in ((height, edges[1]), edges):
            images = functional.interpolate(images.float(), part, mode="bicubic", antialias=True).clamp(0, 1)
        images = self._padded(images, *edges) if self.pads else self._cropped(images, *edges)
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std

    def _padded(self, images: torch.Tensor, height: int, width: int) -> torch.Tensor:
        left, top = (self.size - width) // 2, (self.size - height) // 2
        return functional.pad(images, (left, self.size - width - left, top, self.size - height - top))

    def _cropped(self, images: torch.Tensor, height: int, width: int) -> torch.Tensor:
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return images[..., top : top + self.size, left : left + self.size]


def read_image_format(path: Path) -> ImageFormat:
    """The format in a `preprocessor_config.json` or, as transformers 5 writes it, a `processor_config.json`.

    Raises `ValueError` for any other preprocessing than a resized shorter edge, a central square, and normalisation.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found = found.get("image_processor", found)
        steps = [found.get(f"do_{step}", True) for step in ("resize", "center_crop", "rescale", "normalize")]
        if not all(steps) or found.get("resample", BICUBIC) != BICUBIC:
            raise ValueError("it leaves out a step or has another resizing filter than the bicubic one")
        size, crop = found.get("size", 224), found.get("crop_size", 224)
        image_format = ImageFormat(
            size if isinstance(size, int) else size["shortest_edge"],
            _edge(crop),
            _colours(found.get("image_mean", MEAN)),
            _colours(found.get("image_std", STD)),
        )
        if not 0 < image_format.size <= image_format.resize:
            raise ValueError(f"it cuts {image_format.size} pixels out of {image_format.resize}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is not the image preprocessing of a CLIP ({error})") from error
    return image_format


def _edge(size: Any) -> int:
    if isinstance(size, int):
        return size
    if size["height"] != size["width"]:
        raise ValueError(f"its crop_size is {size}, which is not square")
    return size["height"]


def _colours(values: Any) -> tuple[float, ...]:
    red, green, blue = map(float, values)
    return red, green, blue
