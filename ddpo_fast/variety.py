"""How varied an epoch's rewards and images are: a policy that collapses draws ever more similar images of a prompt.

Shapes: B images of a process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

# images are compared at this size, in pixels: what differs is then their content and not their noise
LARGEST_SIDE = 32


def reward_spread(prompts: Sequence[str], rewards: np.ndarray) -> float:
    """The standard deviation of a prompt's rewards, averaged over the prompts; of all rewards [B] if none has two."""
    names = np.asarray(prompts, dtype=object)
    repeated = _repeated(prompts)
    if not repeated:
        return float(rewards.std())
    return float(np.mean([rewards[names == prompt].std() for prompt in repeated]))


@torch.no_grad()
def image_spread(prompts: Sequence[str], batches: Sequence[Any]) -> Tensor | None:
    """The mean distance of two images of the same prompt, []; of any two if no prompt has two images.

    The distance is the root mean square of the differences of the pixels, from 0 to 1, of images that are averaged down
    to at most `LARGEST_SIDE` a side. It stays on the device, and the host does not wait for it.

    Args:
        batches: images [n, 3, height, width] in [0, 1], which together are those of the `prompts`, B.

    Returns None for less than two images, or if they are no tensors.
    """
    if len(prompts) < 2 or not all(isinstance(batch, Tensor) and batch.dim() == 4 for batch in batches):
        return None
    device = batches[0].device
    small = torch.cat([_shrunk(batch).flatten(1) for batch in batches])
    # by differences: through a matrix product, distances near 0 would be lost to rounding
    distances = torch.cdist(small, small, compute_mode="donot_use_mm_for_euclid_dist") / small.shape[1] ** 0.5
    numbers = np.unique(np.asarray(prompts, dtype=str), return_inverse=True)[1]
    pairs = np.triu(np.ones((len(prompts), len(prompts)), dtype=bool), k=1)
    if _repeated(prompts):
        pairs &= numbers[:, None] == numbers
    chosen = torch.from_numpy(pairs).to(device, non_blocking=True)
    return (distances * chosen).sum() / int(pairs.sum())


def _shrunk(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    return adaptive_avg_pool2d(images.float(), (min(height, LARGEST_SIDE), min(width, LARGEST_SIDE)))


def _repeated(prompts: Sequence[str]) -> list[str]:
    """The prompts that occur twice or more."""
    counts: dict[str, int] = {}
    for prompt in prompts:
        counts[prompt] = counts.get(prompt, 0) + 1
    return [prompt for prompt, count in counts.items() if count > 1]
