"""Experiment trackers (TensorBoard, Weights & Biases, ...), which accelerate drives."""

from __future__ import annotations

from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker


class NoTracker(GeneralTracker):
    """A tracker that drops everything: a user's hook may log to it where the run, or the process, has no tracker."""

    name = "none"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__(_blank=True)

    @property
    def tracker(self) -> None:
        return None

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""

    def log_images(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""


def first_tracker(accelerator: Accelerator) -> Any:
    """The first of the run's trackers, or a `NoTracker`."""
    return accelerator.trackers[0] if accelerator.trackers else NoTracker()


def image_trackers(accelerator: Accelerator) -> list[GeneralTracker]:
    """Those of the run's trackers that accelerate can send images to."""
    return [tracker for tracker in accelerator.trackers if hasattr(tracker, "log_images")]


def log_images(tracker: GeneralTracker, images: dict[str, np.ndarray], step: int) -> None:
    """Sends images [H, W, 3] in uint8 to a tracker by their names."""
    # TensorBoard takes a batch and must be told its layout, the others take lists of images
    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    tracker.log_images({name: image[None] for name, image in images.items()}, step=step, **layout)


def tracker_config(flat_config: dict[str, Any]) -> dict[str, Any]:
    """The settings that are numbers, strings or booleans: TensorBoard raises for others."""
    return {name: value for name, value in flat_config.items() if isinstance(value, (bool, int, float, str))}
