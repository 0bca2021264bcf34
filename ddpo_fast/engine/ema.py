"""A moving average of the trained weights: in diffusion models it draws better than the last update does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
        self.averages = [self._copy(weight.detach(), on_host) for weight in weights]

    @staticmethod
    def _copy(weight: Tensor, on_host: bool) -> Tensor:
        return weight.to("cpu" if on_host else weight.device, torch.float32, copy=True)

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], skipped: Tensor | None = None) -> None:
        """After an update; the averages stay where they are if it was `skipped`, [] and bool."""
        share: Any = 1 - self.decay if skipped is None else torch.where(skipped, 0.0, 1 - self.decay)
        for weight, average in zip(weights, self.averages, strict=True):
            # one at a time: copies of all would be as large as the weights
            here = weight.detach().to(average.device, torch.float32)
            average.lerp_(here, share.to(average.device) if isinstance(share, Tensor) else share)

    @torch.no_grad()
    def set(self, values: Sequence[Tensor]) -> None:
        for average, value in zip(self.averages, values, strict=True):
            average.copy_(value.view(average.shape))


@contextmanager
def holding(parameters: Sequence[torch.nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the parameters have other values."""
    own = [parameter.data for parameter in parameters]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value
    try:
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value
