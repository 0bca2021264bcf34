"""The loss scale of fp16 training.

fp16's smallest positive number is 6e-8, and gradients below half of that would become zero. So the loss is multiplied
by a large scale before the backward pass, which makes all gradients as many times larger, and they are divided by it,
in fp32, before they are used. The scale is to be as large as it can be without a gradient exceeding fp16's largest
number, 65504 (Micikevicius et al., arXiv 1710.03740).
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

    Its state stays on the device, so that the host need not wait to learn whether a gradient overflowed. The rule is
    that of torch.amp.GradScaler, which reads all gradients once more to find an overflow: here the gradients' norm,
    which is computed anyway, shows it.

    Args:
        enabled: False makes it 1 for good.
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
        """Goes on with a scale that was saved; the state of a run without a scale changes nothing here."""
        if self.enabled:
            self.value.fill_(state["scale"])
            self._good_updates.fill_(state["good_updates"])
