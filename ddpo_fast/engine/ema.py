"""An exponential moving average of the trained weights, which often gives better images than the last weights do."""

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
        """Updates the averages with the weights after an update.

        Args:
            skipped: [] bool on the device: True if the optimizer skipped the update; the averages then do not change. A
                tensor and not a Python bool, so that the host need not wait for the device.
        """
        share: Any = 1 - self.decay if skipped is None else torch.where(skipped, 0.0, 1 - self.decay)
        for weight, average in zip(weights, self.averages, strict=True):
            # one weight at a time: fp32 copies of all of them together would take as much memory as the averages
            weight_fp32 = weight.detach().to(average.device, torch.float32)
            # lerp: average + share * (weight - average), which is the formula above in one kernel
            average.lerp_(weight_fp32, share.to(average.device) if isinstance(share, Tensor) else share)

    @torch.no_grad()
    def set(self, values: Sequence[Tensor]) -> None:
        """Replaces the averages by `values`, each of the same number of elements."""
        for average, value in zip(self.averages, values, strict=True):
            average.copy_(value.view(average.shape))
