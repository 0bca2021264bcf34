"""An exponential moving average of the trained weights, which often draws better images than the last update does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class EMA:
    """`average = decay * average + (1 - decay) * weight` after every update, in fp32.

    Args:
        weights: what is averaged; the averages start as copies of them.
        on_host: keep the averages in host memory.
    """

    def __init__(self, weights: Sequence[Tensor], decay: float, on_host: bool = False) -> None:
        self.decay = decay
        self.averages = [
            weight.detach().to("cpu" if on_host else weight.device, torch.float32, copy=True) for weight in weights
        ]

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], skipped: Tensor | None = None) -> None:
        """Adds the weights after an update to the averages.

        Args:
            skipped: [] bool on the device: whether the update was left out, and the averages stay as they are. A tensor
                and not a Python bool, so that nothing waits for the device to know it.
        """
        share: Any = 1 - self.decay if skipped is None else torch.where(skipped, 0.0, 1 - self.decay)
        for weight, average in zip(weights, self.averages, strict=True):
            # one weight at a time: fp32 copies of all of them together would take as much memory as the averages
            weight_fp32 = weight.detach().to(average.device, torch.float32)
            # lerp: average + share * (weight - average), which is the formula above in one kernel
            average.lerp_(weight_fp32, share.to(average.device) if isinstance(share, Tensor) else share)

    @torch.no_grad()
    def set(self, values: Sequence[Tensor]) -> None:
        """Replaces the averages, by values of as many elements each."""
        for average, value in zip(self.averages, values, strict=True):
            average.copy_(value.view(average.shape))
