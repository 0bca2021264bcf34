"""The metrics of an update and the timings of an epoch, which `run_folder/run_log.py` logs.

Shapes: N (image, timestep) pairs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class UpdateMetrics:
    """Means and maxima over the pairs of an update. They stay on the device until they are logged.

    Reading a number on the host would make the host wait for all work that is queued on the device.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}

    def add(self, share: float, **values: Tensor) -> None:
        """Adds means [] over some of the pairs, weighted by those pairs' `share` of all."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + share * value.detach().float()

    def add_maximum(self, name: str, value: Tensor) -> None:
        """Keeps the larger of `value` [] and the maximum called `name`."""
        largest = self._largest.get(name)
        self._largest[name] = value.clone() if largest is None else torch.maximum(largest, value)

    def means(self) -> dict[str, Tensor]:
        """The means and the maxima by name, [] each."""
        return {**self._sums, **self._largest}


def approx_kl(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """TRL's estimate of the KL between the policy that sampled and the present one, `mean((l - l_old)^2) / 2`, []."""
    return 0.5 * (log_probs - old_log_probs).square().mean()


def clip_fraction(ratio: Tensor, clip_range: float) -> Tensor:
    """Share of the ratios [N] that are out of the clip range, whether or not the clip takes their gradient, []."""
    return ((ratio - 1).abs() > clip_range).float().mean()


class EpochTimer:
    """Seconds that an epoch's stages take: sampling, scoring and training, in this order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._started = time.monotonic()
        self._ended: dict[str, float] = {}

    def ends(self, stage: str) -> None:
        """Ends a stage: waits for the work on this thread's current stream, but not for other streams."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self._ended[stage] = time.monotonic()

    def at_end_of(self, items: Iterator[T], stage: str) -> Iterator[T]:
        """Yields `items`, and ends the stage after the last of them."""
        yield from items
        self.ends(stage)

    def timings(self, images: int) -> dict[str, float]:
        """How many images were scored, seconds of each stage, and images a second of the whole epoch.

        A stage that ended several times (as in an epoch that draws groups again) is counted to its last end.

        Args:
            images: scored by all processes.
        """
        sampled, scored, trained = (self._ended[stage] for stage in ("sampling", "scoring", "training"))
        return {
            "images_scored": images,
            "sample_s": sampled - self._started,
            "reward_s": scored - sampled,
            "train_s": trained - scored,
            "images_per_s": images / (trained - self._started),
        }
