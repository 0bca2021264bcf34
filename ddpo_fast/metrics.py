"""Scalars of one update, gathered on the device."""

from __future__ import annotations

import torch


class UpdateMetrics:
    """Means of an update's micro-batches, weighted by their pairs; stays on the device until `means`."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._largest: dict[str, torch.Tensor] = {}

    def add(self, share: float, **values: torch.Tensor) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + share * value.detach().float()

    def at_least(self, name: str, value: torch.Tensor) -> None:
        """Raises the maximum called `name` to `value`."""
        largest = self._largest.get(name)
        self._largest[name] = value.clone() if largest is None else torch.maximum(largest, value)

    def means(self) -> dict[str, torch.Tensor]:
        return {**self._sums, **self._largest}
