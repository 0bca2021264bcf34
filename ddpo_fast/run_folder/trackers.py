"""Experiment trackers (TensorBoard, Weights & Biases, ...), which accelerate drives."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker


class NoTracker(GeneralTracker):
    """Stands in for a tracker where there is none, so that a hook may call `log_images` on any process."""

    name = "none"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__(_blank=True)

    @property
    def tracker(self) -> None:
        return None

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Drops the values."""

    def log_images(self, *args: Any, **kwargs: Any) -> None:
        """Drops the images."""


def first_tracker(accelerator: Accelerator) -> Any:
    return accelerator.trackers[0] if accelerator.trackers else NoTracker()


def tracker_config(flat_config: dict[str, Any]) -> dict[str, Any]:
    """The settings that every tracker takes: numbers, strings and booleans."""
    return {name: value for name, value in flat_config.items() if isinstance(value, (bool, int, float, str))}
