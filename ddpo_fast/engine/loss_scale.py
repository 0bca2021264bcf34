"""fp16's loss scale: as large as gradients allow, halved when one overflows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FIRST = 2.0**16
# updates without an overflow before a larger scale is tried: torch.amp.GradScaler's number
PATIENCE = 2000


class LossScale:
    """A scale that follows overflows on the device, without the host waiting for it; 1 for good unless enabled."""

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self.value = torch.full((), FIRST if enabled else 1.0, device=device)
        self._good_updates = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, overflowed: Tensor) -> None:
        """After an update; `overflowed` is [] and bool."""
        if not self.enabled:
            return
        good = torch.where(overflowed, 0, self._good_updates + 1)
        grows = good >= PATIENCE
        self.value = self.value * torch.where(overflowed, 0.5, torch.where(grows, 2.0, 1.0))
        self._good_updates = torch.where(grows, 0, good)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.value.item(), "good_updates": self._good_updates.item()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.enabled:
            self.value.fill_(state["scale"])
            self._good_updates.fill_(state["good_updates"])
