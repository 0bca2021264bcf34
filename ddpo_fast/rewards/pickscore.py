"""Which image people would prefer for a prompt, by PickScore."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ddpo_fast.rewards.clip import VIT_H, ClipNetwork, ClipReward, processor_beside


class PickScore(ClipReward):
    """A CLIP's cosine of an image with its prompt times the factor of its training, about 100.

    Range -100 to 100; images of Stable Diffusion 1.5 have about 21. Some publications divide it by 26. Source:
    Pick-a-Pic (arXiv 2305.01569), a CLIP ViT-H/14 that was trained on choices between two images of a prompt. Licence:
    MIT. It takes the central 224 pixels of an image whose shorter edge is resized to 224.

    Args:
        model: folder or Hub id of the weights.
        processor: folder or Hub id of the tokenizer and the image preprocessing, which are published apart from the
            weights (default: the folder `model` if they were copied there, else those of the CLIP that was trained on).
        device, dtype, offload, batch_size: see `ClipNetwork`.
    """

    def __init__(
        self,
        *,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = None,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        offload: bool = False,
        batch_size: int = 32,
    ) -> None:
        self.clip = ClipNetwork(
            model,
            processor=processor or processor_beside(model, VIT_H),
            device=device,
            dtype=dtype,
            offload=offload,
            batch_size=batch_size,
        )

    def __call__(self, images: torch.Tensor, prompts: Sequence[str], metadata: Any) -> tuple[torch.Tensor, dict]:
        return math.exp(self.clip.logit_scale) * self.clip.cosines(images, prompts), {}
