"""How well an image fits its prompt, by a CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ddpo_fast.rewards.clip import ClipNetwork, ClipReward


class ClipScore(ClipReward):
    """The cosine of a CLIP's embeddings of an image and of its prompt, times 100.

    Range -100 to 100; in practice about 15 to 35. Source: CLIPScore (arXiv 2104.08718), whose
    published figures are 2.5 cosines (`scale=2.5`). Any CLIP in transformers' format can be `model`. That of OpenAI has
    the licence MIT and takes the central 224 pixels of an image whose shorter edge is resized to 224.

    Args:
        scale: what the cosine is multiplied with.
        model, device, dtype, offload, batch_size: see `ClipNetwork`.
    """

    def __init__(
        self,
        *,
        model: str = "openai/clip-vit-large-patch14",
        scale: float = 100.0,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        offload: bool = False,
        batch_size: int = 32,
    ) -> None:
        self.scale = scale
        self.clip = ClipNetwork(model, device=device, dtype=dtype, offload=offload, batch_size=batch_size)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str], metadata: Any) -> tuple[torch.Tensor, dict]:
        return self.scale * self.clip.cosines(images, prompts), {}
