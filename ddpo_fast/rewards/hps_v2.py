"""Which image people would prefer for a prompt, by the Human Preference Score v2 and v2.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ddpo_fast.rewards.clip import VIT_H, ClipReward, processor_beside
from ddpo_fast.rewards.open_clip_layout import OpenClipNetwork


class HpsV2(ClipReward):
    """HPS v2: the cosine of a CLIP's embeddings of an image and of its prompt.

    Range -1 to 1; images of Stable Diffusion 1.4 have about 0.27. Publications often show it times 100. Source:
    arXiv 2306.09341, a CLIP ViT-H/14 that was trained on people's rankings of a prompt's images. Licence: Apache-2.0.
    The longer edge of an image is resized to 224 pixels, and the rest of the square is black.

    Args:
        model: folder or Hub id with the file that is published, or the path of the file.
        processor: folder or Hub id of the tokenizer (default: the folder of the weights if it has one, else that of the
            CLIP that was trained on).
        device, dtype, offload, batch_size: see `ClipNetwork`.
    """

    file = "HPS_v2_compressed.pt"

    def __init__(
        self,
        *,
        model: str = "xswu/HPSv2",
        processor: str | None = None,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        offload: bool = False,
        batch_size: int = 32,
    ) -> None:
        self.clip = OpenClipNetwork(
            model,
            file=self.file,
            processor=processor or processor_beside(model, VIT_H),
            device=device,
            dtype=dtype,
            offload=offload,
            batch_size=batch_size,
        )

    def __call__(self, images: torch.Tensor, prompts: Sequence[str], metadata: Any) -> tuple[torch.Tensor, dict]:
        return self.clip.cosines(images, prompts), {}


class HpsV21(HpsV2):
    """HPS v2.1: the same network, trained on better rankings.

    Images of Stable Diffusion 1.4 have about 0.25: scores of the two versions cannot be compared.
    """

    file = "HPS_v2.1_compressed.pt"
