"""Experiment trackers (TensorBoard, Weights & Biases, ...), which accelerate drives."""

from __future__ import annotations

from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker


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
    # TensorBoard takes a batch and must be told its layout, Aim and ClearML one image, the others lists of images
    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    takes_one = tracker.name in ("aim", "clearml")
    given = {name: image if takes_one else image[None] for name, image in images.items()}
    tracker.log_images(given, step=step, **layout)


def log_array(accelerator: Accelerator, name: str, values: np.ndarray, step: int) -> None:
    """Sends an array to the trackers that show its histogram, W&B and a user's own; others refuse it or warn of it."""
    for tracker in accelerator.trackers:
        if tracker.name == "wandb" or tracker.name not in LOGGER_TYPE_TO_CLASS:
            tracker.log({name: values}, step=step)


def tracker_config(log_with: Any, flat_config: dict[str, Any]) -> dict[str, Any]:
    """A run's settings as its tracker takes them: as TRL sends them to W&B and to a user's own tracker, in one mapping.

    The others get those that are numbers, strings or booleans: TensorBoard raises for others, and MLflow drops what is
    long.
    """
    if log_with == "wandb" or not (isinstance(log_with, str) and log_with in LOGGER_TYPE_TO_CLASS):
        return {"ddpo_trainer_config": flat_config}
    return {name: value for name, value in flat_config.items() if isinstance(value, (bool, int, float, str))}
