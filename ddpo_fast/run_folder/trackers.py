"""Experiment trackers (TensorBoard, Weights & Biases, ...), which accelerate drives."""

from __future__ import annotations

from typing import Any

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


def tracker_config(flat_config: dict[str, Any]) -> dict[str, Any]:
    """The settings that are numbers, strings or booleans: TensorBoard raises for others."""
    return {name: value for name, value in flat_config.items() if isinstance(value, (bool, int, float, str))}
