"""The loss scale of fp16 training.

fp16's smallest positive number is 6e-8, and gradients below half of that would become zero. So the loss is multiplied
by a large scale before the backward pass, which multiplies all gradients by that scale. The optimizer's step divides
them by the scale, in fp32. The scale should be as large as possible without a gradient exceeding fp16's largest number,
65504 (Micikevicius et al., arXiv 1710.03740).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# both are the defaults of torch.amp.GradScaler
INITIAL_SCALE = 2.0**16
# updates in a row without an overflow after which the scale is doubled
GROWTH_INTERVAL = 2000


class LossScale:
    """A loss scale that is halved when a gradient overflows and doubled after `GROWTH_INTERVAL` updates without one.

    The state stays on the device, so that the host need not wait to learn whether a gradient overflowed. The rule is
    that of torch.amp.GradScaler. GradScaler reads all gradients once more to find an overflow; here the caller finds it
    in the gradients' norm, which clipping needs anyway.

    Args:
        enabled: if False, the scale is always 1.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self.value = torch.full((), INITIAL_SCALE if enabled else 1.0, device=device)
        self._good_updates = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, overflowed: Tensor) -> None:
        """Adapts the scale after an update; `overflowed` is [] and bool."""
        if not self.enabled:
            return
        good = torch.where(overflowed, 0, self._good_updates + 1)
        grows = good >= GROWTH_INTERVAL
        # a new tensor and not an in-place change: the value of this update may be in a log that is read later
        self.value = self.value * torch.where(overflowed, 0.5, torch.where(grows, 2.0, 1.0))
        self._good_updates = torch.where(grows, 0, good)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.value.item(), "good_updates": self._good_updates.item()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues with a saved scale; does nothing if this run has no loss scale."""
        if self.enabled:
            self.value.fill_(state["scale"])
            self._good_updates.fill_(state["good_updates"])
